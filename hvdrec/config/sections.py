"""The sections of a run's configuration: what each field is for, and its default."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, overload

from hvdrec.config.schema import Pooling
from hvdrec.storage.urls import Location, as_location


@dataclass(frozen=True)
class Paths:
    """Directories of a run, relative to the current directory. An empty one lies in `work`.

    features and bundle may be URLs of a store that fsspec knows: s3://bucket/features.
    """

    raw: str = "data"
    """Where the raw tables are."""
    work: str = "runs/default"
    """Where the stages write: samples/, features/, run/, bundle/."""
    samples: str = ""
    """Labelled samples (default WORK/samples)."""
    features: str = ""
    """Fitted graph and encoded shards (default WORK/features)."""
    run: str = ""
    """Checkpoints and logs of training (default WORK/run)."""
    bundle: str = ""
    """What is served (default WORK/bundle)."""

    @overload
    def of(self, stage: Literal["samples", "run"]) -> Path: ...

    @overload
    def of(self, stage: Literal["features", "bundle"]) -> Location: ...

    def of(self, stage: Literal["samples", "features", "run", "bundle"]) -> Location:
        """Return the place of a stage."""
        return as_location(getattr(self, stage) or str(Path(self.work) / stage))


@dataclass(frozen=True)
class Split:
    """How samples are divided into train, validation and test."""

    method: Literal["temporal", "random", "random-per-user", "leave-last-out"] = "temporal"
    """temporal: train strictly before validation strictly before test. random: any row anywhere.
    random-per-user: random within each user. leave-last-out: a user's last row is test, the one
    before validation."""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of train, validation and test; not used by leave-last-out or with boundaries."""
    column: str = ""
    """temporal: the column that orders rows; empty takes samples.time."""
    boundaries: tuple[float, ...] = ()
    """temporal: last value of train and of validation in that column; empty: fractions."""
    seed: int = 0
    """Seed of the random methods."""


@dataclass(frozen=True)
class History:
    """A sequence feature made of what the user did beside the sample."""

    name: str
    """Name of the column, which a feature of kind 'sequence' reads."""
    where: str = ""
    """SQL predicate over the interactions that count (empty: those with label 1)."""
    length: int = 50
    """How many are kept: those nearest in time."""
    scope: Literal["before", "others"] = "before"
    """before: what came strictly before the sample. others: the user's other training rows, before
    and after it, for the protocols with a random split; refused with another."""
    column: str = ""
    """The feature of the events that the list holds, such as the item's category (empty: the item);
    the sequence says `shares` = that feature to have its vocabulary and table."""
    repeats: bool = True
    """Whether an item (or value of `column`) that the user met several times stands there each
    time. false: at its latest time only, which makes room for more of them."""


@dataclass(frozen=True)
class Negatives:
    """Sampled negatives for logs that hold only what people did."""

    per_positive: int = 0
    """How many to draw for each positive row; 0 draws none."""
    within: tuple[str, ...] = ()
    """Columns that a negative shares with its positive: candidates are the items that occur with
    the same values there and that the user did not take with these values."""
    seed: int = 0
    """Seed of the draw."""


@dataclass(frozen=True)
class Join:
    """A further table whose columns are joined to the samples (and the sampled negatives)."""

    table: str
    """CSV or Parquet file, relative to paths.raw."""
    on: tuple[str, ...]
    """Columns that both have; a sample takes the row with equal values, or nulls."""


@dataclass(frozen=True)
class Samples:
    """How labelled samples are made of raw tables. SQL is DuckDB's."""

    interactions: str = ""
    """Table of what was shown or done (CSV or Parquet, globs allowed), relative to paths.raw."""
    users: str = ""
    """Table with one row per user, joined by the user key; optional."""
    items: str = ""
    """Table with one row per item: the catalogue, joined by the item key; optional."""
    user: str = "user_id"
    """Column of the user key."""
    item: str = "item_id"
    """Column of the item key."""
    time: str = ""
    """Column of the time (number, date or timestamp); needed by temporal splits and history."""
    title: str = ""
    """Column of the item table that names an item to people; optional."""
    label: str = "label"
    """SQL expression that gives 0 or 1 (or a boolean). With [[tasks]] it stays the main label: of
    retrieval, histories, popularity, and of the metrics of the served score."""
    weight: str = ""
    """SQL expression of the sample's weight, not negative; empty means 1."""
    drop: str = ""
    """SQL predicate: rows that are left out altogether."""
    derive: dict[str, str] = field(default_factory=dict)
    """New columns: name = SQL expression over the interactions and the joined tables."""
    joins: tuple[Join, ...] = ()
    """Further tables, joined in this order."""
    negatives: Negatives = Negatives()
    """Sampled negatives."""
    history: tuple[History, ...] = ()
    """Sequences of what the user did before."""
    split: Split = Split()
    """Train, validation and test."""


@dataclass(frozen=True)
class Task:
    """One of several labels that one ranker predicts, each with a head of its own."""

    name: str
    """Name in reports and at scoring time, where its probability is the output 'score_NAME'."""
    label: str
    """SQL expression that gives 0 or 1 (or a boolean), or NULL where the row tells nothing: such a
    row does not count for this task. Sampled negatives are 0."""
    weight: float = 1.0
    """Factor of its loss, which is the mean over the rows that tell."""
    share: float = 1.0
    """Its part in the served score, see model.ranker.combine; 0: trained along, not served."""

    @property
    def column(self) -> str:
        """Column of samples and shards that holds its label."""
        return f"label_{self.name}"

    @property
    def output(self) -> str:
        """Output of the ranker's graph that holds its probability."""
        return f"score_{self.name}"


@dataclass(frozen=True)
class Encode:
    """How shards are written."""

    shard_rows: int = 131_072
    """Most rows of a shard; shards of a split differ by at most one row."""
    row_group_rows: int = 16_384
    """Most rows of a row group, the unit of reading."""


@dataclass(frozen=True)
class Loader:
    """How shards are read."""

    shuffle_rows: int = 262_144
    """Rows among which a rank shuffles; several row groups are mixed in this window."""
    workers: int = 2
    """Reading threads of a rank."""
    prefetch: int = 4
    """Batches held ready."""
    cache_dir: str = ""
    """Directory on a disk of each host in which Petastorm keeps row groups that were read, for
    later epochs and runs: for shards that are far away. Nobody else may write there. Empty:
    none."""
    cache_gb: float = 10.0
    """Size of that cache (10^9 bytes), shared by the ranks of a host; the oldest go first."""


@dataclass(frozen=True)
class Tower:
    """Shape of the user and the item tower."""

    hidden: tuple[int, ...] = (128,)
    """Widths of the hidden layers of its MLP; empty for a linear tower."""
    output: int = 64
    """Width of the user and item embeddings that are stored and served. 0: no towers, the ranker
    alone over all features, which must then be direct."""
    normalize: bool = False
    """Whether its output has L2 norm 1."""
    dropout: float = 0.0
    """Dropout after each hidden layer."""
    input_dropout: float = 0.0
    """Dropout of the tower's concatenated inputs."""


@dataclass(frozen=True)
class Ranker:
    """Shape of the ranker over user embedding, item embedding, their product and the scene."""

    hidden: tuple[int, ...] = (256, 128)
    """Widths of its hidden layers."""
    dropout: float = 0.0
    """Dropout after each hidden layer."""
    cross_layers: int = 0
    """DCN-V2 cross layers over its input, beside the MLP; 0 for none."""
    heads: int = 0
    """Parts into which the towers' embeddings are cut: the ranker is also given the inner products
    of every part of the user's with every part of the item's. 0: none of them."""
    direct: tuple[str, ...] = ()
    """User and item features embedded directly into the ranker, beside the towers' output."""
    matches: bool = False
    """Whether the ranker is also given, for each user's feature of `direct` that shares its table
    with an item's feature there (a history and the item's id, say), their inner product: how well
    the item matches what the user's list holds."""
    sharing: Literal["bottom", "mmoe"] = "bottom"
    """What [[tasks]] share. bottom: the hidden layers. mmoe: experts, each with these hidden
    layers, which every task mixes by a gate of its own (multi-gate mixture-of-experts)."""
    experts: int = 4
    """mmoe: how many experts."""
    task_hidden: tuple[int, ...] = ()
    """Widths of the hidden layers that each of the [[tasks]] has for itself behind the shared."""
    combine: Literal["product", "sum"] = "product"
    """How the served score is made of the tasks' probabilities p. product: of p ** share. sum:
    their mean, weighted by the shares."""


@dataclass(frozen=True)
class Model:
    """Shape of the model."""

    dimension: int = 16
    """Width of an embedding where its feature names none."""
    pooling: dict[str, Pooling] = field(default_factory=dict)
    """How the vectors of a list or sequence become one: name of the feature = mean (the default),
    sqrt (their sum over the square root of their number: longer lists weigh more), attention (a
    mean with learned weights, by vector and place) or self-attention (the same behind one layer in
    which the entries see each other)."""
    initial_deviation: float = 0.01
    """Standard deviation of an embedding's first values. Larger ones (0.1) tell the entries of a
    list apart from the beginning, which inner products of long histories need."""
    unknown_rate: float = 0.0
    """Share of a known categorical value that training replaces by the unknown code, so that the
    unknown embedding is trained."""
    tower: Tower = Tower()
    """The two towers."""
    ranker: Ranker = Ranker()
    """The ranker."""


@dataclass(frozen=True)
class WarmStart:
    """Towers that begin as a linear autoencoder in closed form; needs linear towers.

    An item-item model of the training positives is computed and brought into the form of two
    towers: the user's embedding is the mean over a history, the item's a row of its table. Where
    the data are small it is hard to beat; training goes on from there.
    """

    history: str = ""
    """The sequence that the user's embedding is made of; empty: no warm start."""
    l2: float = 200.0
    """Penalty on the item-item weights."""
    dropout: float = 0.5
    """Share of a history that the model must do without (a penalty on frequent items)."""
    user_power: float = 0.75
    """A user with n positives weighs n^-user_power per positive: 0 counts positives, 1 users."""
    max_items: int = 20_000
    """Largest vocabulary for which it is computed: memory grows with its square (16 bytes a pair),
    time with its cube."""


@dataclass(frozen=True)
class Train:
    """How the model is trained."""

    objective: Literal["retrieval", "ranking", "joint"] = "joint"
    """retrieval: the retrieval loss. ranking: binary cross-entropy. joint: their weighted sum."""
    retrieval_loss: str = "softmax"
    """Loss of a positive row against the other items of the batch. softmax: cross-entropy over all
    of them. bpr: pairwise logistic loss, the mean over the negatives (Bayesian personalized
    ranking). Or a loss that your program registered (hvdrec.models.losses.register_loss)."""
    retrieval_weight: float = 0.1
    """joint only: the retrieval loss's factor."""
    batch_size: int = 8192
    """Rows of a step over all ranks together."""
    epochs: int = 10
    """Most passes over the training split; 0 leaves a warm start as it is."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    embedding_optimizer: Literal["rowwise-adagrad", "adagrad", "adam", "sgd"] = "rowwise-adagrad"
    """Optimizer of the embedding tables; only the rows that a step looks up are touched."""
    embedding_learning_rate: float = 0.1
    """Peak learning rate of the embedding tables. Rows are met rarely and want larger steps than
    dense weights."""
    embedding_initial_accumulator: float = 0.0
    """adagrad, rowwise-adagrad: what a row's sum of squared gradients begins with. With 0 the first
    step of a row has the full learning rate however small its gradient, by which rows that are met
    rarely learn their first samples by heart; squares of usual gradients (1e-8 to 1e-6) hold them
    back."""
    embedding_weight_decay: float = 0.0
    """L2 penalty on embedding rows: this factor times the row is added to its gradient, in the
    steps that look the row up and in no others."""
    weight_decay: float = 0.0
    """Decoupled weight decay of dense weights (no embeddings, no biases)."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How it falls after the warm-up until the last step of the last epoch."""
    schedule_end: float = 0.0
    """linear, cosine: the share of the peak learning rates that it falls to."""
    clip_norm: float = 0.0
    """Global gradient norm above which gradients are scaled down; 0 switches clipping off."""
    temperature: float = 0.1
    """Divisor of the retrieval logits."""
    logq: bool = True
    """Whether in-batch negatives are corrected by the log of their sampling probability."""
    remove_accidental_hits: bool = True
    """Whether negatives that equal the row's own item are removed."""
    uniform_negatives: int = 0
    """Items drawn uniformly from the catalogue in each step, over all ranks together, as further
    negatives of every row: rare items are hardly ever in a batch otherwise."""
    hard_negatives: int = 0
    """How many of a row's negatives count: those that the model now scores highest. 0: all."""
    teacher: str = ""
    """Directory of a run over the same features, whose ranker this one learns from (distillation):
    one over all features, say, where this one has the towers' embeddings only. Every rank holds its
    tables whole."""
    teacher_weight: float = 0.5
    """Share of the ranking loss that the teacher's probabilities are the labels of."""
    warm_start: WarmStart = WarmStart()
    """Where the towers begin."""
    average_decay: float = 0.0
    """Factor by which exponential moving averages of all weights keep what they are in each step,
    such as 0.999; the averages are what is validated, exported and served. 0: the weights are."""
    average_steps: int = 10
    """Steps between two updates of the averages, each of which reads all table rows."""
    metric: Literal["auto", "auc", "gauc", "log_loss", "recall", "ndcg", "task_auc"] = "auto"
    """Validation metric for early stopping; auto: auc, or recall for retrieval alone, or with
    [[tasks]] task_auc, the mean of the tasks' AUCs, weighted by their shares."""
    patience: int = 2
    """Validations without a better metric after which training stops."""
    log_every: int = 50
    """Steps between JSON log lines."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: at the end of each epoch only."""
    keep: int = 2
    """Checkpoints that are kept beside the best."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes the rank's own GPU where there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the MLPs (autocast)."""
    accumulate: int = 1
    """Parts into which a rank cuts its batch; their gradients are added before the step, so that
    larger batches fit. In-batch negatives are those of one part."""
    cpu_layers: Literal["auto", "plain", "fused", "onednn"] = "auto"
    """How a CPU computes the layers of towers and ranker in training. plain: torch's own layers.
    fused: linear layer and ReLU in one operation, and faster dropout. onednn: large float32 steps
    in oneDNN's tensor layout, and faster dropout. auto: the fastest one by a short probe at the
    start; the run records it, and a resumed run keeps it. Results differ in the last digits only,
    except for dropout, whose masks differ between plain and the others."""
    threads: int = 0
    """CPU threads of a rank; 0: the machine's cores over the ranks on it."""


@dataclass(frozen=True)
class Parallel:
    """How the work is spread over ranks."""

    placement: Literal["auto", "replicated", "sharded"] = "auto"
    """Whether each rank holds every embedding table whole, or a part of each. auto: large tables
    are sharded."""
    shard_from_mb: float = 16.0
    """auto: a table of at least so many megabytes (10^6 bytes of float32) is sharded."""
    kernel: Literal["auto", "torch", "fbgemm"] = "auto"
    """What reads and updates table rows. auto takes the faster one of those that are installed and
    can hold the table, by a short trial."""
    synchronization: Literal["step", "adasum", "average"] = "step"
    """How dense weights stay together. step: gradients are summed in every step, as if there were
    one rank. adasum: gradients are joined by Adasum, for batches so large that a sum overshoots.
    average: each rank steps by itself and weights are averaged now and then, for slow networks.
    Embedding rows are always summed in every step."""
    average_every: int = 8
    """average: steps between two averages."""


@dataclass(frozen=True)
class Evaluate:
    """What evaluation reports."""

    k: tuple[int, ...] = (10, 50)
    """Cut-offs of the retrieval metrics; the first also serves early stopping."""
    threshold: float = 0.5
    """Score from which a sample counts as predicted positive."""
    beta: float = 1.0
    """Weight of recall in F-beta."""
    batch_size: int = 32_768
    """Rows scored at a time by a rank."""


@dataclass(frozen=True)
class Export:
    """How the bundle is made."""

    parity_rows: int = 10_000
    """Held-out rows that enter as raw values and must score as in torch."""
    tolerance: float = 1e-5
    """Largest allowed difference of a score."""
    embeddings: Literal["float32", "float16", "int8"] = "float32"
    """How embeddings are stored; the AUC that the smaller ones cost is measured at export."""
    ranker: Literal["float32", "int8"] = "float32"
    """Weights of the ranker's inner layers; the AUC that int8 costs is measured at export."""
    index: Literal["none", "hnsw"] = "none"
    """Approximate index over the items, for large catalogues; its recall is measured."""
    filters: tuple[str, ...] = ()
    """Item features that a request may ask for: recommend(..., allowed={"genres": ["Drama"]})."""
    seen: bool = True
    """Store what each user met in the log, which recommend(..., skip_seen=True) leaves out."""
    trending_days: float = 30.0
    """The log's last days, whose most liked items answer a request of which nothing is known."""
