"""The section ``[checks]``: limits of the checks that ``hvdrec check`` makes on samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Interval
from pydantic import PositiveFloat

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from hvdrec.config.structure import dataclass

CheckName = Literal[
    "nulls",
    "ranges",
    "cardinality",
    "labels",
    "unseen",
    "duplicates",
    "matches",
    "leakage",
    "drift",
    "scene",
]
Share = Annotated[float, Interval(ge=0, le=1)]


@dataclass(frozen=True)
class Checks:
    """Limits of `hvdrec check`. A value beyond its limit causes a warning or stops the run."""

    stop: tuple[CheckName, ...] = ()
    """Checks whose findings stop the run: `hvdrec check` then ends with exit status 1. Findings of
    all other checks only warn."""
    nulls: Share = 0.5
    """Largest share of missing values of a feature in a split (NULL, empty text, empty list)."""
    ranges: Share = 0.01
    """Largest share of the numbers of validation or test outside the range of train."""
    cardinality: Share = 0.9
    """Largest number of different values of a categorical feature, as a share of the training rows.
    Keys are exempt. A feature with a single value is always a finding."""
    labels: PositiveFloat = 3.0
    """Largest factor between the label rate of a day and the median over days. Differences that
    chance explains are exempt. A split with labels of one class is always a finding."""
    unseen: Share = 0.5
    """Largest share of the rows of validation or test whose user, item or categorical value is not
    in train."""
    duplicates: Share = 0.01
    """Largest share of rows that repeat another row of their split."""
    matches: Share = 0.5
    """Smallest share of rows that match a row of samples.users or samples.items. A table of
    samples.joins without any match is always a finding."""
    leakage: Share = 0.0
    """Largest share of validation or test rows that are also in an earlier split, of training rows
    that are later than validation or test rows (temporal split), and of histories that contain
    items later than their row."""
    drift: PositiveFloat = 0.2
    """Largest population stability index (PSI) of a feature or label against another run; 0.1 is
    often called a small shift, 0.25 a large one."""
