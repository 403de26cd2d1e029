"""The label join: count the feedback on each exposure, as Ibis expressions for any engine.

All times are microseconds (`clock`). A feedback is in the window of an exposure with equal keys if
``-skew <= time of the feedback - time of the exposure <= window``. An exposure is *settled* if its
longest window ended before the end of the log, and *unsettled* otherwise.

The relations have these internal columns:

- exposures: the columns of the table, and CLOCK, the time of the exposure;
- feedback: ON + "0", "1", ... (the keys), KEY + "0", ... (the identity), TIME and VALUE (float64);
- matches: the columns of the feedback, SHOWN + "0", ... (the identity of the exposure), SHOWN_AT
  (its time), DELAY (not negative) and SETTLED.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ibis
from ibis.expr.types import BooleanValue, Table

from hvdrec.config.durations import UNITS, microseconds
from hvdrec.config.label_join import Feedback
from hvdrec.samples.clock import comparable
from hvdrec.samples.engine import INTERNAL

CLOCK = f"{INTERNAL}clock"
ON, KEY, SHOWN = f"{INTERNAL}on", f"{INTERNAL}key", f"{INTERNAL}shown"
TIME, VALUE = f"{INTERNAL}time", f"{INTERNAL}value"
SHOWN_AT = f"{INTERNAL}shown_at"
DELAY, SETTLED = f"{INTERNAL}delay", f"{INTERNAL}settled"
_RANK, _ROWS = f"{INTERNAL}rank", f"{INTERNAL}count"
_FIRST = f"{INTERNAL}first"
SECOND = float(UNITS["s"])


class Runs(Protocol):
    """The methods of an engine that the label join needs."""

    def materialize(self, table: Table) -> Table:
        """Compute a table, store the result and return it as a table."""
        ...

    def first(self, table: Table) -> dict[str, object] | None:
        """Return the first row of a table, or None if it is empty."""
        ...


@dataclass(frozen=True)
class FeedbackCounts:
    """What became of the rows of a feedback table. The numbers add up to `rows`.

    Attributes:
        rows: Rows that samples.feedback.where selects, plus the rows that the previous run kept.
        incomplete: Rows without a key or a time.
        duplicates: Rows that repeat another one.
        matched: Feedback that counts for an exposure.
        early: Feedback that precedes all exposures with its keys by more than the skew.
        late: Feedback after the windows of the exposures with its keys.
        unknown: Feedback whose keys no exposure has.
        waiting: Feedback that has no exposure so far, and is kept for the next run.
    """

    rows: int
    incomplete: int
    duplicates: int
    matched: int
    early: int
    late: int
    unknown: int
    waiting: int


@dataclass(frozen=True)
class UniqueExposures:
    """The exposures of a log, with and without the rows that repeat others.

    Attributes:
        all: All rows.
        repeated: The rows that repeat others; None if there are none.
        unique: All rows without the repeated ones.
    """

    all: Table
    repeated: Table | None
    unique: Table


def unique_exposures(engine: Runs, exposures: Table, key: Sequence[str]) -> UniqueExposures:
    """Keep one exposure per value of the columns `key`: the earliest.

    If several are equally early, their other columns decide, so the result does not depend on the
    order of rows.
    """
    counted = exposures.group_by(*key).aggregate(**{_ROWS: exposures.count()})
    several = engine.materialize(counted.filter(counted[_ROWS] > 1).drop(_ROWS))
    if engine.first(several) is None:
        return UniqueExposures(exposures, None, exposures)
    # Only rows that share a key with another row are sorted and stored: usually there are few.
    same = exposures.semi_join(several, _same(exposures, several, key, key))
    ranked = engine.materialize(_ranked(same, key, CLOCK))
    earliest = ranked.filter(ranked[_RANK] == 0).drop(_RANK)
    repeated = ranked.filter(ranked[_RANK] > 0).drop(_RANK)
    others = exposures.anti_join(several, _same(exposures, several, key, key))
    return UniqueExposures(exposures, repeated, ibis.union(others, earliest))


def complete_feedback(feedback: Table, keys: int) -> Table:
    """Return the feedback that has all its keys and a time."""
    return feedback.filter(*(feedback[column].notnull() for column in (*numbered(ON, keys), TIME)))


def unique_feedback(feedback: Table, key_columns: int) -> Table:
    """Keep one feedback per identity: the earliest row among rows with equal KEY columns.

    Without KEY columns, the identity consists of all columns.
    """
    if not key_columns:
        return feedback.distinct()
    return _earliest(feedback, numbered(KEY, key_columns), TIME)


def match(
    exposures: Table, key: Sequence[str], feedback: Table, options: Feedback, settled_from: int
) -> Table:
    """Find the exposures for which feedback counts.

    Args:
        exposures: The exposures. Several rows of one identity count as one if they have the same
            time and keys.
        key: The columns that identify an exposure.
        feedback: Unique feedback.
        options: Keys, window, skew and touch.
        settled_from: Exposures before this time, in microseconds, are settled.

    Returns:
        The matches. With touch = "every", a feedback may match several exposures.
    """
    window, skew = microseconds(options.window), microseconds(options.skew)
    left = [exposures[column] for column, _ in options.pairs]
    keys = [comparable(a, feedback[f"{ON}{i}"]) for i, a in enumerate(left)]
    shown = exposures.select(
        **{SHOWN_AT: exposures[CLOCK]},
        **{f"{INTERNAL}join{i}": pair[0] for i, pair in enumerate(keys) if pair},
        **{f"{SHOWN}{i}": exposures[column] for i, column in enumerate(key)},
    )
    on = [shown[f"{INTERNAL}join{i}"] == pair[1] for i, pair in enumerate(keys) if pair]
    pairs = shown.inner_join(feedback, on)
    gap = pairs[TIME] - pairs[SHOWN_AT]
    pairs = pairs.mutate(**{DELAY: gap}).filter((gap >= -skew) & (gap <= window))
    if options.touch == "every":
        pairs = pairs.distinct()
    else:
        pairs = _touched(pairs, feedback.columns, numbered(SHOWN, len(key)), options.touch)
    delay = ibis.greatest(pairs[DELAY], 0)
    pairs = pairs.mutate(**{DELAY: delay, SETTLED: pairs[SHOWN_AT] < settled_from})
    columns = [*feedback.columns, *numbered(SHOWN, len(key)), SHOWN_AT, DELAY, SETTLED]
    return pairs.select(*columns)


def add_labels(
    exposures: Table, key: Sequence[str], matches: Sequence[tuple[Feedback, Table]]
) -> Table:
    """Add the columns NAME_count, NAME_delay (seconds) and NAME_value to exposures."""
    table = exposures
    shown = numbered(SHOWN, len(key))
    for options, matched in matches:
        sums: dict[str, Any] = {options.columns[0]: matched.count()}
        sums[options.columns[1]] = matched[DELAY].min().cast("float64") / SECOND
        if options.value:
            # A sum of decimals does not depend on the order of rows; a sum of floats does.
            sums[options.columns[2]] = matched[VALUE].cast("decimal(38, 6)").sum().cast("float64")
        totals = matched.group_by(*shown).aggregate(**sums)
        table = table.left_join(totals, _same(table, totals, key, shown)).drop(*shown)
        zeros = {options.columns[0]: table[options.columns[0]].cast("int64").fill_null(0)}
        if options.value:
            zeros[options.columns[2]] = table[options.columns[2]].fill_null(0.0)
        table = table.mutate(**zeros)
    return table


def unmatched(feedback: Table, matches: Table) -> Table:
    """Return the feedback that counts for no exposure."""
    return feedback.anti_join(matches, _same(feedback, matches, feedback.columns, feedback.columns))


def unmatched_reasons(exposures: Table, rest: Table, options: Feedback, end: int) -> Table:
    """Count unmatched feedback by reason: one row with waiting, early, late and unknown.

    Args:
        exposures: The exposures, including repeated ones.
        rest: The unmatched feedback.
        options: Keys and skew.
        end: End of the log, in microseconds.
    """
    skew = microseconds(options.skew)
    names = numbered(ON, len(options.pairs))
    keys = {
        name: (comparable(exposures[column], rest[name]) or (exposures[column],))[0]
        for name, (column, _) in zip(names, options.pairs, strict=True)
    }
    shown = exposures.select(**keys, **{CLOCK: exposures[CLOCK]})
    known = shown.semi_join(rest, [shown[name] == rest[name] for name in names])
    first = known.group_by(*names).aggregate(**{_FIRST: known[CLOCK].min()})
    first = first.rename({f"{name}k": name for name in names})
    all_rest = rest.left_join(first, [rest[name] == first[f"{name}k"] for name in names])
    waits = waiting(all_rest, options, end)
    unknown = all_rest[_FIRST].isnull()
    early = all_rest[TIME] < all_rest[_FIRST] - skew
    return all_rest.aggregate(
        waiting=waits.sum().fill_null(0),
        unknown=(~waits & unknown).sum().fill_null(0),
        early=(~waits & ~unknown & early).sum().fill_null(0),
        late=(~waits & ~unknown & ~early).sum().fill_null(0),
    )


def waiting(feedback: Table, options: Feedback, end: int) -> BooleanValue:
    """Return a condition: the exposure of a feedback may come after the end of the log.

    The skew allows feedback to precede its exposure.
    """
    return feedback[TIME] >= end - microseconds(options.skew)


def carried_feedback(feedback: Table, matches: Table, options: Feedback, end: int) -> Table:
    """Return the feedback that the next run needs.

    This is the feedback on unsettled exposures, and feedback whose exposure may still come.
    """
    columns = feedback.columns
    on_unsettled = matches.filter(~matches[SETTLED]).select(*columns)
    free = feedback if options.touch == "every" else unmatched(feedback, matches)
    return ibis.union(on_unsettled, free.filter(waiting(free, options, end)), distinct=True)


def count_rows(engine: Runs, table: Table) -> int:
    """Return the number of rows."""
    row: Mapping[str, Any] = engine.first(table.aggregate(rows=table.count())) or {}
    return int(row.get("rows", 0))


def numbered(name: str, count: int) -> list[str]:
    """Return the names of numbered columns: name + "0", "1", ..."""
    return [f"{name}{i}" for i in range(count)]


def _touched(
    pairs: Table, feedback_columns: Sequence[str], shown: Sequence[str], touch: str
) -> Table:
    """Keep one exposure per feedback: the last or the first before the feedback, as `touch` says.

    If no exposure comes before the feedback, keep the next exposure after it.
    """
    before = ibis.ifelse(pairs[DELAY] >= 0, 0, 1)
    near = pairs[DELAY].abs() if touch == "last" else pairs[SHOWN_AT]
    order = [before, near, *(ibis.asc(pairs[name], nulls_first=False) for name in shown)]
    rank = ibis.row_number().over(group_by=list(feedback_columns), order_by=order)
    ranked = pairs.mutate(**{_RANK: rank})
    return ranked.filter(ranked[_RANK] == 0).drop(_RANK)


def _earliest(table: Table, key: Sequence[str], time: str) -> Table:
    """Keep one row per key: the earliest; among equally early rows, the other columns decide."""
    ranked = _ranked(table, key, time)
    return ranked.filter(ranked[_RANK] == 0).drop(_RANK)


def _ranked(table: Table, key: Sequence[str], time: str) -> Table:
    """Number the rows of each key from 0, by time and then by the other columns."""
    columns = [time, *(name for name in table.columns if name != time)]
    order = [ibis.asc(table[name], nulls_first=False) for name in columns]
    return table.mutate(**{_RANK: ibis.row_number().over(group_by=list(key), order_by=order)})


def _same(
    left: Table, right: Table, left_names: Sequence[str], right_names: Sequence[str]
) -> list[BooleanValue]:
    """Return the conditions that columns are equal; null equals null."""
    names = zip(left_names, right_names, strict=True)
    return [left[a].identical_to(right[b]) for a, b in names]
