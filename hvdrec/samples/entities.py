"""Build the tables of users and of items: features, titles, and the latest histories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hvdrec.config.schema import Side
from hvdrec.errors import choices, invalid_file, shown
from hvdrec.samples.columns import cast, compact, list_array, plain, reason
from hvdrec.samples.engine import visible
from hvdrec.samples.history import first_since
from hvdrec.samples.join import JoinedTable, LabelJoin, SideTable
from hvdrec.samples.row_plan import NUMBER, SPLIT, USER, Plan
from hvdrec.samples.rows import SortedRows
from hvdrec.samples.spec import SampleSpec
from hvdrec.samples.split import STATES
from hvdrec.samples.sql import literal, quoted
from hvdrec.samples.write import entry_lists, planned_rows, write_table

Array = NDArray[Any]


def write_users(
    draft: Path, join: LabelJoin, joined: JoinedTable, rows: SortedRows, plan: Plan
) -> int:
    """Write one table of users for each state in `STATES`; return the number of users.

    A table has the key and the features of each user, sorted by key. The histories in it are the
    latest events in the splits that the state includes. Features that the raw table of users does
    not have are taken from the user's latest row in these splits.
    """
    spec, key = rows.spec, rows.spec.samples.user
    source = _Source.of(join, joined, "user")
    # Rows are sorted by the user's raw type, the table by its declared type. They may differ: the
    # integer 9 is before 10, but the string "10" is before "9".
    order = pc.sort_indices(plain(rows.users)).to_numpy()
    values = plain(rows.users).take(pa.array(order))
    latest: Sequence[Array] = [np.full(len(order), -1, dtype=np.int64)] * len(STATES)
    if source.missing(spec):
        latest = [numbers[order] for numbers in _latest_of_users(rows, plan)]
    fetched = _Fetched.of(rows, source.missing(spec), latest)
    for state, numbers in zip(STATES, latest, strict=True):
        table = source.build(spec, key, values, partial(fetched.at, numbers))
        for history in spec.samples.history:
            events = plan.events[state][history.name]
            first, stop = events.starts[:-1][order], events.starts[1:][order]
            if history.within:
                oldest = np.full(len(order), plan.oldest[state][history.name])
                assert events.time is not None
                first = first_since(events.time, first, stop, oldest)
            lengths, codes = events.last(first, stop, history.length)
            lists = entry_lists(lengths, codes, plan.entries[history.name])
            table = table.append_column(history.name, lists)
        write_table(draft / f"users_{state}.parquet", table)
    return len(values)


def write_items(
    draft: Path, join: LabelJoin, joined: JoinedTable, rows: SortedRows, plan: Plan
) -> int:
    """Write the table of items; return the number of items.

    It has the key, the features and the title of each item, sorted by key. Items that occur only in
    the raw table of items are included. Features that the raw table does not have are
    taken from the item's latest training row.
    """
    spec, key = rows.spec, rows.spec.samples.item
    source = _Source.of(join, joined, "item")
    values = _sorted_unique(plain(rows.items))
    if source.keys is not None:
        values = _sorted_unique(pa.concat_arrays([values, source.keys]))
    missing, latest = source.missing(spec), np.full(len(values), -1, dtype=np.int64)
    if missing:
        logged, numbers = _latest_of_items(rows, plan)
        index = pc.index_in(values, value_set=logged)
        latest = np.append(numbers, -1)[pc.fill_null(index, -1).to_numpy()]
    fetched = _Fetched.of(rows, missing, [latest])
    table = source.build(spec, key, values, partial(fetched.at, latest))
    write_table(draft / "items.parquet", table)
    return len(values)


@dataclass(frozen=True)
class _Source:
    """The raw table of users or of items.

    Attributes:
        join: The raw tables.
        joined: The joined interactions.
        side: "user" or "item".
        table: The table; None if the run has none.
        columns: The columns that samples take from it, and columns derived from these.
        origin: Column -> the file or configuration key that it comes from.
        keys: The keys of the table, cast to their declared type.
    """

    join: LabelJoin
    joined: JoinedTable
    side: Side
    table: SideTable | None
    columns: Mapping[str, pa.Array]
    origin: Mapping[str, str]
    keys: pa.Array | None

    @staticmethod
    def of(join: LabelJoin, joined: JoinedTable, side: Side) -> _Source:
        table = join.side(f"samples.{side}s")
        if table is None:
            return _Source(join, joined, side, None, {}, {}, None)
        columns, origin = _own_columns(join, joined, table)
        key = table.on[0]
        keys = _cast_keys(join.spec, origin[key], key, columns[key])
        return _Source(join, joined, side, table, columns, origin, keys)

    def missing(self, spec: SampleSpec) -> list[str]:
        """Return the columns that must be taken from the log."""
        key = spec.samples.user if self.side == "user" else spec.samples.item
        names = [f.name for f in spec.side_features(self.side) if f.name != key]
        title = spec.samples.title
        if self.side == "item" and title in self.joined.table.columns:
            names.append(title)
        return [name for name in dict.fromkeys(names) if name not in self.columns]

    def build(
        self, spec: SampleSpec, key: str, values: pa.Array, latest: Callable[[str], pa.Array]
    ) -> pa.Table:
        """Build the table of the keys `values`; `latest(name)` is a column of their latest rows."""
        index = None if self.keys is None else pc.index_in(values, value_set=self.keys)
        result = {key: values}
        for name in (feature.name for feature in spec.side_features(self.side)):
            if name == key:
                continue
            if name in self.columns:
                typed = spec.cast(name, self.columns[name], self.origin[name])
                result[name] = _take(typed, index)
            else:
                result[name] = spec.cast(name, latest(name), self.joined.origin[name])
        if self.side == "item" and (title := spec.samples.title):
            result[spec.schema.own_name("title")] = self._title(title, index, latest)
        return pa.table({column: plain(array) for column, array in result.items()})

    def _title(
        self, title: str, index: pa.Array | None, latest: Callable[[str], pa.Array]
    ) -> pa.Array:
        if title in self.columns:
            where = self.origin[title]
            array = _take(self.columns[title], index)
        elif title in self.joined.table.columns:
            array, where = latest(title), self.joined.origin[title]
        else:
            assert self.table is not None
            problem = f"column '{title}' (samples.title) is missing; the table has "
            problem += choices(visible(self.table.table))
            raise invalid_file(self.table.file, problem, "correct the name")
        return cast(array, "string", where=where, name=title, purpose="samples.title")


@dataclass(frozen=True)
class _Fetched:
    """Some columns of some rows; `numbers` holds the numbers of these rows in ascending order."""

    numbers: Array
    columns: Mapping[str, pa.Array]

    @staticmethod
    def of(rows: SortedRows, names: Sequence[str], latest: Sequence[Array]) -> _Fetched:
        """Read the columns `names` of the rows with the numbers in `latest`; -1 means no row."""
        numbers = np.unique(np.concatenate(latest))
        numbers = numbers[numbers >= 0]
        if not names:
            return _Fetched(numbers, {})
        wanted = rows.engine.register(pa.table({NUMBER: numbers}))
        selected = ", ".join(f"r.{quoted(name)}" for name in names)
        found = rows.engine.fetch(
            f"SELECT {selected} FROM {rows.name} AS r JOIN {wanted.get_name()} AS w "
            f"ON r.rowid = w.{quoted(NUMBER)} ORDER BY w.{quoted(NUMBER)}"
        )
        columns = (compact(column.combine_chunks()) for column in found.columns)
        return _Fetched(numbers, dict(zip(names, columns, strict=True)))

    def at(self, numbers: Array, name: str) -> pa.Array:
        """Return a column of rows; a number of -1 gives null, or an empty list."""
        index = np.searchsorted(self.numbers, numbers)
        return _take(self.columns[name], pa.array(index, mask=numbers < 0))


def _latest_of_users(rows: SortedRows, plan: Plan) -> list[Array]:
    """Return, for each state in `STATES`, the number of each user's latest row; -1 if none."""
    latest = ", ".join(
        f"coalesce(max({NUMBER}) FILTER ({SPLIT} <= {i}), -1) AS s{i}" for i in range(len(STATES))
    )
    found = rows.engine.fetch(
        f"SELECT {latest} FROM read_parquet({literal(str(plan.file))}) "
        f"GROUP BY {USER} ORDER BY {USER}"
    )
    return [found.column(f"s{i}").to_numpy() for i in range(len(STATES))]


def _latest_of_items(rows: SortedRows, plan: Plan) -> tuple[pa.Array, Array]:
    """Return the items that have training rows, and the number of each item's latest one."""
    samples = rows.spec.samples
    time = [samples.time] if samples.time else []
    columns = planned_rows(rows, plan, [samples.item, *time, NUMBER, SPLIT])
    moment = f"t := {quoted(samples.time)}, " if time else ""
    found = rows.engine.fetch(
        f"SELECT {quoted(samples.item)} AS item, max(struct_pack({moment}n := {NUMBER})).n AS n "
        f"FROM ({columns}) WHERE {SPLIT} = 0 GROUP BY 1"
    )
    keys = compact(found.column("item").combine_chunks())
    typed = plain(rows.spec.cast(samples.item, keys, rows.origin[samples.item]))
    return typed, found.column("n").to_numpy()


def _sorted_unique(values: pa.Array) -> pa.Array:
    unique = pc.unique(values)
    return unique.take(pc.sort_indices(unique))


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


def _take(array: pa.Array, index: pa.Array) -> pa.Array:
    """Take values by index; a null index gives null, or an empty list in a column of lists."""
    taken = array.take(index)
    if not pa.types.is_list(taken.type) or not taken.null_count:
        return taken
    lengths = pc.fill_null(pc.list_value_length(taken), 0).to_numpy()
    return list_array(lengths, taken.flatten())
