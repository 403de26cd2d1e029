"""Decide the split, the order and the histories of each row, in one pass over the sorted rows.

The result is a table with a row for each of the sorted rows, in the same order.
"""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvdrec.config.data_sections import History
from hvdrec.config.durations import UNITS, microseconds
from hvdrec.samples.columns import plain
from hvdrec.samples.engine import INTERNAL
from hvdrec.samples.history import EventFile, Events, Positions, first_since
from hvdrec.samples.join import event
from hvdrec.samples.rows import SortedRows, time_values
from hvdrec.samples.split import (
    PAST,
    RANDOM,
    SPLITS,
    STATES,
    Splitter,
    empty_split,
    few_new_times,
    few_times,
    shuffle_keys,
    time_cuts,
)
from hvdrec.samples.sql import quoted

NUMBER, SPLIT = f"{INTERNAL}number", f"{INTERNAL}split"
"""Columns of the plan: number of a row, and its split as an index into `SPLITS`, or `PAST`."""
ORDER, USER = f"{INTERNAL}order", f"{INTERNAL}user"
"""Columns of the plan: number by which a split is sorted, and code of the user."""
REPORT_SECONDS = 10.0
COARSE_ROWS = 1_000_000
"""If a log has at least this many rows, the cuts of a temporal split are first estimated."""
SAMPLED_ROWS, MARGIN = 100_000, 0.02
Array = NDArray[Any]
Notify = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """The split, order and histories of all rows.

    Attributes:
        file: Parquet file of the columns NUMBER, SPLIT, ORDER, USER, and two for each history.
        events: State of `STATES` -> name of a history -> its events in the splits of the state.
        entries: Name of a history -> the values that its codes stand for.
        oldest: State -> name of a history with `within` -> the time from which events are in the
            lists of users.
    """

    file: Path
    events: Mapping[str, Mapping[str, Events]]
    entries: Mapping[str, pa.Array]
    oldest: Mapping[str, Mapping[str, float]]


def bounds(number: int) -> tuple[str, str]:
    """Return the names of the two columns of history number `number`.

    For scope "before", they are the number of the first event in the list's range, and the number
    after that of its last event. For "others", the first is 1 if the row is an event, otherwise 0;
    the second is the row's position among the events (see `Events.others`).
    """
    return f"{INTERNAL}first{number}", f"{INTERNAL}stop{number}"


def row_state(method: str) -> str:
    """Return the state whose events are in the histories of rows.

    With a random split, only training rows may be events, so that histories do not contain
    held-out rows.
    """
    return "train" if method in RANDOM else "all"


def make_plan(rows: SortedRows, folder: Path, notify: Notify) -> Plan:
    """Assign the rows to splits and find the events of their histories.

    Args:
        rows: The labelled rows.
        folder: Directory for temporary files.
        notify: Called with lines of progress.

    Raises:
        UserError: A split is empty.
    """
    samples = rows.spec.samples
    splitter = Splitter.of(samples.split, rows.user_rows, _cuts(rows))
    histories = [_HistoryPlan.of(rows, i, folder) for i in range(len(samples.history))]
    file, counts = folder / "plan.parquet", np.zeros(len(SPLITS), dtype=np.int64)
    latest: list[Any] = [None] * len(STATES)
    fields = [(NUMBER, pa.int64()), (SPLIT, pa.int8()), (ORDER, pa.int64()), (USER, pa.int32())]
    fields += [(c, pa.int64()) for i in range(len(histories)) for c in bounds(i)]
    options: dict[str, Any] = {"use_dictionary": False, "write_statistics": False}
    by, items = samples.split.column or samples.time, plain(rows.items)
    with pq.ParquetWriter(file, pa.schema(fields), compression="lz4", **options) as writer:
        for batch in _batches(rows, splitter.starts, notify):
            number = batch.column(NUMBER).to_numpy()
            first, user = int(number[0]), splitter.users(int(number[0]), len(number))
            item = codes(rows.typed(samples.item, batch.column(samples.item)), items)
            by_item = np.argsort((user - user[0]) * len(items) + item, kind="stable")
            position = np.empty_like(number)
            position[by_item] = number
            moment = _times(rows, batch, by) if samples.split.method == "temporal" else None
            split = splitter.assign(first, position, moment)
            time = _times(rows, batch, samples.time) if samples.time else number
            order = sortable(time)
            train = by_item[split[by_item] == 0]
            index = np.arange(counts[0], counts[0] + len(train))
            order[train] = shuffle_keys(index, samples.split.seed + 1)
            counts += np.bincount(split[split != PAST], minlength=len(SPLITS))
            for i in range(len(STATES)):
                inside = time[split <= i]
                if len(inside):
                    top = inside.max()
                    latest[i] = top if latest[i] is None else max(latest[i], top)
            columns = [number, split, order, user]
            for history in histories:
                columns += history.advance(batch, user, item, time, split)
            arrays = [pa.array(c, f[1]) for c, f in zip(columns, fields, strict=True)]
            writer.write_table(pa.table(arrays, schema=pa.schema(fields)))
    for i, name in enumerate(SPLITS):
        if not counts[i]:
            raise _empty(rows, name)
    events = {
        state: {h.history.name: h.files[i].read(distinct=not h.history.repeats) for h in histories}
        for i, state in enumerate(STATES)
    }
    oldest = {
        state: {h.history.name: latest[i] - h.age for h in histories if h.age is not None}
        for i, state in enumerate(STATES)
    }
    return Plan(file, events, {h.history.name: h.entries for h in histories}, oldest)


@dataclass(frozen=True)
class _HistoryPlan:
    """Collects the events of one history, and the range of each row's list.

    `files` holds the events of each state; `age` is the largest age of an event in a list, in the
    unit of the time column.
    """

    rows: SortedRows
    history: History
    number: int
    entries: pa.Array
    files: tuple[EventFile, ...]
    positions: Positions
    age: float | None

    @staticmethod
    def of(rows: SortedRows, number: int, folder: Path) -> _HistoryPlan:
        history = rows.spec.samples.history[number]
        entries = rows.distinct(history.column) if history.column else rows.items
        age, dtype = None, None
        if history.within:
            time = quoted(rows.spec.samples.time)
            kind = rows.engine.fetch(f"SELECT {time} FROM {rows.name} LIMIT 1").schema.field(0).type
            age = microseconds(history.within) / _unit(kind, rows.spec.samples.time_unit)
            dtype = _time_dtype(kind)
            age = int(age) if age.is_integer() else age  # integers stay exact beyond 2**53
        files = tuple(
            EventFile(
                folder / f"events{number}-{state}", np.zeros(len(rows.users), dtype=np.int64), dtype
            )
            for state in STATES
        )
        return _HistoryPlan(rows, history, number, plain(entries), files, Positions(), age)

    def advance(
        self, batch: pa.Table, user: Array, item: Array, time: Array, split: Array
    ) -> tuple[Array, Array]:
        """Collect the events of a batch; return the two columns of the plan (see `bounds`)."""
        chosen = batch.column(event(self.number)).to_numpy()
        if column := self.history.column:
            values = batch.column(column)
            chosen = chosen & values.is_valid().to_numpy()
            where = np.flatnonzero(chosen)
            code = codes(self.rows.typed(column, values.take(pa.array(where))), self.entries)
        else:
            where = np.flatnonzero(chosen)
            code = item[where]
        for i, file in enumerate(self.files):
            inside = split[where] <= i
            events = where[inside]
            file.append(user[events], code[inside], time[events])
        state = STATES.index(row_state(self.rows.spec.samples.split.method))
        chosen = chosen & (split <= state)
        first, stop, own = self.positions.advance(user, time, chosen)
        if self.history.scope == "others":
            return chosen.astype(np.int64), np.where(chosen, own, stop)
        if self.age is not None:
            first = first_since(self.files[state].times(), first, stop, time - self.age)
        return first, stop


def codes(values: pa.Array, known: pa.Array) -> Array:
    """Return the index of each value, which may be dictionary-encoded, in `known`, int32 [n]."""
    if pa.types.is_dictionary(values.type):
        index = pc.index_in(values.dictionary, value_set=known).take(values.indices)
    else:
        index = pc.index_in(values, value_set=known)
    return np.asarray(index.to_numpy(zero_copy_only=False))


def _batches(rows: SortedRows, starts: Array, notify: Notify) -> Iterator[pa.Table]:
    """Read the columns that the plan needs, all rows of a user together; report progress.

    Args:
        rows: The labelled rows.
        starts: Number of the first row of each user, then the number of all rows, int64
            [users + 1].
        notify: Called with lines of progress.
    """
    samples = rows.spec.samples
    names = {samples.item, samples.time, samples.split.column}
    names |= {history.column for history in samples.history}
    names |= {event(i) for i in range(len(samples.history))}
    selected = ", ".join(quoted(name) for name in sorted(names - {""}))
    query = f"SELECT rowid AS {quoted(NUMBER)}, {selected} FROM {rows.name}"
    held: list[pa.RecordBatch] = []
    done, shown = 0, clock.monotonic()
    with closing(rows.engine.stream(query)) as batches:
        for batch in batches:
            numbers = batch.column(NUMBER)
            if numbers[0].as_py() != done or numbers[-1].as_py() != done + len(batch) - 1:
                raise RuntimeError("DuckDB returned rows in another order than they were stored in")
            # Keep the rows of the last user until the next batch, unless they are complete.
            last = int(starts[np.searchsorted(starts, done + len(batch), side="right") - 1])
            cut = max(0, last - done)
            done += len(batch)
            if cut:
                yield pa.Table.from_batches([*held, batch.slice(0, cut)])
                held = []
            if cut < len(batch):
                held.append(batch.slice(cut))
            if clock.monotonic() - shown > REPORT_SECONDS:
                shown = clock.monotonic()
                notify(f"splits and histories: {done:,} of {rows.count:,} rows")


def _times(rows: SortedRows, batch: pa.Table, name: str) -> Array:
    values = batch.column(name).combine_chunks()
    return time_values(rows.origin[name], name, "samples.time", values)


def sortable(time: Array) -> Array:
    """Convert numbers to integers in the same order, int64 [n]."""
    if time.dtype.kind != "f":
        return time.astype(np.int64)
    # Add zero, so that -0.0 becomes 0.0. Flip the bits of negative numbers, except the sign.
    bits = (time.astype(np.float64) + 0.0).view(np.int64)
    return bits ^ ((bits >> np.int64(63)) & np.int64(2**63 - 1))


def _cuts(rows: SortedRows) -> tuple[Any, Any] | None:
    """Return the last time of train and of validation for a temporal split."""
    split, engine = rows.spec.samples.split, rows.engine
    if split.method != "temporal":
        return None
    if split.boundaries:
        return split.boundaries[0], split.boundaries[1]
    name = split.column or rows.spec.samples.time
    column = quoted(name)
    new = "true" if split.after is None else f"{column} > {split.after!r}"
    count = engine.one(f"SELECT count(*) FILTER ({new}) AS n FROM {rows.name}")["n"]
    histogram = f"SELECT {column} AS t, count(*) AS c FROM {rows.name} WHERE {new} GROUP BY t"
    found = _coarse_cuts(rows, column) if split.after is None else None
    if found is None:
        found = engine.fetch(time_cuts(split, histogram, count))
    times = int(found.column("distinct_times")[0].as_py())
    if times < len(SPLITS):
        raise few_times(name, times) if split.after is None else few_new_times(split, times)
    first, second = (
        time_values(rows.origin[name], name, "samples.time", found.column(c).combine_chunks())[0]
        for c in ("first", "second")
    )
    return first, second


def _coarse_cuts(rows: SortedRows, column: str) -> pa.Table | None:
    """Find the cuts of a long log without counting the rows of every distinct time.

    A random sample of rows gives a range of times around each cut: the quantiles at its fraction
    plus and minus `MARGIN`. Within these two ranges, the rows of each distinct time are counted;
    outside of them, one count covers all times before, between or after the ranges. Return None if
    the log is short, or if a cut is not within its range.
    """
    split, engine = rows.spec.samples.split, rows.engine
    if rows.count < COARSE_ROWS:
        return None
    train, validation, _ = split.fractions
    ranges = [train - MARGIN, train + MARGIN]
    ranges += [train + validation - MARGIN, train + validation + MARGIN]
    if ranges != sorted(ranges) or ranges[0] <= 0 or ranges[-1] >= 1:
        return None
    percent = min(100.0, 100 * SAMPLED_ROWS / rows.count)
    edges = (
        f"SELECT quantile_disc({column}, {ranges}) AS q FROM {rows.name} "
        f"USING SAMPLE {percent} PERCENT (bernoulli)"
    )
    name = engine.store(edges).get_name()
    low, high, second_low, second_high = (f"e.q[{i}]" for i in range(1, 5))
    segment = (
        f"CASE WHEN {column} <= {low} THEN 0 WHEN {column} <= {high} THEN 1 "
        f"WHEN {column} <= {second_low} THEN 2 WHEN {column} <= {second_high} THEN 3 ELSE 4 END"
    )
    segments = f"SELECT {column} AS t, {segment} AS s FROM {rows.name}, {name} AS e"
    histogram = (
        f"SELECT max(t) AS t, s, count(*) AS c FROM ({segments}) "
        "GROUP BY s, CASE WHEN s IN (1, 3) THEN t END"
    )
    counted = engine.store(histogram).get_name()
    ends = engine.fetch(f"SELECT s, sum(c) AS c FROM {counted} GROUP BY s ORDER BY s")
    if ends.num_rows != len(ranges) + 1:
        return None
    sums = np.cumsum(ends.column("c").to_numpy().astype(np.int64))
    first, second = train * rows.count, (train + validation) * rows.count
    if not (sums[0] <= first <= sums[1] and sums[2] <= second <= sums[3]):
        return None
    return engine.fetch(time_cuts(split, f"SELECT t, c FROM {counted}", rows.count))


def _empty(rows: SortedRows, name: str) -> Exception:
    samples, span = rows.spec.samples, (0.0, 0.0)
    by = samples.split.column or samples.time
    if samples.split.method == "temporal":
        column = quoted(by)
        query = f"SELECT unnest([min({column}), max({column})]) AS t FROM {rows.name}"
        found = rows.engine.fetch(query).column("t").combine_chunks()
        low, high = time_values(rows.origin[by], by, "samples.time", found)
        span = (float(low), float(high))
    return empty_split(samples.split, name, rows.user_rows, span, by)


def _unit(dtype: pa.DataType, numeric: str) -> float:
    """Return the unit of a column of times in microseconds; `numeric` is the unit of numbers."""
    if pa.types.is_timestamp(dtype):
        return 1e-3 if dtype.unit == "ns" else float(UNITS[dtype.unit])
    return float(UNITS["d" if pa.types.is_date(dtype) else numeric])


def _time_dtype(dtype: pa.DataType) -> Any:
    if pa.types.is_floating(dtype) or (pa.types.is_decimal(dtype) and dtype.scale > 0):
        return np.float64
    return np.int64
