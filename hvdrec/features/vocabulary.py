"""Vocabularies that grow: new values get codes, known values keep theirs, old ones are evicted.

Each preparation that goes on from an earlier one is a *generation*; the first has number 0. A
vocabulary records, for each code, the generation in which it last got another value. Training that
goes on from a run of an earlier generation keeps the embedding rows of the codes that have kept
their values since then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Array = NDArray[Any]
VALUE, COUNT, DAY = "value", "count", "day"


@dataclass(frozen=True)
class Growth:
    """The rules by which features go on from the generation before.

    Attributes:
        generation: Number of the new generation, from 1.
        counted: Day of the newest row that was counted before, in days since 1970; later rows are
            counted now. None if the samples have no times: then all rows are counted.
        now: Day of the newest row so far; None without times.
        evict_days: A value that was last seen more than this number of days before `now` is
            evicted; 0 to keep all values.
        follows: True to learn means, deviations and quantiles again; False to keep them.
    """

    generation: int
    counted: float | None = None
    now: float | None = None
    evict_days: float = 0.0
    follows: bool = False

    @property
    def limit(self) -> float:
        """Values that were last seen before this day are evicted; -inf to keep all."""
        if not self.evict_days or self.now is None:
            return -np.inf
        return self.now - self.evict_days


@dataclass(frozen=True)
class Vocabulary:
    """The values of n codes, and the data from which later generations go on.

    Attributes:
        values: Value of each code from FIRST_CODE on; None for a code that is free.
        since: Generation in which each code got its value, or became free, int32 [n].
        day: Day on which each value was last seen, float64 [n]; NaN if unknown.
        waiting: Values that are too rare so far: columns ``value``, ``count`` and ``day``. None if
            they were not read.
        evicted: Number of values that lost their codes in this generation.
    """

    values: Sequence[Any]
    since: Array
    day: Array
    waiting: pa.Table | None = field(default=None, compare=False)
    evicted: int = 0

    @property
    def free(self) -> int:
        """Number of codes without a value."""
        return sum(value is None for value in self.values)

    def admitted(self, generation: int) -> int:
        """Return the number of values that got a code in a generation."""
        changed = np.flatnonzero(self.since == generation).tolist()
        return sum(self.values[index] is not None for index in changed)


def first_vocabulary(seen: pa.Table, min_count: int) -> Vocabulary:
    """Give codes to the values that occur at least `min_count` times.

    Args:
        seen: Each distinct value with its ``count`` and ``day``, in the order of the codes.
        min_count: Number of occurrences from which a value has a code.
    """
    frequent = seen[COUNT].to_numpy() >= min_count
    kept, others = seen.filter(pa.array(frequent)), seen.filter(pa.array(~frequent))
    values = kept[VALUE].to_pylist()
    return Vocabulary(values, np.zeros(len(values), np.int32), _days(kept), others)


def grown_vocabulary(
    before: Vocabulary, seen: pa.Table, min_count: int, growth: Growth
) -> Vocabulary:
    """Let a vocabulary go on with newly counted values.

    Known values keep their codes, but values that were last seen too long ago lose theirs. A new
    value gets a code once the number of its occurrences in all generations is at least
    `min_count`. It gets the lowest free code or, if none is free, the next code after the last.
    More frequent values get their codes first.

    Args:
        before: The vocabulary of the generation before.
        seen: Each distinct value of the new rows, with its ``count`` and ``day``.
        min_count: Number of occurrences from which a value gets a code.
        growth: The new generation.
    """
    values, since = list(before.values), before.since.copy()
    day = before.day.copy()
    if growth.now is not None:  # the samples of the generation before may have had no times
        day[np.isnan(day)] = growth.now
    codes = {value: index for index, value in enumerate(values) if value is not None}
    waiting = _waiting(before.waiting)
    columns = (seen[name].to_pylist() for name in (VALUE, COUNT, DAY))
    for value, count, last in zip(*columns, strict=True):
        seen_on = np.nan if last is None else last
        index = codes.get(value)
        if index is not None:
            day[index] = np.fmax(day[index], seen_on)
        elif count:
            total, earlier = waiting.get(value, (0, np.nan))
            waiting[value] = total + count, float(np.fmax(earlier, seen_on))
    expired = [index for index in sorted(codes.values()) if day[index] < growth.limit]
    for index in expired:
        values[index], since[index], day[index] = None, growth.generation, np.nan
    admitted = [value for value, (count, _) in waiting.items() if count >= min_count]
    admitted.sort(key=lambda value: (-waiting[value][0], _sort_key(value)))
    free = [index for index, value in enumerate(values) if value is None]
    added = len(admitted) - len(free)
    if added > 0:
        free += range(len(values), len(values) + added)
        values += [None] * added
        since = np.concatenate([since, np.full(added, growth.generation, np.int32)])
        day = np.concatenate([day, np.full(added, np.nan)])
    for value, index in zip(admitted, free, strict=False):
        values[index], since[index] = value, growth.generation
        day[index] = waiting.pop(value)[1]
    left = {value: facts for value, facts in waiting.items() if not facts[1] < growth.limit}
    table = pa.table(
        {
            VALUE: pa.array(left, seen[VALUE].type),
            COUNT: pa.array([count for count, _ in left.values()], pa.int64()),
            DAY: pa.array([last for _, last in left.values()], pa.float64()),
        }
    )
    return Vocabulary(values, since, day, table, len(expired))


def _waiting(table: pa.Table | None) -> dict[Any, tuple[int, float]]:
    if table is None:
        return {}
    facts = zip(table[COUNT].to_pylist(), _days(table).tolist(), strict=True)
    return dict(zip(table[VALUE].to_pylist(), facts, strict=True))


def _days(table: pa.Table) -> Array:
    """Return the column of days, float64 [n], with NaN for null."""
    days: Array = table[DAY].to_numpy(zero_copy_only=False)
    return np.array(days, np.float64)


def _sort_key(value: Any) -> Any:
    return value.encode() if isinstance(value, str) else value
