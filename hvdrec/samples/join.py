"""Join the raw tables, derive columns, and compute labels and weights, as Ibis expressions.

Internal columns have names that begin with `INTERNAL`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import ibis
from ibis.expr.types import Table, Value

from hvdrec.errors import UserError, choices, invalid_file, invalid_value
from hvdrec.samples.clock import comparable
from hvdrec.samples.engine import INTERNAL, Engine, visible
from hvdrec.samples.exposures import LabelledExposures, join_feedback
from hvdrec.samples.label_tables import open_tables
from hvdrec.samples.raw_columns import names_differ_in_case
from hvdrec.samples.raw_files import table_location
from hvdrec.samples.spec import SampleSpec
from hvdrec.samples.thinning import keep_share
from hvdrec.storage.urls import Location

LABEL = f"{INTERNAL}label"
WEIGHT = f"{INTERNAL}weight"
DROP = f"{INTERNAL}drop"
COUNT = f"{INTERNAL}rows"
EXAMPLE = "rating > 3"


@dataclass(frozen=True)
class SideTable:
    """A table to join to the interactions.

    Attributes:
        name: Configuration key of the table, such as "samples.users".
        file: Path or glob of the table.
        table: Its rows.
        on: The columns by which it is joined.
    """

    name: str
    file: Location
    table: Table
    on: tuple[str, ...]


@dataclass(frozen=True)
class JoinedTable:
    """The interactions with all joined and derived columns.

    Attributes:
        table: The rows of the interactions with these columns.
        origin: Column -> the file or configuration key that it comes from.
    """

    table: Table
    origin: Mapping[str, str]


@dataclass(frozen=True)
class LabelJoin:
    """The raw tables of a run, and the steps that turn them into labelled rows.

    Attributes:
        engine: Runs the queries.
        spec: Definition of the samples.
        file: Path or glob of the interactions.
        interactions: The interactions.
        sides: The tables to join, in order.
        labelled: The interactions with their feedback; None without [[samples.feedback]].
    """

    engine: Engine
    spec: SampleSpec
    file: Location
    interactions: Table
    sides: tuple[SideTable, ...]
    labelled: LabelledExposures | None = None

    @staticmethod
    def open(
        engine: Engine,
        spec: SampleSpec,
        raw: Location,
        notify: Callable[[str], None] = lambda line: None,
    ) -> LabelJoin:
        """Open all tables in the directory `raw`, and check the columns by which they are joined.

        If there is feedback, join it with the interactions; call `notify` with lines of progress.

        Raises:
            UserError: A file or a key column is missing, or keys are null or not unique.
        """
        samples = spec.samples
        if not samples.interactions:
            remedy = "name the table of impressions or actions"
            raise invalid_value("samples.interactions", "", "is empty", remedy)
        file, declared = table_location(raw, samples.interactions), spec.declared
        interactions = engine.read(raw, samples.interactions, declared)
        for key, column in (("samples.user", samples.user), ("samples.item", samples.item)):
            if column not in interactions.columns and (sql := samples.derive.get(column)):
                interactions = engine.derive(interactions, column, sql, f"samples.derive.{column}")
            _require(file, interactions, column, key)
        labelled = None
        if samples.feedback:
            tables = open_tables(engine, spec, raw, interactions, file)
            labelled = join_feedback(engine, spec, tables, notify)
            interactions = labelled.table
        sides = []
        for name, table, on, is_unique in (
            ("samples.users", samples.users, (samples.user,), True),
            ("samples.items", samples.items, (samples.item,), True),
            *((f"samples.joins[{i}]", j.table, j.on, False) for i, j in enumerate(samples.joins)),
        ):
            if is_unique and not table:
                continue
            rows = engine.read(raw, table, declared)
            for column in on:
                sql = samples.derive.get(column, "")
                if sql and column not in rows.columns and engine.binds(rows, sql):
                    rows = engine.derive(rows, column, sql, f"samples.derive.{column}")
            side = SideTable(name, table_location(raw, table), rows, on)
            for column in on:
                _require(side.file, side.table, column, f"key of {name}")
            if is_unique:
                _require_unique(engine, side)
            sides.append(side)
        return LabelJoin(engine, spec, file, interactions, tuple(sides), labelled)

    def side(self, name: str) -> SideTable | None:
        """Return the table with configuration key `name`; None if the run has none."""
        return next((side for side in self.sides if side.name == name), None)

    def join(self, interactions: Table, known: Collection[str] = ()) -> JoinedTable:
        """Join all tables to the interactions and derive all columns.

        Each column is derived as soon as the columns that it uses are there. So a derived column
        may be a key of a join, and may use joined columns. If two tables have a column of the same
        name, the first one counts, in the order interactions, users, items, other joins. `known`
        names the derived columns that the interactions already contain.
        """
        origin = {column: str(self.file) for column in visible(interactions)}
        pending = {c: sql for c, sql in self.spec.samples.derive.items() if c not in known}
        table, pending = self.derive_ready(interactions, pending, origin)
        for number, side in enumerate(self.sides):
            table = _left_join(self.engine, table, side, self.file, matched(number))
            origin |= {c: str(side.file) for c in side.table.columns if c not in origin}
            table, pending = self.derive_ready(table, pending, origin)
        for column, expression in pending.items():
            # These expressions use a missing column or are not valid SQL, so this raises the error.
            table = self.engine.derive(table, column, expression, f"samples.derive.{column}")
        return JoinedTable(table, origin)

    def derive_ready(
        self, table: Table, pending: Mapping[str, str], origin: dict[str, str]
    ) -> tuple[Table, dict[str, str]]:
        """Derive the columns in `pending` that use only columns of the table.

        Returns the table and the columns that remain to be derived.
        """
        left = dict(pending)
        while ready := [c for c, sql in left.items() if self.engine.binds(table, sql)]:
            for column in ready:
                origin[column] = f"samples.derive.{column}"
                table = self.engine.derive(table, column, left.pop(column), origin[column])
        return table, left

    def label(self, joined: JoinedTable, *, negatives: bool = False) -> Table:
        """Drop rows by ``samples.drop``; add the labels, the weight and a flag for each history.

        The flag is true if the row is an event of the history. Of the rows in which no label is 1,
        only the share ``samples.negatives.rate`` is kept.

        With ``negatives``, all rows are sampled negatives: they have label 0 and weight 1 and are
        not events.
        """
        samples, table = self.spec.samples, joined.table
        if samples.drop:
            table = self._condition(table, DROP, samples.drop, "samples.drop")
            table = table.filter(~table[DROP]).drop(DROP)
        labels = [(LABEL, samples.label, "samples.label")]
        tasks = enumerate(self.spec.tasks)
        labels += [(task_label(i), task.label, f"tasks[{i}].label") for i, task in tasks]
        events = [event(i) for i in range(len(samples.history))]
        if negatives:
            constants = {column: ibis.literal(0.0) for column, _, _ in labels}
            constants |= {WEIGHT: ibis.literal(1.0)} | {e: ibis.literal(False) for e in events}
            return table.mutate(**constants)
        for column, expression, key in labels:
            table = self._number(table, column, expression, key, f"0 or 1, such as '{EXAMPLE}'")
        if samples.weight:
            table = self._number(table, WEIGHT, samples.weight, "samples.weight", "a number")
        else:
            table = table.mutate(**{WEIGHT: ibis.literal(1.0)})
        table = keep_share(table, samples, [column for column, _, _ in labels], WEIGHT)
        for i, (column, history) in enumerate(zip(events, samples.history, strict=True)):
            if history.where:
                key = f"samples.history[{i}].where"
                table = self._condition(table, column, history.where, key)
            else:
                table = table.mutate(**{column: (table[LABEL] == 1).fill_null(False)})
        return table

    def require_columns(self, joined: JoinedTable, wanted: Mapping[str, str]) -> None:
        """Raise UserError if a column is missing; `wanted` maps each needed column to its use."""
        for column, purpose in wanted.items():
            if column not in joined.table.columns:
                tables = "the table and those joined to it have" if self.sides else "the table has"
                problem = f"column '{column}' ({purpose}) is missing; {tables} "
                problem += choices(visible(joined.table))
                remedy = "correct the name or add it to samples.derive"
                raise invalid_file(self.file, problem, remedy)

    def _condition(self, table: Table, column: str, expression: str, key: str) -> Table:
        table = self.engine.derive(table, column, expression, key)
        dtype = table[column].type()
        if not (dtype.is_boolean() or dtype.is_integer() or dtype.is_null()):
            remedy = f"write a condition, such as '{EXAMPLE}'"
            raise invalid_value(key, expression, f"has type {dtype}", remedy)
        return table.mutate(**{column: table[column].cast("boolean").fill_null(False)})

    def _number(self, table: Table, column: str, expression: str, key: str, allowed: str) -> Table:
        table = self.engine.derive(table, column, expression, key)
        dtype = table[column].type()
        if not (dtype.is_numeric() or dtype.is_boolean() or dtype.is_null()):
            raise invalid_value(key, expression, f"has type {dtype}", f"it must give {allowed}")
        # Cast booleans in two steps: some engines cannot cast them to floats directly.
        value = table[column].cast("int8") if dtype.is_boolean() else table[column]
        return table.mutate(**{column: value.cast("float64")})


def event(number: int) -> str:
    """Return the name of the column that is true for the events of history number `number`."""
    return f"{INTERNAL}event{number}"


def matched(number: int) -> str:
    """Return the name of the column that is true if joined table `number` has a matching row."""
    return f"{INTERNAL}matched{number}"


def task_label(number: int) -> str:
    """Return the name of the column with the label of task number `number`."""
    return f"{INTERNAL}task{number}"


def _left_join(engine: Engine, table: Table, side: SideTable, file: Location, marker: str) -> Table:
    """Join a table: add its columns, except those already present, and the column `marker`.

    `marker` is true for each row that has a match.

    Raises:
        UserError: A row has several matches, so the join would repeat it.
    """
    present = {column.lower(): column for column in table.columns}
    for column in side.table.columns:
        if (twin := present.get(column.lower(), column)) != column:
            raise names_differ_in_case(f"{side.file} and {file}", twin, column)
    columns = {c: side.table[c] for c in side.table.columns if c not in table.columns}
    keys, conditions = {}, []
    for i, column in enumerate(side.on):
        if column not in table.columns:
            problem = (
                f"not a column of {file} or of a table joined before; "
                f"known: {choices(visible(table))}"
            )
            raise invalid_value(f"{side.name}.on", column, problem, "add it to samples.derive")
        left, right = table[column], side.table[column]
        pair = comparable(left, right)
        if pair is None:
            problem = (
                f"key column '{column}' is {right.type()}, but {left.type()} in the interactions"
            )
            raise invalid_file(side.file, problem, "use the same type in both tables")
        keys[f"{INTERNAL}key{i}"] = pair[1]
        conditions.append((pair[0], f"{INTERNAL}key{i}"))
    other = side.table.select(**keys, **columns, **{marker: ibis.literal(True)})
    on = [left == other[key] for left, key in conditions]
    _require_one_match(engine, table, side, conditions)
    joined = table.left_join(other, on).drop(*keys)
    return joined.mutate(**{marker: joined[marker].fill_null(False)})


def _require(file: Location, table: Table, column: str, key: str) -> None:
    if column not in table.columns:
        problem = f"column '{column}' ({key}) is missing; the table has {choices(visible(table))}"
        raise invalid_file(file, problem, "correct the name")


def _require_unique(engine: Engine, side: SideTable) -> None:
    """Raise UserError if a key is null, or if several rows have it."""
    table = side.table
    empty = engine.first(table.filter(table[side.on[0]].isnull()).count().as_table())
    if empty and (count := next(iter(empty.values()))):
        problem = f"key column '{side.on[0]}' is null in {count} rows"
        raise invalid_file(side.file, problem, "every row needs a key: remove these rows")
    if twin := engine.first(_repeated(side).order_by(*side.on)):
        raise _several(side, twin)


def _require_one_match(
    engine: Engine, table: Table, side: SideTable, conditions: Sequence[tuple[Value, str]]
) -> None:
    """Raise UserError if a row of the table matches several rows of the joined table."""
    if engine.first(_repeated(side)) is None:
        return
    repeated = engine.materialize(_repeated(side).order_by(*side.on))
    keys = {
        key: repeated[column].cast(left.type())
        for column, (left, key) in zip(side.on, conditions, strict=True)
    }
    renamed = repeated.mutate(**keys)
    matching = renamed.semi_join(table, [left == renamed[key] for left, key in conditions])
    if twin := engine.first(matching.order_by(*side.on)):
        raise _several(side, twin)


def _repeated(side: SideTable) -> Table:
    """Return each key that several rows of a table have, except null, and the number of rows."""
    counted = side.table.group_by(*side.on).aggregate(**{COUNT: side.table.count()})
    present = [counted[COUNT] > 1, *(counted[column].notnull() for column in side.on)]
    return counted.filter(*present)


def _several(side: SideTable, twin: Mapping[str, object]) -> UserError:
    key = ", ".join(f"{column} = {twin[column]}" for column in side.on)
    problem = f"{twin[COUNT]} rows have {key} ({side.name})"
    return invalid_file(side.file, problem, "keep one row per key")
