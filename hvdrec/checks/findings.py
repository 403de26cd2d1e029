"""What `check` returns: facts about columns and days, and findings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hvdrec.config.checks_section import CheckName

Status = Literal["warning", "stop"]


@dataclass(frozen=True)
class Finding:
    """A measured value that is beyond its limit.

    Attributes:
        check: Name of the check.
        what: Column, table or day that the value belongs to.
        split: Split of the rows; "" if the value does not belong to a split.
        value: The measured value.
        limit: The limit of ``[checks]``.
        text: One sentence.
        status: "stop" if ``checks.stop`` names the check, otherwise "warning".
    """

    check: CheckName
    what: str
    split: str
    value: float
    limit: float
    text: str
    status: Status = "warning"


@dataclass(frozen=True)
class ColumnFacts:
    """A raw column of a feature, a key or a label.

    Attributes:
        name: Name of the column.
        side: "user", "item", "scene" or "label".
        nulls: Split -> share of missing values.
        distinct: Number of different values (entries of lists) in train, approximate.
        low: Smallest number in train; None if the column does not hold numbers.
        high: Largest number in train.
        unseen: Split -> share of rows whose value is not in train; empty for numbers and lists.
        drift: PSI against the other run; None without one.
    """

    name: str
    side: str
    nulls: Mapping[str, float]
    distinct: int
    low: float | None = None
    high: float | None = None
    unseen: Mapping[str, float] | None = None
    drift: float | None = None


@dataclass(frozen=True)
class PeriodFacts:
    """Rows and label rate of a day; of a tenth of the time span if times have no known unit."""

    period: str
    rows: int
    label_rate: float


@dataclass(frozen=True)
class CheckResult:
    """The result of `check`.

    Attributes:
        samples: Directory of the samples.
        against: Directory of the other samples; "" if there are none.
        rows: Split -> number of rows.
        label_rate: Split -> mean label.
        columns: Facts about each column.
        periods: Facts about each day.
        findings: The values beyond a limit, in the order of the checks.
    """

    samples: str
    against: str
    rows: Mapping[str, int]
    label_rate: Mapping[str, float]
    columns: tuple[ColumnFacts, ...]
    periods: tuple[PeriodFacts, ...]
    findings: tuple[Finding, ...]

    @property
    def is_stopped(self) -> bool:
        """True if a finding stops the run."""
        return any(finding.status == "stop" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return {**asdict(self), "is_stopped": self.is_stopped}
