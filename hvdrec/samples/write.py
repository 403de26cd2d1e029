"""Write the rows of the splits: Parquet files of samples, in their final order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvdrec.config.data_sections import History
from hvdrec.samples.columns import compact, list_array
from hvdrec.samples.history import Events
from hvdrec.samples.join import LABEL, WEIGHT, task_label
from hvdrec.samples.row_plan import NUMBER, ORDER, SPLIT, USER, Plan, bounds, row_state
from hvdrec.samples.rows import SortedRows
from hvdrec.samples.spec import SampleSpec
from hvdrec.samples.split import PAST, SPLITS
from hvdrec.samples.sql import literal, quoted

PART_ROWS = 524_288
"""Largest number of rows in a file."""
ROW_GROUP_ROWS = 65_536
WRITERS = 2
"""Number of files that are written at the same time."""
Array = NDArray[Any]
Notify = Callable[[str], None]


def sample_columns(spec: SampleSpec) -> list[str]:
    """Return the columns of the labelled rows from which samples are built."""
    tasks = [task_label(i) for i in range(len(spec.tasks))]
    time = [spec.samples.time] if spec.samples.time else []
    return list(dict.fromkeys([*spec.columns, *time, LABEL, WEIGHT, *tasks]))


def plan_columns(spec: SampleSpec) -> list[str]:
    """Return the columns of the plan."""
    lists = [column for i in range(len(spec.samples.history)) for column in bounds(i)]
    return [NUMBER, SPLIT, ORDER, USER, *lists]


def planned_rows(rows: SortedRows, plan: Plan, columns: Sequence[str]) -> str:
    """Return the SQL query of some columns of the rows and of the plan, side by side."""
    selected = ", ".join(quoted(c) for c in dict.fromkeys(columns))
    file = f"read_parquet({literal(str(plan.file))})"
    return f"SELECT {selected} FROM {rows.name} POSITIONAL JOIN {file}"


def write_splits(
    draft: Path, rows: SortedRows, plan: Plan, negatives: str | None, notify: Notify
) -> dict[str, Any]:
    """Write all splits: training rows shuffled, validation and test rows sorted by time.

    Args:
        draft: Directory of the samples.
        rows: The labelled rows.
        plan: Their splits, order and histories.
        negatives: Table of the engine with sampled negatives, or None.
        notify: Called with lines of progress.

    Returns:
        Counts of rows and of positives for the ``meta`` of the manifest.
    """
    spec = rows.spec
    columns = [*sample_columns(spec), *plan_columns(spec)]
    query = planned_rows(rows, plan, columns)
    if negatives:
        selected = ", ".join(quoted(c) for c in columns)
        query = f"{query} UNION ALL SELECT {selected} FROM {negatives}"
    query = f"SELECT * FROM ({query}) WHERE {quoted(SPLIT)} <> {PAST}"
    by = ", ".join(quoted(c) for c in (SPLIT, ORDER, NUMBER))
    counts: dict[str, Any] = {"rows": dict.fromkeys(SPLITS, 0), "positives": {}}
    counts["positives"] = dict.fromkeys(SPLITS, 0)
    if spec.tasks:
        counts["tasks"] = {
            task.name: {split: {"rows": 0, "positives": 0} for split in SPLITS}
            for task in spec.tasks
        }
    for name in SPLITS:
        (draft / name).mkdir()
    total, written = sum(_sizes(rows, query)), 0
    with (
        ThreadPoolExecutor(WRITERS) as pool,
        closing(
            rows.engine.stream(f"SELECT * FROM ({query}) ORDER BY {by}", ROW_GROUP_ROWS)
        ) as batches,
    ):
        running: deque[Future[None]] = deque()
        for split, part, group in _parts(batches):
            name = SPLITS[split]
            _count(counts, spec, name, group)
            file = draft / name / f"part-{part:05d}.parquet"
            running.append(pool.submit(_write_part, file, rows, plan, group))
            written += group.num_rows
            if total > PART_ROWS:
                notify(f"{written:,} of {total:,} rows written")
            # Wait for the oldest part, so that only few parts are in memory.
            while len(running) > WRITERS:
                running.popleft().result()
        for future in running:
            future.result()
    _report(counts, notify)
    return counts


def _sizes(rows: SortedRows, query: str) -> list[int]:
    found = rows.engine.fetch(f"SELECT count(*) AS n FROM ({query})")
    return [int(n) for n in found.column("n").to_pylist()]


def _parts(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, int, pa.Table]]:
    """Divide sorted rows into the files of each split: (split, number of the file, rows)."""
    pending: list[pa.RecordBatch] = []
    split, part, held = 0, 0, 0
    for batch in batches:
        position = 0
        while position < len(batch):
            codes = batch.column(SPLIT).to_numpy()
            current = int(codes[position])
            if current != split:
                if pending:
                    yield split, part, pa.Table.from_batches(pending)
                pending, split, part, held = [], current, 0, 0
            end = int(np.searchsorted(codes, current, side="right"))
            taken = min(end - position, PART_ROWS - held)
            pending.append(batch.slice(position, taken))
            position, held = position + taken, held + taken
            if held == PART_ROWS:
                yield split, part, pa.Table.from_batches(pending)
                pending, part, held = [], part + 1, 0
    if pending:
        yield split, part, pa.Table.from_batches(pending)


def _write_part(file: Path, rows: SortedRows, plan: Plan, part: pa.Table) -> None:
    starts = range(0, part.num_rows, ROW_GROUP_ROWS)
    write(file, (_samples(rows, plan, part.slice(i, ROW_GROUP_ROWS)) for i in starts))


def _samples(rows: SortedRows, plan: Plan, part: pa.Table) -> pa.Table:
    """Build the samples of some rows."""
    spec = rows.spec
    raw = {name: part.column(name).combine_chunks() for name in part.column_names}
    columns = {
        name: spec.cast(name, compact(raw[name]), rows.origin[name]) for name in spec.columns
    }
    events = plan.events[row_state(spec.samples.split.method)]
    for i, history in enumerate(spec.samples.history):
        first, stop = (raw[name].to_numpy() for name in bounds(i))
        user = raw[USER].to_numpy()
        lengths, codes = lists(history, events[history.name], user, first, stop)
        columns[history.name] = entry_lists(lengths, codes, plan.entries[history.name])
    own_name = spec.schema.own_name
    columns[own_name("label")] = raw[LABEL].cast(pa.float32())
    for i, task in enumerate(spec.tasks):
        columns[own_name(task.column)] = raw[task_label(i)].cast(pa.float32())
    columns[own_name("weight")] = raw[WEIGHT].cast(pa.float32(), safe=False)
    if time := spec.samples.time:
        columns[own_name("time")] = raw[time]
    return pa.table(columns)


def lists(
    history: History, events: Events, user: Array, first: Array, stop: Array
) -> tuple[Array, Array]:
    """Return the lengths of the lists of some rows, and the codes in all lists."""
    if history.scope == "others":
        return events.others(user, stop, first.astype(bool), history.length)
    return events.last(first, stop, history.length)


def entry_lists(lengths: Array, codes: Array, entries: pa.Array) -> pa.Array:
    """Build the lists of entries from their codes."""
    index = pa.array(codes, pa.int32())
    if not pa.types.is_string(entries.type):
        return list_array(lengths, entries.take(index))
    return list_array(lengths, pa.DictionaryArray.from_arrays(index, entries))


def write(file: Path, groups: Iterator[pa.Table]) -> None:
    """Write row groups without Arrow's schema, so that dictionaries are read back as strings."""
    writer = None
    try:
        for table in groups:
            if writer is None:
                # Statistics of long lists cost as much time as the lists themselves.
                single = [f.name for f in table.schema if not pa.types.is_list(f.type)]
                writer = pq.ParquetWriter(
                    file,
                    table.schema,
                    compression="zstd",
                    store_schema=False,
                    write_statistics=single,
                )
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
    finally:
        if writer is not None:
            writer.close()


def write_table(file: Path, table: pa.Table) -> None:
    """Write a table to one file."""
    write(file, (table.slice(i, ROW_GROUP_ROWS) for i in range(0, len(table), ROW_GROUP_ROWS)))


def _count(counts: dict[str, Any], spec: SampleSpec, split: str, part: pa.Table) -> None:
    """Add the rows and the positives of a part to the counts."""
    counts["rows"][split] += part.num_rows
    counts["positives"][split] += int(part.column(LABEL).to_numpy().sum())
    for i, task in enumerate(spec.tasks):
        label = part.column(task_label(i)).drop_null().to_numpy()
        of_task = counts["tasks"][task.name][split]
        of_task["rows"] += len(label)
        of_task["positives"] += int(label.sum())


def _report(counts: dict[str, Any], notify: Notify) -> None:
    for split in SPLITS:
        notify(f"{split}: {counts['rows'][split]} rows, {counts['positives'][split]} positive")
        for task, of_task in counts.get("tasks", {}).items():
            found = of_task[split]
            notify(f"{split}: {task}: {found['rows']} rows, {found['positives']} positive")
