"""The sections about data: one dataclass per TOML table, with allowed values and defaults."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, overload

from annotated_types import Interval
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from hvdrec.config.durations import OptionalDuration
from hvdrec.config.label_join import Exposures, Feedback, TimeUnit
from hvdrec.storage.urls import Location, as_location

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from hvdrec.config.structure import dataclass

Fraction = Annotated[float, Interval(ge=0, lt=1)]


@dataclass(frozen=True)
class Paths:
    """Directories of a run, relative to the current directory.

    raw, features and bundle may be URLs of a store that the library fsspec supports:
    s3://bucket/features.
    """

    raw: str = "data"
    """Directory or URL with the raw tables."""
    work: str = "runs/default"
    """WORK, the directory in which the stages write samples/, features/, run/ and bundle/."""
    samples: str = ""
    """Directory of the labelled samples (default WORK/samples)."""
    features: str = ""
    """Directory of the fitted feature graph and the encoded shards (default WORK/features)."""
    run: str = ""
    """Directory of the checkpoints and logs of training (default WORK/run)."""
    bundle: str = ""
    """Directory of the bundle to serve (default WORK/bundle)."""

    @overload
    def of(self, stage: Literal["samples", "run"]) -> Path: ...

    @overload
    def of(self, stage: Literal["features", "bundle"]) -> Location: ...

    def of(self, stage: Literal["samples", "features", "run", "bundle"]) -> Location:
        """Return the directory or URL that a stage writes."""
        return as_location(getattr(self, stage) or str(Path(self.work) / stage))


@dataclass(frozen=True)
class Split:
    """How samples are divided into train, validation and test."""

    method: Literal["temporal", "random", "random-per-user", "leave-last-out"] = "temporal"
    """temporal: all training rows are older than all validation rows, which are older than all test
    rows. random: rows are drawn at random. random-per-user: the rows of each user are drawn at
    random. leave-last-out: the last row of each user is test, the one before it validation."""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Fractions of rows in train, validation and test. Ignored with leave-last-out and with
    boundaries."""
    column: str = ""
    """temporal: the column that orders the rows. Empty: samples.time."""
    boundaries: tuple[float, ...] = ()
    """temporal: the largest value of `column` in train, and the largest in validation. Empty: use
    fractions."""
    after: float | None = None
    """temporal: rows with at most this value of `column` belong to no split; they only fill
    histories. Continued training reads only newer rows."""
    seed: int = 0
    """Seed of the two random methods."""


@dataclass(frozen=True)
class History:
    """A history: for each sample, a list of items from other interactions of the same user."""

    name: str
    """Name of the new column. A feature of kind 'sequence' reads it."""
    where: str = ""
    """SQL predicate that selects the interactions to list. Empty: the interactions with label 1."""
    length: PositiveInt = 50
    """Maximum length of the list. The interactions nearest in time to the sample are kept."""
    scope: Literal["before", "others"] = "before"
    """before: interactions strictly before the sample. others: all other training rows of the user,
    before and after the sample; allowed only with a random split."""
    column: str = ""
    """The feature whose values are listed, such as the item's category. Empty: the item key. The
    sequence feature must set `shares` to the same feature, to use its vocabulary and table."""
    repeats: bool = True
    """true: an item (or value of `column`) may occur several times in the list. false: only its
    latest occurrence is kept, which leaves room for other items."""
    within: OptionalDuration = ""
    """Largest age of a listed interaction at the time of the sample, such as "90d"; only with scope
    "before". Numeric times have the unit samples.time_unit. In a split's table of users, the age
    counts back from the latest time in the splits that the table covers. Empty: no limit."""


@dataclass(frozen=True)
class Negatives:
    """Negatives: drawn for logs that record only positive actions, or reduced if there are many."""

    per_positive: NonNegativeInt = 0
    """Number of negatives per positive row."""
    within: tuple[str, ...] = ()
    """Columns whose values a negative row copies from its positive row, such as store and week. Its
    item is drawn from the items that occur in the log with these values, except the items that the
    user chose with these values."""
    seed: int = 0
    """Seed of the random draws."""
    rate: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Share of the rows with label 0 (in all tasks) that are kept. Their weight is divided by this
    share. User, item, time and seed decide whether a row is kept."""


@dataclass(frozen=True)
class Join:
    """A further table whose columns are added to the samples and to the sampled negatives."""

    table: str
    """A file, a directory or a glob, relative to paths.raw."""
    on: tuple[str, ...]
    """Columns that must be equal in both tables. A sample without a matching row gets nulls."""


@dataclass(frozen=True)
class TableFormat:
    """How to read a raw table whose format its name does not tell, such as a file without header.

    A table without such a section is read by its suffix: .parquet, .csv, .tsv, .jsonl, .ndjson
    (text also as .gz), or a directory of such files or of a Delta or Iceberg table.
    """

    path: str
    """The table, written as in samples.interactions, users, items or joins."""
    format: Literal["", "csv", "json", "parquet", "delta", "iceberg"] = ""
    """json: one JSON object per line. Empty: by the suffix, and csv if the suffix is unknown."""
    delimiter: str = ""
    """csv: the text between two fields, such as "\\t" or "::". Empty: the most frequent one of
    comma, tab, semicolon and vertical bar in the first line."""
    encoding: str = "utf-8"
    """csv and json: the encoding of the text, such as "latin-1", "cp1252" or "utf-16"."""
    header: bool = True
    """csv: true if the first line holds the names of the columns."""
    columns: tuple[str, ...] = ()
    """csv: names of all columns, in order; they replace the names in the header. Empty: the names
    in the header; without a header, column0, column1, ..."""
    quote: Literal['"', "'", ""] = '"'
    """csv: the character around fields that contain delimiters. Empty: there is none."""
    nulls: tuple[str, ...] = ("",)
    """csv: texts that mean NULL, such as "NA" or "\\\\N"."""
    rename: dict[str, str] = field(default_factory=dict)
    """New names of columns: old = new. Use it to give the keys of several tables the same name."""


@dataclass(frozen=True)
class Samples:
    """How raw tables become labelled samples. Fields that hold SQL use DuckDB's dialect."""

    interactions: str = ""
    """Table with one row for each shown item or each action: path or URL of a file (Parquet, CSV,
    JSON lines), a directory or a glob, relative to paths.raw."""
    users: str = ""
    """Table with one row per user, joined by the user key. Optional."""
    items: str = ""
    """Table with one row per item: the catalogue, joined by the item key. Optional."""
    tables: tuple[TableFormat, ...] = ()
    """Formats of raw tables: delimiter, encoding, header, names of columns."""
    user: str = "user_id"
    """Column of the user key."""
    item: str = "item_id"
    """Column of the item key."""
    time: str = ""
    """Column of the time (number, date or timestamp). Temporal splits, histories and the label join
    need it."""
    time_unit: TimeUnit = "s"
    """Unit of a numeric time."""
    title: str = ""
    """Column of the item table that holds the items' names for display. Optional."""
    label: str = "label"
    """SQL expression that gives 0 or 1 (or a boolean). Retrieval, histories, popularity and the
    metrics of the served score use this label even if there are [[tasks]]."""
    weight: str = ""
    """SQL expression of the sample weight, which must not be negative. Empty: 1."""
    drop: str = ""
    """SQL predicate that selects the rows to drop."""
    derive: dict[str, str] = field(default_factory=dict)
    """New columns: name = SQL expression over the interactions and the joined tables."""
    exposures: Exposures = Exposures()
    """How the interactions are joined with feedback."""
    feedback: tuple[Feedback, ...] = ()
    """Tables of the users' actions after an exposure, to make labels: [[samples.feedback]]
    tables."""
    joins: tuple[Join, ...] = ()
    """Further tables, joined in this order."""
    negatives: Negatives = Negatives()
    """Sampling of negative rows."""
    history: tuple[History, ...] = ()
    """Lists of the items that a user acted on."""
    split: Split = Split()
    """Division into train, validation and test."""
    memory_gb: Annotated[float, Interval(ge=0.5)] = 2.0
    """Memory for making samples (10^9 bytes), whatever the number of rows. Data that does not fit
    moves to temporary files. Tables of users and items, and lists of their keys, need memory in
    addition."""
    temp_dir: str = ""
    """Directory for temporary files, which may take several times the size of the log. Empty:
    beside paths.samples."""


@dataclass(frozen=True)
class Task:
    """One of several labels that one ranker predicts, each by an output layer of its own."""

    name: str
    """Name in reports and at scoring time. The output 'score_NAME' is the task's probability."""
    label: str
    """SQL expression that gives 0 or 1 (or a boolean), or NULL for unknown. A row with NULL does
    not count for this task. Sampled negatives have label 0."""
    weight: PositiveFloat = 1.0
    """Factor of the task's loss, which is the mean over the rows with a known label."""
    share: NonNegativeFloat = 1.0
    """Share in the served score, see model.ranker.combine. With 0, the task is trained, but does
    not influence the score."""

    @property
    def column(self) -> str:
        """Name of the column that holds the task's label in samples and shards."""
        return f"label_{self.name}"

    @property
    def output(self) -> str:
        """Name of the ranker graph's output that holds the task's probability."""
        return f"score_{self.name}"


@dataclass(frozen=True)
class Grow:
    """How features continue those of an earlier preparation (hvdrec prepare --from).

    Known values keep their codes. A new value gets a code when it has occurred min_count times,
    counted over all preparations.
    """

    evict_days: NonNegativeFloat = 0.0
    """Number of days. A value that occurs in no training row of the last evict_days days before the
    newest row loses its code; another value may then get this code. Needs samples.time; numbers are
    seconds, or ms, us or ns since 1970 if they are that large. 0: no value is evicted."""
    statistics: Literal["keep", "follow"] = "keep"
    """Means, deviations and quantiles of numeric features. keep: the values that were learned first
    stay. follow: they are learned again from the new training rows; the embedding rows of quantile
    buckets are kept."""


@dataclass(frozen=True)
class Encode:
    """How shards are written."""

    shard_rows: PositiveInt = 131_072
    """Maximum rows of a shard. The shards of a split differ by at most one row."""
    row_group_rows: PositiveInt = 16_384
    """Maximum rows of a row group, the unit of reading."""


@dataclass(frozen=True)
class Loader:
    """How shards are read."""

    shuffle_rows: PositiveInt = 262_144
    """Rows of the buffer in which a rank shuffles the rows of several row groups."""
    workers: PositiveInt = 2
    """Number of threads with which a rank reads shards."""
    prefetch: PositiveInt = 4
    """Number of batches that a rank prepares ahead of training."""
    cache_dir: str = ""
    """Directory on a local disk of each host in which Petastorm caches row groups for later epochs
    and runs. Useful for remote shards. Only trusted users may write there. Empty: no cache."""
    cache_gb: PositiveFloat = 10.0
    """Size limit of that cache (10^9 bytes), shared by the ranks of a host. The oldest entries are
    evicted first."""
