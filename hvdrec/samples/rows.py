"""Sort the labelled rows, store them in the engine, and check them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from ibis.expr.types import Table
from numpy.typing import NDArray

from hvdrec.config.data_sections import Split
from hvdrec.errors import UserError, choices, invalid_file, invalid_value
from hvdrec.samples.columns import compact, family, type_name
from hvdrec.samples.engine import INTERNAL, Engine
from hvdrec.samples.join import (
    LABEL,
    WEIGHT,
    JoinedTable,
    LabelJoin,
    event,
    matched,
    task_label,
)
from hvdrec.samples.remedies import time_remedy, type_remedy
from hvdrec.samples.spec import SampleSpec
from hvdrec.samples.sql import basic_string, quoted, written

CHECKED_ROWS = 65_536
"""Number of rows whose types are checked first, before all rows are converted."""
Array = NDArray[Any]


@dataclass(frozen=True)
class SortedRows:
    """The labelled rows, stored in the engine and sorted by user, time, item and all other columns.

    The position of a row in this order is its number. So the numbers depend only on the contents of
    the rows, not on the order of rows in the files.

    Attributes:
        engine: The engine that holds the rows.
        spec: Definition of the samples.
        table: Table of the engine. It has the keys and features with the types of the raw tables,
            the other columns that samples need, and the internal columns of the labels.
        origin: Column -> the file or configuration key that it comes from.
        count: Number of rows.
        users: The distinct users in the order of the rows, cast to their declared type [k].
        user_rows: Number of rows of each user, int64 [k].
        items: The distinct items, sorted by their raw type, then cast to their declared type.
    """

    engine: Engine
    spec: SampleSpec
    table: Table
    origin: Mapping[str, str]
    count: int
    users: pa.Array
    user_rows: Array
    items: pa.Array

    @property
    def name(self) -> str:
        """SQL name of the table."""
        return str(self.table.get_name())

    def distinct(self, column: str) -> pa.Array:
        """Return the distinct values of a key or feature, cast to its declared type."""
        name = quoted(column)
        query = f"SELECT DISTINCT {name} FROM {self.name} WHERE {name} IS NOT NULL ORDER BY 1"
        return self.typed(column, self.engine.fetch(query).column(0))

    def typed(self, column: str, values: pa.ChunkedArray) -> pa.Array:
        """Cast values of a key or feature to its declared type; strings become dictionaries."""
        return self.spec.cast(column, compact(values.combine_chunks()), self.origin[column])


def select_labelled(
    join: LabelJoin, joined: JoinedTable, *, negatives: bool = False, extra: Sequence[str] = ()
) -> Table:
    """Label the joined rows and select the columns that samples need.

    Args:
        join: The raw tables.
        joined: The joined interactions.
        negatives: True if the rows are sampled negatives, which have label 0.
        extra: Further columns to select.

    Raises:
        UserError: A column is missing, or an expression of the configuration is invalid.
    """
    spec, samples = join.spec, join.spec.samples
    labelled = join.label(joined, negatives=negatives)
    join.require_columns(joined, {f.name: f"feature '{f.name}'" for f in spec.raw_features})
    others = _other_columns(spec)
    has_title = samples.title in labelled.columns
    # If there is no table of items, the title must be a column of the interactions or the joins.
    title = {samples.title: "samples.title"} if samples.title and not samples.items else {}
    join.require_columns(joined, others | title)
    raw = [*others, *([samples.title] if has_title else [])]
    tasks = [task_label(i) for i in range(len(spec.tasks))]
    events = [event(i) for i in range(len(samples.history))]
    matches = [matched(i) for i in range(len(join.sides))]
    internal = [LABEL, WEIGHT, *tasks, *events, *matches]
    return labelled.select(*dict.fromkeys([*spec.columns, *raw, *internal, *extra]))


def original(spec: SampleSpec, column: str) -> str:
    """Return the column of the sorted rows that holds a column of the interactions.

    If a derived column replaces it, the original is kept under another name.
    """
    return f"{INTERNAL}raw_{column}" if column in spec.samples.derive else column


def with_originals(spec: SampleSpec, interactions: Table) -> Table:
    """Copy the columns of the interactions that derived columns will replace."""
    names = {original(spec, column): column for column in interactions.columns}
    copies = {name: interactions[c] for name, c in names.items() if name != c}
    return interactions.mutate(**copies) if copies else interactions


def sort_rows(join: LabelJoin, joined: JoinedTable) -> SortedRows:
    """Compute the labelled rows, store them sorted, and check them.

    Raises:
        UserError: A column is missing, a key is null, a type is wrong, a label is not 0 or 1, or a
            weight is negative.
    """
    spec, samples, engine = join.spec, join.spec.samples, join.engine
    # Sampled negatives copy all columns of the interactions.
    extra = []
    if samples.negatives.per_positive:
        extra = [original(spec, column) for column in join.interactions.columns]
    labelled = select_labelled(join, joined, extra=extra)
    first = [samples.user, *([samples.time] if samples.time else []), samples.item]
    table = engine.keep(labelled, list(dict.fromkeys([*first, *labelled.columns])))
    name = str(table.get_name())
    _check_numbers(join, joined, name)
    start = {c: compact(a.combine_chunks()) for c, a in _first_rows(engine, name).items()}
    for key in (samples.user, samples.item):
        _check_key(engine, name, joined.origin[key], key, start[key])
    for column in spec.columns:
        spec.cast(column, start[column], joined.origin[column])
    count = int(engine.one(f"SELECT count(*) AS n FROM {name}")["n"])
    if not count:
        if samples.drop:
            problem = f"removes every row of {join.file}"
            raise invalid_value("samples.drop", samples.drop, problem, "keep some rows")
        raise invalid_file(join.file, "the table is empty", "provide rows")
    _check_times(engine, name, spec, joined, start)
    user = quoted(samples.user)
    grouped = engine.fetch(
        f"SELECT {user} AS u, count(*) AS n FROM {name} GROUP BY {user} ORDER BY {user}"
    )
    keys = compact(grouped.column("u").combine_chunks())
    users = spec.cast(samples.user, keys, joined.origin[samples.user])
    user_rows = grouped.column("n").to_numpy().astype(np.int64)
    rows = SortedRows(engine, spec, table, joined.origin, count, users, user_rows, pa.nulls(0))
    return replace(rows, items=rows.distinct(samples.item))


def time_values(where: str, name: str, key: str, array: pa.Array) -> Array:
    """Convert a column of numbers, dates or timestamps to numbers that sort in the same way [n].

    Args:
        where: File that the column comes from, for error messages.
        name: Name of the column, for error messages.
        key: Configuration key that names the column, for error messages.
        array: The column.

    Raises:
        UserError: The column has another type, or a value is null or not finite.
    """
    dtype = family(array.type)
    if dtype not in ("integer", "float", "decimal", "date", "timestamp"):
        allowed = choices(["integer", "float", "date", "timestamp"])
        problem = f"column '{name}' ({key}) is {type_name(array.type)}, a time is {allowed}"
        raise invalid_file(where, problem, time_remedy(name, array, dtype))
    if dtype == "date":
        array = array.cast(pa.date32()).cast(pa.int32())
    elif dtype != "float":
        array = array.cast(pa.float64() if dtype == "decimal" else pa.int64())
    nulls, bad = array.null_count, array.null_count
    if dtype == "float" and not bad:
        bad = int((~np.isfinite(array.to_numpy())).sum())
    if bad:
        raise _invalid_times(where, name, key, dtype, nulls, bad)
    return np.asarray(array.to_numpy())


def _invalid_times(where: str, name: str, key: str, dtype: str, nulls: int, bad: int) -> UserError:
    problem = f"column '{name}' ({key}) is null or not finite in {bad} rows"
    rule = f"{written(name)} IS NULL"
    if dtype == "float" and not nulls:
        rule = f"NOT isfinite({written(name)})"
    elif dtype == "float":
        rule += f" OR NOT isfinite({written(name)})"
    remedy = f"every row needs a time: drop them with samples.drop = {basic_string(rule)}"
    return invalid_file(where, problem, remedy)


def _check_times(
    engine: Engine, name: str, spec: SampleSpec, joined: JoinedTable, start: Mapping[str, pa.Array]
) -> None:
    """Raise UserError if a time is null or not finite, or if a column of times has another type."""
    samples = spec.samples
    columns = {samples.time: "samples.time"}
    if samples.split.method == "temporal" and samples.split.column:
        columns.setdefault(samples.split.column, "samples.split.column")
    columns.pop("", None)
    for column, key in columns.items():
        dtype, where = family(start[column].type), joined.origin[column]
        value = quoted(column)
        bad = f"NOT isfinite({value})" if dtype == "float" else "false"
        counts = engine.one(
            f"SELECT count(*) FILTER ({value} IS NULL) AS nulls, "
            f"count(*) FILTER ({bad}) AS infinite FROM {name}"
        )
        if dtype in ("integer", "float", "decimal", "date", "timestamp") and any(counts.values()):
            nulls = counts["nulls"]
            raise _invalid_times(where, column, key, dtype, nulls, nulls or counts["infinite"])
        if column == (samples.split.column or samples.time):
            _require_number(samples.split, column, start[column].type)
        time_values(where, column, key, start[column].drop_null())


def _require_number(split: Split, name: str, dtype: pa.DataType) -> None:
    """Raise UserError if the configuration compares dates or timestamps with numbers."""
    numbers = {"boundaries": list(split.boundaries) or None, "after": split.after}
    given = next((field for field, value in numbers.items() if value is not None), None)
    if given and pa.types.is_temporal(dtype):
        are = "are numbers" if given == "boundaries" else "is a number"
        problem = f"column '{name}' is {dtype}, {given} {are}"
        example = f'samples.derive.day = "epoch({name}) / 86400"'
        remedy = f"derive a number, for example {example}, and name it in samples.split.column"
        raise invalid_value(f"samples.split.{given}", numbers[given], problem, remedy)


def _first_rows(engine: Engine, name: str) -> dict[str, pa.ChunkedArray]:
    table = engine.fetch(f"SELECT * FROM {name} LIMIT {CHECKED_ROWS}")
    return dict(zip(table.column_names, table.columns, strict=True))


def _other_columns(spec: SampleSpec) -> dict[str, str]:
    """Return the columns that are needed besides keys and features -> the key that names them."""
    samples, split = spec.samples, spec.samples.split
    columns = {samples.time: "samples.time"}
    if split.method == "temporal":
        columns[split.column] = "samples.split.column"
    if samples.negatives.per_positive:
        columns |= dict.fromkeys(samples.negatives.within, "samples.negatives.within")
    columns.pop("", None)
    return columns


def _check_numbers(join: LabelJoin, joined: JoinedTable, name: str) -> None:
    """Raise UserError for a label that is not 0 or 1, or an invalid weight."""
    samples, tasks = join.spec.samples, join.spec.tasks
    _check_label(join, joined, name, LABEL, ("samples.label", samples.label))
    if samples.weight:
        weight = quoted(WEIGHT)
        bad = f"{weight} IS NULL OR NOT isfinite({weight}) OR {weight} < 0"
        if problem := _invalid(join, joined, name, WEIGHT, bad):
            problem = f"is negative or not finite in {problem}"
            raise invalid_value(
                "samples.weight", samples.weight, problem, "a weight is 0 or greater"
            )
    for i, task in enumerate(tasks):
        _check_label(join, joined, name, task_label(i), (f"tasks[{i}].label", task.label))


def _check_label(
    join: LabelJoin, joined: JoinedTable, name: str, column: str, setting: tuple[str, str]
) -> None:
    """Check a label; `setting` is its configuration key and expression.

    The label of a task may be null.
    """
    value = quoted(column)
    bad = f"{value} NOT IN (0, 1)" + (f" OR {value} IS NULL" if column == LABEL else "")
    if not (problem := _invalid(join, joined, name, column, bad)):
        return
    key, expression = setting
    remedy = "write a condition such as 'rating > 3'"
    known = join.engine.one(f"SELECT count({value}) AS n FROM {name} WHERE {bad}")["n"]
    if not known:
        drop = basic_string(f"({expression}) IS NULL")
        remedy = f"write coalesce({expression}, false), or samples.drop = {drop}"
    raise invalid_value(key, expression, f"is neither 0 nor 1 in {problem}", remedy)


def _invalid(join: LabelJoin, joined: JoinedTable, name: str, column: str, bad: str) -> str:
    """Describe the rows that meet the SQL condition `bad`; return "" if there are none."""
    engine, value = join.engine, quoted(column)
    total = "count(*)" if column in (LABEL, WEIGHT) else f"count({value})"
    counts = engine.one(f"SELECT count(*) FILTER ({bad}) AS bad, {total} AS n FROM {name}")
    if not counts["bad"]:
        return ""
    # Invalid values are rare, so it costs little to evaluate the expressions again, on the joined
    # rows sorted by the columns of the log.
    keys = [join.spec.samples.user, join.spec.samples.item]
    by = list(dict.fromkeys([*keys, *joined.table.columns]))
    example = engine.example(join.label(joined), column, bad, by)
    shown = "null" if example is None else f"{example:g}"
    return f"{counts['bad']} of {counts['n']} rows of {join.file}, for example {shown}"


def _check_key(engine: Engine, table: str, where: str, name: str, array: pa.Array) -> None:
    if family(array.type) not in ("string", "integer"):
        allowed = choices(["string", "integer"])
        problem = f"key column '{name}' is {type_name(array.type)}, a key is {allowed}"
        remedy = type_remedy(name, array, type_name(array.type), "string")
        raise invalid_file(where, problem, remedy)
    is_text = pa.types.is_dictionary(array.type)
    column = quoted(name)
    rule = f"{column} IS NULL OR {column} = ''" if is_text else f"{column} IS NULL"
    empty = engine.one(f"SELECT count(*) AS n FROM {table} WHERE {rule}")["n"]
    if empty:
        column = written(name)
        rule = f"{column} IS NULL OR {column} = ''" if is_text else f"{column} IS NULL"
        problem = f"key column '{name}' is null{' or empty' if is_text else ''} in {empty} rows"
        remedy = f"every row needs a key: drop them with samples.drop = {basic_string(rule)}"
        raise invalid_file(where, problem, remedy)
