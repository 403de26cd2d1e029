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


@dataclass(frozen=True)
class Tower:
    """Shape of the user tower and the item tower."""

    hidden: tuple[PositiveInt, ...] = (128,)
    """Widths of the hidden layers. Empty: a linear tower."""
    output: NonNegativeInt = 64
    """Width of the user and item embeddings that are stored and served. 0: no towers; the ranker
    then reads every feature directly (model.ranker.direct)."""
    normalize: bool = False
    """Whether the output is scaled to L2 norm 1."""
    dropout: Fraction = 0.0
    """Dropout after each hidden layer."""
    input_dropout: Fraction = 0.0
    """Dropout on the concatenated inputs."""


@dataclass(frozen=True)
class Ranker:
    """Shape of the ranker. Its input: user and item embedding, their product, and the scene."""

    hidden: tuple[PositiveInt, ...] = (256, 128)
    """Widths of the hidden layers."""
    dropout: Fraction = 0.0
    """Dropout after each hidden layer."""
    cross_layers: NonNegativeInt = 0
    """Number of DCN-V2 cross layers over the input, parallel to the MLP."""
    heads: NonNegativeInt = 0
    """Number of equal parts of each tower embedding. The ranker also reads the inner products of
    every part of the user's with every part of the item's. 0: no inner products."""
    direct: tuple[str, ...] = ()
    """User and item features whose embeddings the ranker reads in addition to the towers'
    output."""
    matches: bool = False
    """Whether the ranker also reads the inner product of each user feature of `direct` with each
    item feature there that shares its table, such as a history and the item key: it measures how
    well the item matches the user's list."""
    sharing: Literal["bottom", "mmoe"] = "bottom"
    """What the [[tasks]] share. bottom: the hidden layers. mmoe: experts with these hidden layers,
    mixed by one gate per task (multi-gate mixture-of-experts)."""
    experts: PositiveInt = 4
    """mmoe: number of experts."""
    task_hidden: tuple[PositiveInt, ...] = ()
    """Widths of the hidden layers of each task's own head, after the shared layers."""
    combine: Literal["product", "sum"] = "product"
    """How the tasks' probabilities p form the served score. product: of p ** share. sum: mean of p,
    weighted by share."""


@dataclass(frozen=True)
class Model:
    """Shape of the model."""

    dimension: PositiveInt = 16
    """Embedding width of features that do not set their own."""
    pooling: dict[str, Pooling] = field(default_factory=dict)
    """Pooling of list and sequence features, by feature name. mean: the default. sqrt: the sum over
    the square root of the length, so longer lists weigh more. attention: a mean with learned
    weights, by vector and position. self-attention: attention after one self-attention layer."""
    initial_deviation: PositiveFloat = 0.01
    """Standard deviation of the initial embeddings. Larger values (0.1) keep the entries of a list
    distinct from the start, which inner products with long histories need."""
    unknown_rate: Fraction = 0.0
    """Fraction of known categorical values that training replaces by the unknown code, so that the
    unknown embedding is trained."""
    tower: Tower = Tower()
    """The two towers."""
    ranker: Ranker = Ranker()
    """The ranker."""


@dataclass(frozen=True)
class WarmStart:
    """Start from a linear autoencoder in closed form. Needs linear towers.

    An item-item model of the training positives is computed and factored into two towers: the user
    embedding is the mean over a history, the item embedding a row of a table. On small data it is
    hard to beat. Training continues from there.
    """

    history: str = ""
    """Sequence feature that the user embedding is computed from. Empty: no warm start."""
    l2: NonNegativeFloat = 200.0
    """L2 penalty on the item-item weights."""
    dropout: Fraction = 0.5
    """Fraction of a history that is dropped in the closed form (a penalty on frequent items)."""
    user_power: NonNegativeFloat = 0.75
    """Each positive of a user with n positives weighs n^-user_power: 0 counts positives, 1 counts
    users."""
    max_items: int = 20_000
    """Largest vocabulary for which a warm start is computed: memory grows with its square (16 bytes
    per pair), time with its cube."""


@dataclass(frozen=True)
class Train:
    """How the model is trained."""

    objective: Literal["retrieval", "ranking", "joint"] = "joint"
    """retrieval: the retrieval loss. ranking: binary cross-entropy. joint: their weighted sum."""
    retrieval_loss: str = "softmax"
    """Loss of a positive row against the other items of the batch. softmax: cross-entropy over all
    of them. bpr: pairwise logistic loss, the mean over the negatives (Bayesian personalized
    ranking). Or a loss that your program registered (hvdrec.models.losses.register_loss)."""
    retrieval_weight: NonNegativeFloat = 0.1
    """joint: factor of the retrieval loss."""
    batch_size: PositiveInt = 8192
    """Rows of a step over all ranks together."""
    epochs: NonNegativeInt = 10
    """Maximum passes over the training split. 0: keep a warm start untrained."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate of AdamW."""
    embedding_optimizer: Literal["rowwise-adagrad", "adagrad", "adam", "sgd"] = "rowwise-adagrad"
    """Optimizer of the embedding tables. A step updates only the rows that it looked up."""
    embedding_learning_rate: PositiveFloat = 0.1
    """Peak learning rate of the embedding tables. Rows are updated rarely and need larger steps
    than dense weights."""
    embedding_initial_accumulator: NonNegativeFloat = 0.0
    """adagrad, rowwise-adagrad: initial sum of squared gradients of a row. At 0 the first update of
    a row has the full learning rate however small the gradient, so rare rows memorize their first
    samples; typical squared gradients (1e-8 to 1e-6) prevent this."""
    embedding_weight_decay: NonNegativeFloat = 0.0
    """L2 penalty on embedding rows: a step adds this factor times the row to the gradient of each
    row that it looks up."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of dense weights (not of embeddings and biases)."""
    warmup_steps: NonNegativeInt = 100
    """Steps over which the learning rate rises linearly."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay of the learning rate from the end of the warm-up to the last step."""
    schedule_end: Fraction = 0.0
    """linear, cosine: final learning rate, as a fraction of the peak."""
    clip_norm: NonNegativeFloat = 0.0
    """Maximum global gradient norm. 0: no clipping."""
    temperature: PositiveFloat = 0.1
    """Divisor of the retrieval logits."""
    logq: bool = True
    """Whether to subtract the log of the sampling probability from the logits of in-batch
    negatives."""
    remove_accidental_hits: bool = True
    """Whether to remove negatives that equal the row's own item."""
    uniform_negatives: NonNegativeInt = 0
    """Additional negatives per step, over all ranks together, drawn uniformly from the catalogue
    and used by every row. They cover rare items, which batches hardly ever contain."""
    hard_negatives: NonNegativeInt = 0
    """Number of negatives per row that count: those with the highest scores. 0: all."""
    teacher: str = ""
    """Directory of a run over the same features whose ranker teaches this one (distillation), such
    as one that reads all features directly. Every rank holds the teacher's tables whole."""
    teacher_weight: Fraction = 0.5
    """Fraction of the ranking loss that uses the teacher's probabilities as labels."""
    warm_start: WarmStart = WarmStart()
    """Initial weights of the towers."""
    average_decay: Fraction = 0.0
    """Decay of the exponential moving averages of all weights, such as 0.999. The averages are
    validated, exported and served. 0: no averages."""
    average_steps: PositiveInt = 10
    """Steps between two updates of the averages. Each update reads all table rows."""
    metric: Literal["auto", "auc", "gauc", "log_loss", "recall", "ndcg", "task_auc"] = "auto"
    """Validation metric of early stopping. auto: auc; recall for objective 'retrieval'; with
    [[tasks]] task_auc, the mean of the tasks' AUCs weighted by their shares."""
    patience: PositiveInt = 2
    """Validations without improvement after which training stops."""
    log_every: PositiveInt = 50
    """Steps between JSON log lines."""
    checkpoint_every: NonNegativeInt = 0
    """Steps between checkpoints. 0: only at the end of each epoch."""
    keep: PositiveInt = 2
    """Number of checkpoints to keep besides the best."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model. auto: the rank's own GPU if there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the MLPs (autocast)."""
    accumulate: PositiveInt = 1
    """Number of parts of a rank's batch. Their gradients are added before the step, so that larger
    batches fit into memory. In-batch negatives come from the same part."""
    cpu_layers: Literal["auto", "plain", "fused", "onednn"] = "auto"
    """How a CPU computes the layers of towers and ranker in training. plain: torch's own layers.
    fused: linear layer and ReLU in one operation, and faster dropout. onednn: large float32 steps
    in oneDNN's tensor layout, and faster dropout. auto: the fastest one by a short probe at the
    start; the run records it, and a resumed run keeps it. Results differ in the last digits only,
    except for dropout, whose masks differ between plain and the others."""
    threads: NonNegativeInt = 0
    """CPU threads of a rank. 0: the cores of the host divided by its ranks."""


@dataclass(frozen=True)
class Parallel:
    """How the work is spread over ranks."""

    placement: Literal["auto", "replicated", "sharded"] = "auto"
    """Whether each rank holds every embedding table whole, or only some of its rows. auto: large
    tables are sharded."""
    shard_from_mb: NonNegativeFloat = 16.0
    """auto: smallest table to shard (10^6 bytes of float32)."""
    kernel: Literal["auto", "torch", "fbgemm"] = "auto"
    """Implementation of table lookups and updates. auto: the fastest installed one that supports
    the table, by a short trial."""
    synchronization: Literal["step", "adasum", "average"] = "step"
    """How dense weights stay in sync. step: gradients are summed in every step, as on one rank.
    adasum: Adasum combines gradients, for batches so large that a sum overshoots. average: each
    rank steps alone and weights are averaged periodically, for slow networks. Embedding gradients
    are always summed in every step."""
    average_every: PositiveInt = 8
    """average: steps between two averages."""


@dataclass(frozen=True)
class Evaluate:
    """What evaluation reports."""

    k: Annotated[tuple[PositiveInt, ...], MinLen(1)] = (10, 50)
    """Cut-offs of the retrieval metrics. Early stopping uses the first."""
    threshold: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """Score from which a sample counts as predicted positive."""
    beta: PositiveFloat = 1.0
    """Weight of recall in F-beta."""
    batch_size: PositiveInt = 32_768
    """Rows of a batch on each rank."""


@dataclass(frozen=True)
class Export:
    """How the bundle is made."""

    parity_rows: PositiveInt = 10_000
    """Held-out rows whose scores from raw values must equal those of torch."""
    tolerance: float = 1e-5
    """Maximum difference of a score."""
    embeddings: Literal["float32", "float16", "int8"] = "float32"
    """Type of stored embeddings. Export measures the AUC that a smaller type loses."""
    ranker: Literal["float32", "int8"] = "float32"
    """Type of the weights of the ranker's inner layers. Export measures the AUC that int8 loses."""
    index: Literal["none", "hnsw"] = "none"
    """Approximate index over the items, for large catalogues. Export measures its recall."""
    filters: tuple[str, ...] = ()
    """Item features that a request may filter by: recommend(..., allowed={"genres": ["Drama"]})."""
    seen: bool = True
    """Whether to store each user's items of the log, which recommend(..., skip_seen=True) omits."""
    trending_days: PositiveFloat = 30.0
    """Last days of the log whose most liked items answer a request without any user data."""
