"""The sections about the label join: exposures, and the feedback on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import MinLen

from hvdrec.config.durations import Duration

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from hvdrec.config.structure import dataclass

TimeUnit = Literal["s", "ms", "us"]


@dataclass(frozen=True)
class Exposures:
    """How the label join treats the interactions. Used with [[samples.feedback]]."""

    key: tuple[str, ...] = ()
    """Columns that identify an exposure. Of several rows with the same values, the earliest counts.
    Empty: the user, the item, the time and the columns `on` of all [[samples.feedback]]."""
    end: str = ""
    """End of the log: every event before this time is in the tables. A number in samples.time_unit,
    or a date and time such as '2024-05-01 00:00' (UTC). Empty: the latest time in any of the
    tables, or the end of the previous run if that is later."""
    lateness: Duration = "0s"
    """How long after its time an event may still be missing from the log. An exposure is settled
    once its longest window and then this duration have passed."""
    unsettled: str = ""
    """Samples of the previous run, such as 'runs/monday/samples'. Its unsettled exposures are added
    to this run. Exposures that the previous run settled are skipped. Empty: none."""


@dataclass(frozen=True)
class Feedback:
    """What users did after an exposure. It adds NAME_count, NAME_delay and NAME_value."""

    name: str
    """Name of the action, such as 'click': letters, digits and underscores."""
    table: str
    """Table with a row for each action: a path or URL, as in samples.interactions."""
    on: Annotated[tuple[str, ...], MinLen(1)]
    """Columns that must be equal in both tables, such as request and item. 'item_id = asset' joins
    the exposures' column item_id to the column (or SQL expression) asset of the feedback."""
    window: Duration
    """Label window: feedback counts if it happens at most this long after the exposure."""
    time: str = ""
    """Column (or SQL expression) of the time of the feedback. Empty: samples.time."""
    time_unit: Literal["", "s", "ms", "us"] = ""
    """Unit of a numeric time. Empty: samples.time_unit."""
    where: str = ""
    """SQL predicate over this table that selects the feedback. Empty: all rows."""
    value: str = ""
    """SQL expression over this table. Its sum over the window becomes NAME_value, exact to 1e-6."""
    key: tuple[str, ...] = ()
    """Columns that identify a feedback, such as an event id. Of several rows with the same values,
    the earliest counts. Empty: the columns `on`, the time and the value."""
    skew: Duration = "0s"
    """Tolerance for clocks that differ: feedback counts if it is at most this much earlier than its
    exposure. Its delay is then 0."""
    touch: Literal["last", "first", "every"] = "last"
    """If feedback falls into the windows of several exposures, it counts for the last one before
    it, for the first one, or for every one."""

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """For each entry of `on`: the exposures' column, and the column or SQL of the feedback."""
        parts = [entry.partition("=") for entry in self.on]
        return tuple((left.strip(), (right or left).strip()) for left, _, right in parts)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that this feedback adds to the exposures."""
        names = (f"{self.name}_count", f"{self.name}_delay", f"{self.name}_value")
        return names if self.value else names[:2]
