"""Write the files of the samples: Parquet files of rows, users and items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvdrec.config.schema import Side
from hvdrec.errors import choices, invalid_file, shown
from hvdrec.samples.columns import cast, concatenate, list_array, plain, reason
from hvdrec.samples.engine import visible
from hvdrec.samples.history import EventLog, UserTimes
from hvdrec.samples.join import JoinedTable, LabelJoin, SideTable
from hvdrec.samples.rows import KeyCodes, LabelledRows
from hvdrec.samples.spec import SampleSpec
from hvdrec.samples.split import RANDOM

PART_ROWS = 524_288
"""Largest number of rows in a file."""
ROW_GROUP_ROWS = 65_536
Array = NDArray[Any]


@dataclass(frozen=True)
class Histories:
    """The events of all histories.

    Attributes:
        times: User and time of each row.
        states: State of `STATES` -> name of a history -> its events in the splits that the state
            includes.
    """

    times: UserTimes
    states: Mapping[str, Mapping[str, EventLog]]


@dataclass(frozen=True)
class Entities:
    """The users or items of the samples.

    Attributes:
        side: "user" or "item".
        key: Name of the key column.
        values: The k distinct keys that occur in samples, in ascending order.
        latest: For each state, the number of each key's latest row in the splits that the state
            includes, int64 [k]; -1 if there is none.
    """

    side: Side
    key: str
    values: pa.Array
    latest: tuple[Array, ...]

    @staticmethod
    def of(side: Side, key: str, codes: KeyCodes, orders: Sequence[Array]) -> Entities:
        """Find the latest row of each key; each of `orders` lists row numbers in time order."""

        def last(order: Array) -> Array:
            latest = np.full(len(codes.values), -1, dtype=np.int64)
            # If a key occurs several times, NumPy keeps the last assignment: the latest row.
            latest[codes.code[order]] = order
            return latest

        return Entities(side, key, codes.values, tuple(last(order) for order in orders))


def write_split(
    folder: Path, spec: SampleSpec, rows: LabelledRows, chosen: Array, histories: Histories
) -> None:
    """Write the rows with the numbers `chosen`, in this order, to files in a new folder."""
    folder.mkdir()
    for part, start in enumerate(range(0, len(chosen), PART_ROWS)):
        index = chosen[start : start + PART_ROWS]
        groups = (
            _samples(spec, rows, index[i : i + ROW_GROUP_ROWS], histories)
            for i in range(0, len(index), ROW_GROUP_ROWS)
        )
        _write(folder / f"part-{part:05d}.parquet", groups)


def write_table(file: Path, table: pa.Table) -> None:
    """Write a table to one file."""
    _write(file, (table.slice(i, ROW_GROUP_ROWS) for i in range(0, len(table), ROW_GROUP_ROWS)))


def write_users(
    draft: Path, spec: SampleSpec, users: Sequence[pa.Table], histories: Histories
) -> None:
    """Write one table of users for each of `STATES`.

    The histories in it are the latest events in the splits that the state includes.
    """
    for (state, events), table in zip(histories.states.items(), users, strict=True):
        for history in spec.samples.history:
            log = events[history.name]
            latest = log.latest(len(table), histories.times.times, history.length)
            table = table.append_column(history.name, latest)  # noqa: PLW2901
        write_table(draft / f"users_{state}.parquet", table)


def entity_tables(
    join: LabelJoin, joined: JoinedTable, rows: LabelledRows, entities: Entities
) -> list[pa.Table]:
    """Build a table of all users, or of all items, for each state in ``entities.latest``.

    A table has one row per user or item, sorted by key, with the key, the features and the title.
    Items that occur only in the raw table of items are included. Features that the raw table of
    users (or items) does not have are taken from the latest row of the user (or item) in the log.

    Args:
        join: The raw tables.
        joined: The joined interactions.
        rows: The samples.
        entities: The users or items, with the number of each one's latest row.
    """
    spec, table = join.spec, join.side(f"samples.{entities.side}s")
    key, values, latest = entities.key, entities.values, entities.latest
    columns, origin = _own_columns(join, joined, table) if table else ({}, {})
    index = None
    if table:
        known = _cast_keys(spec, origin[key], key, columns[key])
        if entities.side == "item":
            values = KeyCodes.of(concatenate([values, known], values.type)).values
            old = pc.fill_null(pc.index_in(values, entities.values), -1).to_numpy()
            latest = tuple(np.append(rows_of, -1)[old] for rows_of in latest)
        index = pc.index_in(values, value_set=known)

    def build(latest_index: pa.Array) -> pa.Table:
        result = {key: values}
        for name in (feature.name for feature in spec.side_features(entities.side)):
            if name == key:
                continue
            if name in columns:
                result[name] = _take(spec.cast(name, columns[name], origin[name]), index)
            else:
                result[name] = _take(rows.columns[name], latest_index)
        if entities.side == "item" and (title := spec.samples.title):
            if title in columns:
                array, where, taken = columns[title], origin[title], index
            elif title in rows.raw:
                array, where, taken = rows.raw[title], joined.origin[title], latest_index
            else:
                assert table is not None
                problem = f"column '{title}' (samples.title) is missing; the table has "
                problem += choices(visible(table.table))
                raise invalid_file(table.file, problem, "correct the name")
            typed = cast(array, "string", where=where, name=title, purpose="samples.title")
            result[spec.schema.own_name("title")] = _take(typed, taken)
        return pa.table({column: plain(array) for column, array in result.items()})

    return [build(pa.array(rows_of, mask=rows_of < 0)) for rows_of in latest]


def _own_columns(
    join: LabelJoin, joined: JoinedTable, side: SideTable
) -> tuple[dict[str, pa.Array], dict[str, str]]:
    """Collect the columns that samples take from a joined table, and columns derived from these.

    Returns the columns, and the file or configuration key that each comes from.
    """
    spec, derive, file = join.spec, join.spec.samples.derive, str(side.file)
    taken = [
        column
        for column in side.table.columns
        if column in (*side.on, *derive) or joined.origin[column] == file
    ]
    origin = dict.fromkeys(taken, file)
    pending = {c: sql for c, sql in derive.items() if c not in side.on}
    table, left = join.derive_ready(side.table.select(*taken), pending, origin)
    names = {f.name for f in spec.features} | {spec.samples.title}
    wanted = [c for c in table.columns if c in side.on or (c in names and c not in left)]
    return join.engine.collect(table.select(*wanted)), origin


def _cast_keys(spec: SampleSpec, where: str, name: str, array: pa.Array) -> pa.Array:
    """Cast the keys in a raw table of users or items to the type that keys have in the samples."""
    feature = spec.feature(name)
    if feature and feature.dtype == "int" and pa.types.is_dictionary(array.type):
        texts = plain(array)
        problem = f"key column '{name}' is string, feature '{name}' has dtype 'int'"
        try:
            numbers = texts.cast(pa.int64())
        except pa.ArrowInvalid as error:
            problem += f": {reason(error)}"
            raise invalid_file(where, problem, "declare dtype = 'string'") from None
        # The join compares keys as text, so '007' would not match the key 7.
        other = texts.filter(pc.not_equal(numbers.cast(pa.string()), texts))
        if len(other):
            problem += f": {shown(other[0].as_py())} is not how the number is written"
            raise invalid_file(where, problem, "declare dtype = 'string'")
        return numbers
    return plain(spec.cast(name, array, where))


def _samples(spec: SampleSpec, rows: LabelledRows, index: Array, histories: Histories) -> pa.Table:
    """Build the table of the samples with the row numbers `index`."""
    positions = pa.array(index)
    columns = {name: array.take(positions) for name, array in rows.columns.items()}
    # With a random split, only training rows may be events: others would leak held-out rows.
    state = "train" if spec.samples.split.method in RANDOM else "all"
    events = histories.states[state]
    for history in spec.samples.history:
        log = events[history.name]
        lists = log.others if history.scope == "others" else log.before
        columns[history.name] = lists(histories.times, index, history.length)
    own_name = spec.schema.own_name
    columns[own_name("label")] = pa.array(rows.label[index].astype(np.float32))
    for task, label in zip(spec.tasks, rows.tasks, strict=True):
        values = label[index]
        columns[own_name(task.column)] = pa.array(values.astype(np.float32), mask=np.isnan(values))
    columns[own_name("weight")] = pa.array(rows.weight[index].astype(np.float32))
    if time := spec.samples.time:
        columns[own_name("time")] = plain(rows.raw[time].take(positions))
    return pa.table(columns)


def _take(array: pa.Array, index: pa.Array) -> pa.Array:
    """Take values by index; a null index gives null, or an empty list in a column of lists."""
    taken = array.take(index)
    if not pa.types.is_list(taken.type) or not taken.null_count:
        return taken
    lengths = pc.fill_null(pc.list_value_length(taken), 0).to_numpy()
    return list_array(lengths, taken.flatten())


def _write(file: Path, groups: Iterator[pa.Table]) -> None:
    """Write row groups without Arrow's schema, so that dictionaries are read back as strings."""
    writer = None
    try:
        for table in groups:
            writer = writer or pq.ParquetWriter(
                file, table.schema, compression="zstd", store_schema=False
            )
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
    finally:
        if writer is not None:
            writer.close()
