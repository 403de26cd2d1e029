"""Join exposures with their feedback, count the results, and keep unsettled rows for later runs."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ibis.expr.types import BooleanValue, Table

from hvdrec.config.durations import microseconds
from hvdrec.config.label_join import Feedback
from hvdrec.errors import UserError, invalid_value
from hvdrec.samples.engine import INTERNAL, Engine
from hvdrec.samples.feedback import (
    CLOCK,
    ON,
    TIME,
    FeedbackCounts,
    UniqueExposures,
    add_labels,
    carried_feedback,
    complete_feedback,
    count_rows,
    match,
    numbered,
    unique_exposures,
    unique_feedback,
    unmatched,
    unmatched_reasons,
)
from hvdrec.samples.label_tables import LabelTables, RawFeedback, feedback_file
from hvdrec.samples.spec import SampleSpec


@dataclass(frozen=True)
class LabelledExposures:
    """The result of the label join.

    Attributes:
        table: The settled exposures, with the columns of each feedback.
        unsettled: The unsettled exposures, without these columns.
        carried: Name of a feedback -> the rows of its table that the next run needs.
        facts: Counts and times for the manifest.
    """

    table: Table
    unsettled: Table
    carried: Mapping[str, Table]
    facts: Mapping[str, Any]

    def save(
        self, engine: Engine, folder: Path, notify: Callable[[str], None] = lambda line: None
    ) -> None:
        """Write the unsettled exposures and the carried feedback to a new folder.

        `notify` is called with a line for each table.
        """
        for line in self._lines():
            notify(line)
        folder.mkdir()
        engine.save(self.unsettled, folder / "exposures.parquet")
        for name, table in self.carried.items():
            engine.save(_stored(table), folder / f"{feedback_file(name)}.parquet")

    def _lines(self) -> list[str]:
        """Describe what became of exposures and feedback, a line for each table."""
        counts = self.facts["exposures"]
        lines = [
            f"exposures: {counts['settled']} settled, {counts['unsettled']} unsettled (kept for "
            f"the next run), {counts['duplicates']} duplicates, {counts['skipped']} settled before"
        ]
        for name, of in self.facts["feedback"].items():
            others = ", ".join(
                f"{n} {reason}" for reason, n in of.items() if n and reason != "rows"
            )
            lines.append(f"{name}: {of['rows']} rows: {others or 'none'}")
        return lines


def join_feedback(
    engine: Engine,
    spec: SampleSpec,
    tables: LabelTables,
    notify: Callable[[str], None] = lambda line: None,
) -> LabelledExposures:
    """Join exposures with their feedback; see `feedback` for the definitions.

    Args:
        engine: Runs the queries.
        spec: Definition of the samples.
        tables: Exposures and feedback.
        notify: Called with a line about each step.

    Raises:
        UserError: No exposure is settled.
    """
    samples, key = spec.samples, exposure_key(spec)
    complete = tables.end - microseconds(samples.exposures.lateness)
    settled_from = complete - max(microseconds(each.window) for each in samples.feedback)
    exposures, before = tables.exposures, tables.settled_before
    remaining = tables.rows
    if before is not None:
        exposures = exposures.filter((exposures[CLOCK] >= before).fill_null(True))
        remaining = count_rows(engine, exposures)
    unique = unique_exposures(engine, exposures, key)
    exposures = matchable(spec, unique)
    matches, counts, carried = [], {}, {}
    for options, table in zip(samples.feedback, tables.feedback, strict=True):
        notify(f"joining {options.name} with the exposures")
        whole = complete_feedback(table.rows, len(options.on))
        distinct = engine.materialize(unique_feedback(whole, len(options.key)))
        matched = engine.materialize(match(exposures, key, distinct, options, settled_from))
        found = _count(engine, exposures, options, (table, distinct, matched), complete)
        if not found.matched:
            engine.warnings.append(f"samples.feedback '{options.name}': no row has an exposure")
        matches.append((options, matched))
        counts[options.name] = asdict(found)
        carried[options.name] = carried_feedback(distinct, matched, options, complete)
    done, kept = _count_settled(engine, unique, settled_from)
    if not done:
        raise _nothing_settled(spec, kept)
    facts = {
        "end": tables.end,
        "settled_before": settled_from if before is None else max(settled_from, before),
        "exposures": {
            "rows": tables.rows,
            "skipped": tables.rows - remaining,
            "duplicates": remaining - kept - done,
            "settled": done,
            "unsettled": kept,
        },
        "feedback": counts,
    }
    is_settled = _is_settled(unique.unique, settled_from)
    labelled = add_labels(unique.unique.filter(is_settled), key, matches).drop(CLOCK)
    unsettled = unique.unique.filter(~is_settled).drop(CLOCK)
    return LabelledExposures(labelled, unsettled, carried, facts)


def exposure_key(spec: SampleSpec) -> list[str]:
    """Return the columns that identify an exposure; CLOCK stands for the time."""
    samples = spec.samples
    on = [column for options in samples.feedback for column, _ in options.pairs]
    names = samples.exposures.key or (samples.user, samples.item, samples.time, *on)
    return list(dict.fromkeys(CLOCK if name == samples.time else name for name in names))


def matchable(spec: SampleSpec, exposures: UniqueExposures) -> Table:
    """Return the exposures to match with feedback: the cheapest table that gives correct matches.

    By default, repeated rows have the same time and keys, so they give the same matches.
    """
    return exposures.unique if spec.samples.exposures.key else exposures.all


def _is_settled(exposures: Table, settled_from: int) -> BooleanValue:
    # An exposure without a time counts as settled, so that it becomes a row of the samples: their
    # checks refuse it with an error that names the remedy.
    return (exposures[CLOCK] < settled_from).fill_null(True)


def _count_settled(
    engine: Engine, exposures: UniqueExposures, settled_from: int
) -> tuple[int, int]:
    """Return the numbers of settled and of unsettled exposures."""

    def counts(table: Table) -> tuple[int, int]:
        settled = _is_settled(table, settled_from).sum()
        row: Mapping[str, Any] = (
            engine.first(table.aggregate(rows=table.count(), settled=settled)) or {}
        )
        done = int(row["settled"] or 0)
        return done, int(row["rows"]) - done

    # Subtract the repeated rows instead of counting `unique`: this reads only the column of times.
    all_, repeated = counts(exposures.all), (0, 0)
    if exposures.repeated is not None:
        repeated = counts(exposures.repeated)
    return all_[0] - repeated[0], all_[1] - repeated[1]


def _count(
    engine: Engine,
    exposures: Table,
    options: Feedback,
    tables: tuple[RawFeedback, Table, Table],
    complete: int,
) -> FeedbackCounts:
    """Count what became of the rows of a feedback table.

    Args:
        engine: Runs the queries.
        exposures: Unique exposures.
        options: The feedback.
        tables: Its rows, its unique complete rows, and its matches.
        complete: End of the log minus the lateness, in microseconds.
    """
    raw, unique, matched = tables
    missing = [raw.rows[column].isnull() for column in (*numbered(ON, len(options.on)), TIME)]
    incomplete = functools.reduce(operator.or_, missing).sum()
    different = count_rows(engine, unique)
    row: Mapping[str, Any] = engine.first(raw.rows.aggregate(incomplete=incomplete)) or {}
    without = int(row["incomplete"] or 0)
    rest = engine.materialize(unmatched(unique, matched))
    why: Mapping[str, Any] = (
        engine.first(unmatched_reasons(exposures, rest, options, complete)) or {}
    )
    reasons = {name: int(number) for name, number in why.items()}
    return FeedbackCounts(
        rows=raw.total,
        incomplete=without,
        duplicates=raw.total - without - different,
        matched=different - sum(reasons.values()),
        **reasons,
    )


def _nothing_settled(spec: SampleSpec, rows: int) -> UserError:
    field = "samples.exposures.end" if spec.samples.exposures.end else "samples.feedback"
    longest = max(spec.samples.feedback, key=lambda each: microseconds(each.window))
    problem = f"the window of '{longest.name}' has not passed for any of {rows} exposures"
    remedy = "use a log that goes on for longer than the window, or a shorter window"
    return invalid_value(field, spec.samples.exposures.end or longest.window, problem, remedy)


def _stored(table: Table) -> Table:
    """Rename internal columns, because files must not have any."""
    return table.rename({name.removeprefix(INTERNAL): name for name in table.columns})
