"""The sections about models: one dataclass per TOML table, with allowed values and defaults."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Interval, MinLen
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from hvdrec.config.schema import Pooling

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from hvdrec.config.structure import dataclass

Fraction = Annotated[float, Interval(ge=0, lt=1)]
SeenItems = Literal["taken", "shown"]
"""Which items count as seen by a user: the items of the user's rows with label 1, or of all
rows."""


@dataclass(frozen=True)
class Tower:
    """Shape of the user tower and the item tower."""

    hidden: tuple[PositiveInt, ...] = (128,)
    """Widths of the hidden layers. Empty: a linear tower."""
    output: NonNegativeInt = 64
    """Width of a tower's output. 0: no towers; the ranker then reads every feature directly
    (model.ranker.direct)."""
    normalize: bool = False
    """true: the output is scaled to L2 norm 1."""
    dropout: Fraction = 0.0
    """Dropout rate after each hidden layer."""
    input_dropout: Fraction = 0.0
    """Dropout rate of the tower's input."""


@dataclass(frozen=True)
class Ranker:
    """Shape of the ranker. It reads the towers' outputs, their product, and the scene features."""

    hidden: tuple[PositiveInt, ...] = (256, 128)
    """Widths of the hidden layers."""
    dropout: Fraction = 0.0
    """Dropout rate after each hidden layer."""
    cross_layers: NonNegativeInt = 0
    """Number of DCN-V2 cross layers, which read the ranker's input in parallel to the MLP."""
    heads: NonNegativeInt = 0
    """Number of equal slices (heads) into which each tower's output is cut. The ranker also reads
    the inner product of every user slice with every item slice. 0: no inner products."""
    direct: tuple[str, ...] = ()
    """User and item features whose embeddings the ranker reads in addition to the towers'
    outputs."""
    matches: bool = False
    """true: the ranker also reads the inner product of each user feature in `direct` with each
    item feature in `direct` that shares its table. The product of a history with the item key, for
    example, measures how well the item matches the user's list."""
    sharing: Literal["bottom", "mmoe"] = "bottom"
    """What the [[tasks]] share. bottom: the hidden layers. mmoe: several experts, each with such
    hidden layers; a gate per task weights the experts' outputs (multi-gate mixture-of-experts)."""
    experts: PositiveInt = 4
    """mmoe: the number of experts."""
    task_hidden: tuple[PositiveInt, ...] = ()
    """Widths of the hidden layers of each task's own head, after the shared layers."""
    combine: Literal["product", "sum"] = "product"
    """How the tasks' probabilities p form the served score. product: the product of p ** share.
    sum: the mean of p weighted by share."""


@dataclass(frozen=True)
class Model:
    """Shape of the model."""

    dimension: PositiveInt = 16
    """Embedding width of features that do not set their own."""
    pooling: dict[str, Pooling] = field(default_factory=dict)
    """How the entries of a list become one vector, by feature name. mean: the default. sqrt: their
    sum divided by the square root of the length, so that longer lists weigh more. attention: a mean
    whose weights are learned from vector and position. self-attention: one self-attention layer,
    then attention."""
    initial_deviation: PositiveFloat = 0.01
    """Standard deviation of the initial embeddings. Larger values such as 0.1 make the entries of a
    list differ from the start of training; inner products with long histories need this."""
    unknown_rate: Fraction = 0.0
    """Fraction of known categorical values that training replaces by the code for unknown values,
    so that the embedding of this code is trained."""
    tower: Tower = Tower()
    """The two towers."""
    ranker: Ranker = Ranker()
    """The ranker."""


@dataclass(frozen=True)
class WarmStart:
    """Start training from a linear autoencoder that is solved in closed form. Needs linear towers.

    The item-item matrix of the autoencoder is computed from the positive training rows and factored
    into the two towers. Then a user's vector is the mean over a history, and an item's vector is a
    row of a table. On small data this model is hard to beat; training continues from it.
    """

    history: str = ""
    """The sequence feature from which a user's vector is computed. Empty: no warm start."""
    l2: NonNegativeFloat = 200.0
    """L2 penalty on the item-item weights."""
    dropout: Fraction = 0.5
    """Dropout rate of a history's items in the closed form; it acts as a penalty on frequent
    items."""
    user_power: NonNegativeFloat = 0.75
    """Each positive row of a user with n positive rows has weight n^-user_power. With 0 all rows
    count equally, with 1 all users."""
    max_items: int = 20_000
    """Largest number of items for which a warm start is computed. Memory grows with the square of
    the number of items (16 bytes per pair), time with its cube."""


@dataclass(frozen=True)
class Train:
    """How the model is trained."""

    objective: Literal["retrieval", "ranking", "joint"] = "joint"
    """What is trained. retrieval: the two towers, by the retrieval loss. ranking: the ranker, by
    binary cross-entropy. joint: both, by the weighted sum of the losses."""
    retrieval_loss: str = "softmax"
    """Loss that compares a positive row's item with the other items of the batch. softmax:
    cross-entropy over all of them. bpr: the mean pairwise logistic loss (Bayesian personalized
    ranking). Or a loss that your program registered (hvdrec.models.losses.register_loss)."""
    retrieval_weight: NonNegativeFloat = 0.1
    """joint: factor of the retrieval loss."""
    batch_size: NonNegativeInt = 0
    """Rows of a training step on all ranks together. 0: the largest power of two from 64 to 8192
    with which an epoch has at least 50 steps."""
    epochs: NonNegativeInt = 10
    """Maximum passes over the training split. 0: keep a warm start as it is."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate of AdamW."""
    embedding_optimizer: Literal["rowwise-adagrad", "adagrad", "adam", "sgd"] = "rowwise-adagrad"
    """Optimizer of the embedding tables. A step updates only the rows that its batch looks up."""
    embedding_learning_rate: PositiveFloat = 0.1
    """Peak learning rate of the embedding tables. A row is updated rarely, so it needs larger
    updates than dense weights."""
    embedding_initial_accumulator: NonNegativeFloat = 0.0
    """adagrad, rowwise-adagrad: initial sum of squared gradients of a row. With 0, the first update
    of a row is as large as the learning rate even if the gradient is small, so rare rows memorize
    their first samples. A typical squared gradient (1e-8 to 1e-6) prevents this."""
    embedding_weight_decay: NonNegativeFloat = 0.0
    """L2 penalty on embedding rows. A step adds this factor times the row to the gradient of each
    row that its batch looks up."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of dense weights (not of embeddings and biases)."""
    warmup_steps: Literal["auto"] | NonNegativeInt = "auto"
    """Number of steps in which the learning rate rises linearly to its peak. auto: a tenth of all
    steps, at most 100."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls from the end of the warm-up to the last step."""
    schedule_end: Fraction = 0.0
    """linear, cosine: final learning rate, as a fraction of the peak."""
    clip_norm: NonNegativeFloat = 0.0
    """Maximum norm of the gradients of all weights together. 0: no clipping."""
    temperature: PositiveFloat = 0.1
    """Divisor of the retrieval logits."""
    logq: bool = True
    """true: the log of the probability that an item is in a batch is subtracted from the item's
    retrieval logit. This corrects the bias that popular items are negatives more often."""
    remove_accidental_hits: bool = True
    """true: negatives that are the row's own item are ignored."""
    uniform_negatives: NonNegativeInt = 0
    """Number of additional negatives per step, on all ranks together. They are drawn uniformly from
    the catalogue, so they cover rare items, and every row uses them."""
    hard_negatives: NonNegativeInt = 0
    """Number of negatives that count for each row: the negatives with the highest logits. 0:
    all."""
    teacher: str = ""
    """Directory of another run on the same features whose ranker teaches this one (distillation),
    such as one that reads all features directly. Every rank loads all of the teacher's tables."""
    teacher_weight: Fraction = 0.5
    """Fraction of the ranking loss whose labels are the teacher's probabilities."""
    warm_start: WarmStart = WarmStart()
    """Initial weights of the towers."""
    average_decay: Fraction = 0.0
    """Decay of the exponential moving averages of all weights, such as 0.999. Validation, export
    and serving use the averages instead of the weights. 0: no averages."""
    average_steps: PositiveInt = 10
    """Steps between two updates of the averages. Each update reads all rows of all tables."""
    metric: Literal["auto", "auc", "gauc", "log_loss", "recall", "ndcg", "task_auc", "none"] = (
        "auto"
    )
    """Validation metric of early stopping. auto: auc; recall for objective 'retrieval'; with
    [[tasks]] task_auc, the mean of the tasks' AUCs weighted by their shares. If this metric is not
    defined on the validation split, auto chooses log_loss, recall or none, and prints a line. none:
    there is no validation; all epochs are trained, and the last checkpoint is the best."""
    patience: NonNegativeInt = 0
    """Number of validations without improvement after which training stops. Validations during the
    warm-up do not count. 0: a fifth of the epochs, at least 2."""
    log_every: PositiveInt = 50
    """Steps between two lines of the training log."""
    trackers: tuple[str, ...] = ()
    """Programs that record the run: tensorboard, mlflow, or one that your program registered
    (hvdrec.training.trackers.register_tracker)."""
    checkpoint_every: NonNegativeInt = 0
    """Steps between checkpoints. 0: only at the end of each epoch."""
    keep: PositiveInt = 2
    """Number of checkpoints to keep in addition to the best one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that trains the model. auto: the rank's own GPU if there is one, else the CPU."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Precision of the MLPs (autocast). bf16 is slow on a CPU without bf16 instructions. auto: bf16
    on a GPU with bf16 and on a CPU with matrix units for it (AMX), else fp32; a resumed run keeps
    the choice."""
    accumulate: PositiveInt = 1
    """Number of parts into which a rank's batch is cut. The gradients of the parts are added before
    the optimizer step, so that larger batches fit into memory. In-batch negatives come from the
    same part."""
    cpu_layers: Literal["auto", "plain", "fused", "onednn"] = "auto"
    """How a CPU computes the layers of towers and ranker in training. plain: torch's own layers.
    fused: linear layer and ReLU in one operation, and faster dropout. onednn: large float32 batches
    in oneDNN's tensor layout, and faster dropout. auto: onednn for float32 on a CPU that is not
    Intel's, else fused; a resumed run keeps the choice. Results differ only in the last digits,
    except that plain draws other dropout masks than fused and onednn."""
    threads: NonNegativeInt = 0
    """CPU threads of a rank. 0: the cores of the host divided by its ranks."""


@dataclass(frozen=True)
class Parallel:
    """How the work is divided among ranks."""

    placement: Literal["auto", "replicated", "sharded"] = "auto"
    """replicated: each rank stores all rows of every embedding table. sharded: each rank stores a
    part of the rows. auto: large tables are sharded, all other tables are replicated."""
    shard_from_mb: NonNegativeFloat = 16.0
    """auto: tables of at least this size (10^6 bytes of float32) are sharded."""
    kernel: Literal["auto", "torch", "fbgemm"] = "auto"
    """Implementation of table lookups and updates. auto: torch on a CPU; on a GPU, fbgemm if it is
    installed and supports the table. Results differ in the last digits."""
    synchronization: Literal["step", "adasum", "average"] = "step"
    """How dense weights stay equal on all ranks. step: gradients are summed in every step, which
    gives the same result as one rank. adasum: Adasum combines the gradients, for batches so large
    that a sum overshoots. average: each rank updates its own weights, and weights are averaged
    periodically, for slow networks. Embedding gradients are always summed in every step."""
    average_every: PositiveInt = 8
    """average: steps between two averages."""


@dataclass(frozen=True)
class Evaluate:
    """What evaluation reports."""

    k: Annotated[tuple[PositiveInt, ...], MinLen(1)] = (10, 50)
    """Cut-offs K of the retrieval metrics, such as Recall@K. Early stopping uses the first."""
    threshold: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """A sample with at least this score counts as predicted positive."""
    beta: PositiveFloat = 1.0
    """Weight of recall in F-beta."""
    batch_size: PositiveInt = 32_768
    """Rows of a batch on each rank."""
    events: NonNegativeInt = 20_000
    """Number of positive rows (events) on which retrieval is also measured one by one, with the
    user's history before each event. If there are more such rows, about every n-th is taken. Needs
    a split that follows time.
    0: not measured."""
    sampled_negatives: NonNegativeInt = 0
    """Number of sampled items, such as 99. Events are then also measured with these items instead
    of the whole catalogue. Only to compare with papers that do so: the metrics are biased. 0: not
    measured."""
    seen: SeenItems = "taken"
    """Which items count as seen by a user. Retrieval and its baselines leave these items out, and
    so does recommend(..., skip_seen=True). taken: items of rows with label 1. shown: items of all
    rows, for example films that a user rated low, too."""


@dataclass(frozen=True)
class Export:
    """How the bundle is made."""

    parity_rows: PositiveInt = 10_000
    """Number of test rows that the bundle scores from raw values, to compare the scores with
    torch's."""
    tolerance: float = 1e-5
    """Maximum difference between a score of the bundle and of torch."""
    embeddings: Literal["float32", "float16", "int8"] = "float32"
    """Type of stored embeddings. Export measures how much AUC a smaller type costs."""
    ranker: Literal["float32", "int8"] = "float32"
    """Type of the weights of the ranker's inner layers. Export measures how much AUC int8 costs."""
    index: Literal["none", "hnsw"] = "none"
    """Approximate index for the search of candidates in large catalogues. Export measures its
    recall."""
    filters: tuple[str, ...] = ()
    """Item features that a request may filter by: recommend(..., allowed={"genres": ["Drama"]})."""
    seen: bool = True
    """true: the bundle stores the items that each user has seen (see evaluate.seen), so that
    recommend(..., skip_seen=True) can leave them out."""
    users_as_of: Literal["train", "validation", "all"] = "all"
    """Rows from which the users' features, histories and seen items, and the trending counts, are
    taken. all: the whole log, for serving. train: only training rows, to score validation rows by
    user key. validation: training and validation rows, to score test rows by user key."""
    trending_days: PositiveFloat = 30.0
    """Number of days. A request without any user data is answered with the items that have the most
    positive rows in the last trending_days days of the log."""


@dataclass(frozen=True)
class Promote:
    """When a new model may serve (hvdrec promote).

    The new model is compared with the model that serves, on the freshest labelled rows.
    """

    to: str = ""
    """Directory of the published versions (default WORK/published). A service watches
    DIRECTORY/current."""
    rows: PositiveInt = 20_000
    """Largest number of rows to compare on, the newest."""
    days: NonNegativeFloat = 0.0
    """Compare on the validation and test rows of this many last days. 0: on the test split."""
    min_rows: PositiveInt = 200
    """With fewer rows, nothing is published."""
    min_auc: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """Smallest AUC of a model that may serve."""
    auc: NonNegativeFloat = 0.002
    """Largest loss of AUC. A loss counts if it exceeds this by two standard errors of the
    difference."""
    log_loss: NonNegativeFloat = 0.005
    """Largest increase of the log loss. An increase counts if it exceeds this by two standard
    errors of the difference."""
    calibration: NonNegativeFloat = 0.1
    """Largest increase of |ln(predicted positives / real positives)|."""
    coverage: NonNegativeFloat = 0.05
    """Largest decrease of the share of rows whose item is in the catalogue and, for each feature,
    of the share of rows with a known value."""
    drift: NonNegativeFloat = 0.5
    """Largest distance of the new scores from the old ones as distributions: their Wasserstein-1
    distance, in standard deviations of the old scores."""
    slices: tuple[str, ...] = ()
    """Columns of the samples. For each of their values, the AUC is also compared over the rows with
    this value."""
    slice_rows: PositiveInt = 500
    """Smallest number of rows with a value for which the AUC of this value is compared."""
    slice_auc: NonNegativeFloat = 0.02
    """Largest loss of AUC over the rows with one value."""
    max_age_hours: NonNegativeFloat = 0.0
    """Largest age of the newest row. 0: any age, but the newest row must not be older than it was
    when the model that serves was promoted."""
    keep: PositiveInt = 10
    """Number of versions to keep, in addition to the current one and the one before it."""
