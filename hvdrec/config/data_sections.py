"""The sections about data: one dataclass per TOML table, with allowed values and defaults."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, overload

from annotated_types import Interval
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from hvdrec.storage.urls import Location, as_location

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from hvdrec.config.structure import dataclass

Fraction = Annotated[float, Interval(ge=0, lt=1)]


@dataclass(frozen=True)
class Paths:
    """Directories of a run, relative to the current directory.

    features and bundle may be URLs of a store that fsspec knows: s3://bucket/features.
    """

    raw: str = "data"
    """Directory of the raw tables."""
    work: str = "runs/default"
    """Directory in which the stages write samples/, features/, run/ and bundle/."""
    samples: str = ""
    """Labelled samples (default WORK/samples)."""
    features: str = ""
    """Fitted graph and encoded shards (default WORK/features)."""
    run: str = ""
    """Checkpoints and logs of training (default WORK/run)."""
    bundle: str = ""
    """The bundle to serve (default WORK/bundle)."""

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
    """temporal: train strictly before validation strictly before test. random: over all rows.
    random-per-user: over the rows of each user. leave-last-out: the last row of each user is test,
    the one before it validation."""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Fractions of train, validation and test. leave-last-out and boundaries ignore them."""
    column: str = ""
    """temporal: the column that orders rows. Empty: samples.time."""
    boundaries: tuple[float, ...] = ()
    """temporal: the last value of train and of validation in that column. Empty: use fractions."""
    seed: int = 0
    """Seed of the random methods."""


@dataclass(frozen=True)
class History:
    """A sequence feature built from the other events of the user."""

    name: str
    """Name of the column. A feature of kind 'sequence' reads it."""
    where: str = ""
    """SQL predicate that selects the interactions. Empty: those with label 1."""
    length: PositiveInt = 50
    """Maximum length. The events nearest in time are kept."""
    scope: Literal["before", "others"] = "before"
    """before: events strictly before the sample. others: all other training rows of the user,
    before and after the sample; allowed only with a random split."""
    column: str = ""
    """The feature that the list holds, such as the item's category. Empty: the item key. The
    sequence feature must set `shares` to the same feature, to use its vocabulary and table."""
    repeats: bool = True
    """Whether repeated items (or values of `column`) are kept. false: only the latest occurrence is
    kept, which leaves room for more distinct items."""


@dataclass(frozen=True)
class Negatives:
    """Sampled negatives, for logs that record only positive actions."""

    per_positive: NonNegativeInt = 0
    """Number of negatives per positive row."""
    within: tuple[str, ...] = ()
    """Columns whose values a negative copies from its positive. Candidates are the items that occur
    with the same values and that the user did not choose with them."""
    seed: int = 0
    """Seed of the sampling."""


@dataclass(frozen=True)
class Join:
    """A further table whose columns are joined to the samples and the sampled negatives."""

    table: str
    """CSV or Parquet file, relative to paths.raw."""
    on: tuple[str, ...]
    """Columns to join on. A sample without a matching row gets nulls."""


@dataclass(frozen=True)
class Samples:
    """How raw tables become labelled samples. SQL is DuckDB's."""

    interactions: str = ""
    """Table of exposures or actions (CSV or Parquet, globs allowed), relative to paths.raw."""
    users: str = ""
    """Table with one row per user, joined by the user key. Optional."""
    items: str = ""
    """Table with one row per item: the catalogue, joined by the item key. Optional."""
    user: str = "user_id"
    """Column of the user key."""
    item: str = "item_id"
    """Column of the item key."""
    time: str = ""
    """Column of the time (number, date or timestamp). Temporal splits and histories need it."""
    title: str = ""
    """Column of the item table with a name for display. Optional."""
    label: str = "label"
    """SQL expression that gives 0 or 1 (or a boolean). With [[tasks]] it stays the main label: the
    one of retrieval, histories, popularity and the metrics of the served score."""
    weight: str = ""
    """SQL expression of the sample weight, which must not be negative. Empty: 1."""
    drop: str = ""
    """SQL predicate of rows to drop."""
    derive: dict[str, str] = field(default_factory=dict)
    """New columns: name = SQL expression over the interactions and the joined tables."""
    joins: tuple[Join, ...] = ()
    """Further tables, joined in this order."""
    negatives: Negatives = Negatives()
    """Sampled negatives."""
    history: tuple[History, ...] = ()
    """Sequences of the user's other events."""
    split: Split = Split()
    """Train, validation and test."""


@dataclass(frozen=True)
class Task:
    """One of several labels that one ranker predicts, with a head of its own."""

    name: str
    """Name in reports and at scoring time. The output 'score_NAME' holds its probability."""
    label: str
    """SQL expression that gives 0 or 1 (or a boolean), or NULL for unknown: such a row does not
    count for this task. Sampled negatives are 0."""
    weight: PositiveFloat = 1.0
    """Factor of the task's loss, which is the mean over the rows with a known label."""
    share: NonNegativeFloat = 1.0
    """Share in the served score, see model.ranker.combine. 0: the task is trained, not served."""

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

    shard_rows: PositiveInt = 131_072
    """Maximum rows of a shard. The shards of a split differ by at most one row."""
    row_group_rows: PositiveInt = 16_384
    """Maximum rows of a row group, the unit of reading."""


@dataclass(frozen=True)
class Loader:
    """How shards are read."""

    shuffle_rows: PositiveInt = 262_144
    """Rows of the shuffle buffer of a rank. It mixes several row groups."""
    workers: PositiveInt = 2
    """Reading threads of a rank."""
    prefetch: PositiveInt = 4
    """Batches prepared ahead."""
    cache_dir: str = ""
    """Directory on a local disk of each host in which Petastorm caches row groups for later epochs
    and runs. Useful for remote shards. Only trusted users may write there. Empty: no cache."""
    cache_gb: PositiveFloat = 10.0
    """Size limit of that cache (10^9 bytes), shared by the ranks of a host. The oldest entries are
    evicted first."""
