"""The label join: raw tables joined, with derived columns, label and weight, as Ibis expressions.

Names that begin with two underscores are columns of our own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import ibis
from ibis.expr.types import Table

from hvdrec.config import Config
from hvdrec.errors import UserError, choices
from hvdrec.samples.engine import Engine, visible

ROW = "__row"
LABEL = "__label"
WEIGHT = "__weight"
DROP = "__drop"
LABELS = "0 or 1, such as 'rating > 3'"


@dataclass(frozen=True)
class Side:
    """A table that is joined to the interactions: its configuration key, file and key columns."""

    name: str
    file: Path
    table: Table
    on: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """The raw tables. Interactions have a row number that depends on their contents alone."""

    file: Path
    interactions: Table
    sides: tuple[Side, ...]


@dataclass(frozen=True)
class Joined:
    """Interactions with all that is joined and derived; `origin` says where a column is from."""

    table: Table
    origin: Mapping[str, str]


def read_source(engine: Engine, config: Config) -> Source:
    """Read all raw tables and check their key columns; UserError names file and column."""
    samples, raw = config.samples, Path(config.paths.raw)
    if not samples.interactions:
        raise UserError("samples.interactions is empty; name the table of what was shown or done")
    text = _text_columns(config)
    file = raw / samples.interactions
    interactions = engine.read(file, text)
    for name, column in (("user", samples.user), ("item", samples.item)):
        _require(file, interactions, column, f"samples.{name}")
    if not samples.interactions.endswith(".parquet"):
        # A CSV file would be parsed for every expression that is tried on it.
        interactions = engine.cached(interactions)
    # Equal rows are interchangeable, so the order of all columns is one order of the data.
    first = [samples.user, samples.item]
    order = [*first, *(column for column in interactions.columns if column not in first)]
    numbered = interactions.mutate(**{ROW: ibis.row_number().over(order_by=order)})
    wanted: list[tuple[str, str, tuple[str, ...]]] = []
    wanted += [("samples.users", samples.users, (samples.user,))] if samples.users else []
    wanted += [("samples.items", samples.items, (samples.item,))] if samples.items else []
    wanted += [(f"samples.joins[{i}]", join.table, join.on) for i, join in enumerate(samples.joins)]
    sides = []
    for name, table, on in wanted:
        side = Side(name, raw / table, engine.read(raw / table, text), on)
        for column in on:
            _require(side.file, side.table, column, f"key of {name}")
        sides.append(side)
    for side in sides[: bool(samples.users) + bool(samples.items)]:
        _require_unique(engine, side)
    return Source(file, engine.cached(numbered), tuple(sides))


def joined(
    engine: Engine,
    config: Config,
    source: Source,
    interactions: Table,
    given: Collection[str] = (),
) -> Joined:
    """Join every table and derive every column, as soon as the columns it is made of are there.

    So a derived column may be the key of a join or be made of joined columns. Where two tables have
    a column of one name, the earlier keeps it: interactions, users, items, joins in their order.
    given: derived columns that the interactions already have.
    """
    origin = {column: str(source.file) for column in visible(interactions)}
    waiting = {c: sql for c, sql in config.samples.derive.items() if c not in given}
    table, waiting = derive_ready(engine, interactions, waiting, origin)
    for side in source.sides:
        table = _left_join(table, side, source.file)
        origin |= {c: str(side.file) for c in side.table.columns if c not in origin}
        table, waiting = derive_ready(engine, table, waiting, origin)
    for column, expression in waiting.items():
        # It raises: the expression names a column that is nowhere, or is no SQL.
        table = engine.derive(table, column, expression, f"samples.derive.{column}")
    return Joined(table, origin)


def derive_ready(
    engine: Engine, table: Table, waiting: Mapping[str, str], origin: dict[str, str]
) -> tuple[Table, dict[str, str]]:
    """Add the waiting columns whose own columns are there; return also those that still wait."""
    left = dict(waiting)
    while ready := [c for c, expression in left.items() if engine.binds(table, expression)]:
        for column in ready:
            key = f"samples.derive.{column}"
            table = engine.derive(table, column, left.pop(column), key)
            origin[column] = key
    return table, left


def labelled(
    engine: Engine, config: Config, source: Source, rows: Joined, *, is_drawn: bool = False
) -> Table:
    """Add labels, weight and the events of histories, and leave out what is dropped.

    is_drawn: rows are sampled negatives, of label 0 (for every task), weight 1 and no event.
    """
    samples, table = config.samples, rows.table
    if samples.drop:
        table = _flag(engine, table, DROP, samples.drop, "samples.drop")
        table = table.filter(~table[DROP]).drop(DROP)
    given: dict[str, ibis.Value] = {}
    if is_drawn:
        given = {LABEL: ibis.literal(0.0), WEIGHT: ibis.literal(1.0)}
        given |= {task_label(i): ibis.literal(0.0) for i in range(len(config.tasks))}
        given |= {event(i): ibis.literal(False) for i in range(len(samples.history))}
        return table.mutate(**given)
    labels = [(LABEL, samples.label, "samples.label")]
    labels += [(task_label(i), t.label, f"tasks[{i}].label") for i, t in enumerate(config.tasks)]
    for column, expression, key in labels:
        table = _number(engine, table, column, expression, key, LABELS)
    if samples.weight:
        table = _number(engine, table, WEIGHT, samples.weight, "samples.weight", "a number")
    else:
        table = table.mutate(**{WEIGHT: ibis.literal(1.0)})
    for i, history in enumerate(samples.history):
        if history.where:
            table = _flag(engine, table, event(i), history.where, f"samples.history[{i}].where")
        else:
            table = table.mutate(**{event(i): (table[LABEL] == 1).fill_null(False)})
    return table


def event(number: int) -> str:
    """Return the column that says whether a row is an event of a history."""
    return f"__event{number}"


def task_label(number: int) -> str:
    """Return the column of a task's label."""
    return f"__task{number}"


def require_columns(source: Source, rows: Joined, wanted: Mapping[str, str]) -> None:
    """Raise UserError for a column that is nowhere. wanted: column -> what needs it."""
    for column, purpose in wanted.items():
        if column not in rows.table.columns:
            tables = "the table and those joined to it have" if source.sides else "the table has"
            raise UserError(
                f"{source.file}: column '{column}' ({purpose}) is missing; {tables} "
                f"{choices(visible(rows.table))}; correct the name or add it to samples.derive"
            )


def require_one_match(engine: Engine, source: Source) -> None:
    """Raise UserError for the table whose several rows of one key made a sample come twice."""
    for side in source.sides:
        _require_unique(engine, side, nulls=True)


def _text_columns(config: Config) -> set[str]:
    """Return the columns that hold text wherever they come from a CSV file."""
    declared = {f.name: f.dtype for f in config.features}
    keys = {config.samples.user: "string", config.samples.item: "string"}
    found = {name for name, dtype in (keys | declared).items() if dtype == "string"}
    return found - set(config.samples.derive)


def _left_join(table: Table, side: Side, file: Path) -> Table:
    """Add the columns of a side that the table does not have yet."""
    # Engines tell names apart by their letters alone, not by their case.
    have = {column.lower() for column in table.columns}
    columns = {c: side.table[c] for c in side.table.columns if c.lower() not in have}
    keys, equal = {}, []
    for i, column in enumerate(side.on):
        if column not in table.columns:
            raise UserError(
                f"{side.name}: its key '{column}' is no column of {file} or of a table joined "
                f"before; there are {choices(visible(table))}; derive it in samples.derive"
            )
        left, right = table[column], side.table[column]
        kinds = {_key_kind(left.type()), _key_kind(right.type())}
        if kinds == {"string", "integer"}:
            left, right = left.cast("string"), right.cast("string")
        elif len(kinds) > 1:
            raise UserError(
                f"{side.file}: key column '{column}' is {right.type()}, the samples' is "
                f"{left.type()}; give both tables one type"
            )
        keys[f"__key{i}"] = right
        equal.append((left, f"__key{i}"))
    other = side.table.select(**keys, **columns)
    on = [left == other[key] for left, key in equal]
    return table.left_join(other, on).drop(*keys)


def _key_kind(kind: ibis.DataType) -> str:
    if kind.is_string():
        return "string"
    return "integer" if kind.is_integer() else str(kind.copy(nullable=True))


def _require(file: Path, table: Table, column: str, key: str) -> None:
    if column not in table.columns:
        raise UserError(
            f"{file}: column '{column}' ({key}) is missing; the table has "
            f"{choices(visible(table))}; correct the name"
        )


def _require_unique(engine: Engine, side: Side, *, nulls: bool = False) -> None:
    """Raise UserError for the first null key (unless allowed) or key of several rows."""
    table = side.table
    if not nulls:
        empty = engine.first(table.filter(table[side.on[0]].isnull()).count().as_table())
        if empty and (count := next(iter(empty.values()))):
            raise UserError(
                f"{side.file}: key column '{side.on[0]}' is null in {count} rows; a key is needed "
                "in every row: take these rows out of the table"
            )
    counted = table.group_by(*side.on).aggregate(__rows=table.count())
    present = [counted["__rows"] > 1, *(counted[column].notnull() for column in side.on)]
    twin = engine.first(counted.filter(*present).order_by(*side.on))
    if twin:
        shown = ", ".join(f"{column} = {twin[column]}" for column in side.on)
        raise UserError(
            f"{side.file}: {twin['__rows']} rows have {shown} ({side.name}); keep one row per key"
        )


def _flag(engine: Engine, table: Table, column: str, expression: str, key: str) -> Table:
    table = engine.derive(table, column, expression, key)
    kind = table[column].type()
    if not (kind.is_boolean() or kind.is_integer() or kind.is_null()):
        raise UserError(
            f"{key} = '{expression}': is of type {kind}; it must be a condition, "
            "such as 'rating > 3'"
        )
    return table.mutate(**{column: table[column].cast("boolean").fill_null(False)})


def _number(
    engine: Engine, table: Table, column: str, expression: str, key: str, legal: str
) -> Table:
    table = engine.derive(table, column, expression, key)
    kind = table[column].type()
    if not (kind.is_numeric() or kind.is_boolean() or kind.is_null()):
        raise UserError(f"{key} = '{expression}': is of type {kind}; it must give {legal}")
    # Not every engine casts a boolean to a floating-point number at once.
    value = table[column].cast("int8") if kind.is_boolean() else table[column]
    return table.mutate(**{column: value.cast("float64")})
