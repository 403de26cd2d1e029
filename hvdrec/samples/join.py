"""The label join as Ibis expressions: raw tables, derived columns, labels and weights.

Internal columns have names that begin with two underscores.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import ibis
from ibis.expr.types import Table

from hvdrec.errors import choices, invalid_file, invalid_value
from hvdrec.samples.engine import Engine, visible
from hvdrec.samples.spec import SampleSpec

ROW = "__row"
LABEL = "__label"
WEIGHT = "__weight"
DROP = "__drop"
EXAMPLE = "rating > 3"


@dataclass(frozen=True)
class SideTable:
    """A table that is joined to the interactions.

    Attributes:
        name: Its configuration key, such as "samples.users".
        file: Path or glob of its files.
        table: Its rows.
        on: Its key columns.
    """

    name: str
    file: Path
    table: Table
    on: tuple[str, ...]


@dataclass(frozen=True)
class RawTables:
    """The raw tables of a run.

    Attributes:
        file: Path or glob of the interactions.
        interactions: Interactions with a row number that depends only on their contents.
        sides: Tables to join, in this order.
    """

    file: Path
    interactions: Table
    sides: tuple[SideTable, ...]

    def side(self, name: str) -> SideTable | None:
        """Return the table of a configuration key, if there is one."""
        return next((side for side in self.sides if side.name == name), None)


@dataclass(frozen=True)
class JoinedTable:
    """Interactions with all joined and derived columns.

    Attributes:
        table: The rows.
        origin: Column -> the file or configuration key that it comes from.
    """

    table: Table
    origin: Mapping[str, str]


def read_tables(engine: Engine, spec: SampleSpec, raw: Path) -> RawTables:
    """Open all tables in the directory `raw` and check their key columns.

    Raises:
        UserError: A file or a key column is missing, or keys are null or not unique.
    """
    samples = spec.samples
    if not samples.interactions:
        problem = "name the table of impressions or actions"
        raise invalid_value("samples.interactions", samples.interactions, "is empty", problem)
    text = spec.text_columns
    file = raw / samples.interactions
    interactions = engine.read(file, text)
    for key, column in (("samples.user", samples.user), ("samples.item", samples.item)):
        _require(file, interactions, column, key)
    if not samples.interactions.endswith(".parquet"):
        # Otherwise the CSV file is parsed again for every expression that is tried on it.
        interactions = engine.materialize(interactions)
    # Equal rows are interchangeable, so sorting by all columns gives one order of the data.
    first = [samples.user, samples.item]
    order = [*first, *(column for column in interactions.columns if column not in first)]
    numbered = interactions.mutate(**{ROW: ibis.row_number().over(order_by=order)})
    sides = []
    for name, table, on, is_unique in (
        ("samples.users", samples.users, (samples.user,), True),
        ("samples.items", samples.items, (samples.item,), True),
        *((f"samples.joins[{i}]", j.table, j.on, False) for i, j in enumerate(samples.joins)),
    ):
        if is_unique and not table:
            continue
        side = SideTable(name, raw / table, engine.read(raw / table, text), on)
        for column in on:
            _require(side.file, side.table, column, f"key of {name}")
        if is_unique:
            _require_unique(engine, side)
        sides.append(side)
    return RawTables(file, engine.materialize(numbered), tuple(sides))


def join_tables(
    engine: Engine,
    spec: SampleSpec,
    tables: RawTables,
    interactions: Table,
    known: Collection[str] = (),
) -> JoinedTable:
    """Join every table and derive every column as soon as the columns it reads are available.

    So a derived column may be a join key or read joined columns. If two tables have a column of the
    same name, the first one wins: interactions, users, items, then joins in order.

    Args:
        engine: The engine.
        spec: Definition of the samples.
        tables: Tables to join.
        interactions: Rows to join them to.
        known: Derived columns that `interactions` already has.
    """
    origin = {column: str(tables.file) for column in visible(interactions)}
    pending = {c: sql for c, sql in spec.samples.derive.items() if c not in known}
    table, pending = derive_ready(engine, interactions, pending, origin)
    for side in tables.sides:
        table = _left_join(table, side, tables.file)
        origin |= {c: str(side.file) for c in side.table.columns if c not in origin}
        table, pending = derive_ready(engine, table, pending, origin)
    for column, expression in pending.items():
        # This raises: the expression names a missing column or is not valid SQL.
        table = engine.derive(table, column, expression, f"samples.derive.{column}")
    return JoinedTable(table, origin)


def derive_ready(
    engine: Engine, table: Table, pending: Mapping[str, str], origin: dict[str, str]
) -> tuple[Table, dict[str, str]]:
    """Derive the pending columns whose inputs are available; return the rest as well."""
    left = dict(pending)
    while ready := [c for c, expression in left.items() if engine.binds(table, expression)]:
        for column in ready:
            origin[column] = f"samples.derive.{column}"
            table = engine.derive(table, column, left.pop(column), origin[column])
    return table, left


def label_rows(
    engine: Engine, spec: SampleSpec, joined: JoinedTable, *, negatives: bool = False
) -> Table:
    """Drop unwanted rows and add labels, weight and the events of histories.

    Args:
        engine: The engine.
        spec: Definition of the samples.
        joined: Joined rows.
        negatives: Whether the rows are sampled negatives: label 0, weight 1, not an event.
    """
    samples, table = spec.samples, joined.table
    if samples.drop:
        table = _condition(engine, table, DROP, samples.drop, "samples.drop")
        table = table.filter(~table[DROP]).drop(DROP)
    labels = [(LABEL, samples.label, "samples.label")]
    labels += [(task_label(i), t.label, f"tasks[{i}].label") for i, t in enumerate(spec.tasks)]
    events = [event(i) for i in range(len(samples.history))]
    if negatives:
        constants = {column: ibis.literal(0.0) for column, _, _ in labels}
        constants |= {WEIGHT: ibis.literal(1.0)} | {e: ibis.literal(False) for e in events}
        return table.mutate(**constants)
    for column, expression, key in labels:
        table = _number(engine, table, column, expression, key, f"0 or 1, such as '{EXAMPLE}'")
    if samples.weight:
        table = _number(engine, table, WEIGHT, samples.weight, "samples.weight", "a number")
    else:
        table = table.mutate(**{WEIGHT: ibis.literal(1.0)})
    for i, (column, history) in enumerate(zip(events, samples.history, strict=True)):
        if history.where:
            key = f"samples.history[{i}].where"
            table = _condition(engine, table, column, history.where, key)
        else:
            table = table.mutate(**{column: (table[LABEL] == 1).fill_null(False)})
    return table


def event(number: int) -> str:
    """Return the column that marks the events of a history."""
    return f"__event{number}"


def task_label(number: int) -> str:
    """Return the column of a task's label."""
    return f"__task{number}"


def require_columns(tables: RawTables, joined: JoinedTable, wanted: Mapping[str, str]) -> None:
    """Raise UserError for a missing column. `wanted` maps columns to what needs them."""
    for column, purpose in wanted.items():
        if column not in joined.table.columns:
            names = "the table and those joined to it have" if tables.sides else "the table has"
            raise invalid_file(
                tables.file,
                f"column '{column}' ({purpose}) is missing; {names} "
                f"{choices(visible(joined.table))}",
                "correct the name or add it to samples.derive",
            )


def require_one_match(engine: Engine, tables: RawTables) -> None:
    """Raise UserError for the first table with several rows per key, which duplicate samples."""
    for side in tables.sides:
        _require_unique(engine, side, nulls=True)


def _left_join(table: Table, side: SideTable, file: Path) -> Table:
    """Add the columns of a table that the joined table does not have yet."""
    # DuckDB compares names without case.
    present = {column.lower() for column in table.columns}
    columns = {c: side.table[c] for c in side.table.columns if c.lower() not in present}
    keys, conditions = {}, []
    for i, column in enumerate(side.on):
        if column not in table.columns:
            problem = (
                f"not a column of {file} or of a table joined before; "
                f"known: {choices(visible(table))}"
            )
            raise invalid_value(f"{side.name}.on", column, problem, "add it to samples.derive")
        left, right = table[column], side.table[column]
        families = {_key_family(left.type()), _key_family(right.type())}
        if families == {"string", "integer"}:
            left, right = left.cast("string"), right.cast("string")
        elif len(families) > 1:
            problem = (
                f"key column '{column}' is {right.type()}, but {left.type()} in the interactions"
            )
            raise invalid_file(side.file, problem, "use the same type in both tables")
        keys[f"__key{i}"] = right
        conditions.append((left, f"__key{i}"))
    other = side.table.select(**keys, **columns)
    on = [left == other[key] for left, key in conditions]
    return table.left_join(other, on).drop(*keys)


def _key_family(dtype: ibis.DataType) -> str:
    if dtype.is_string():
        return "string"
    return "integer" if dtype.is_integer() else str(dtype.copy(nullable=True))


def _require(file: Path, table: Table, column: str, key: str) -> None:
    if column not in table.columns:
        problem = f"column '{column}' ({key}) is missing; the table has {choices(visible(table))}"
        raise invalid_file(file, problem, "correct the name")


def _require_unique(engine: Engine, side: SideTable, *, nulls: bool = False) -> None:
    """Raise UserError for null keys (unless allowed) or for the first key of several rows."""
    table = side.table
    if not nulls:
        empty = engine.first(table.filter(table[side.on[0]].isnull()).count().as_table())
        if empty and (count := next(iter(empty.values()))):
            problem = f"key column '{side.on[0]}' is null in {count} rows"
            raise invalid_file(side.file, problem, "every row needs a key: remove these rows")
    counted = table.group_by(*side.on).aggregate(__rows=table.count())
    present = [counted["__rows"] > 1, *(counted[column].notnull() for column in side.on)]
    twin = engine.first(counted.filter(*present).order_by(*side.on))
    if twin:
        key = ", ".join(f"{column} = {twin[column]}" for column in side.on)
        problem = f"{twin['__rows']} rows have {key} ({side.name})"
        raise invalid_file(side.file, problem, "keep one row per key")


def _condition(engine: Engine, table: Table, column: str, expression: str, key: str) -> Table:
    table = engine.derive(table, column, expression, key)
    dtype = table[column].type()
    if not (dtype.is_boolean() or dtype.is_integer() or dtype.is_null()):
        remedy = f"write a condition, such as '{EXAMPLE}'"
        raise invalid_value(key, expression, f"has type {dtype}", remedy)
    return table.mutate(**{column: table[column].cast("boolean").fill_null(False)})


def _number(
    engine: Engine, table: Table, column: str, expression: str, key: str, allowed: str
) -> Table:
    table = engine.derive(table, column, expression, key)
    dtype = table[column].type()
    if not (dtype.is_numeric() or dtype.is_boolean() or dtype.is_null()):
        raise invalid_value(key, expression, f"has type {dtype}", f"it must give {allowed}")
    # Some engines cannot cast a boolean to a floating-point number directly.
    value = table[column].cast("int8") if dtype.is_boolean() else table[column]
    return table.mutate(**{column: value.cast("float64")})
