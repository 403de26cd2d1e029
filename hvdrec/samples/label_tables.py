"""Open the exposures and the feedback of a run, and the unsettled rows of the run before.

An exposure is unsettled while its label window has not passed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ibis
import pyarrow.parquet as pq
from ibis.expr.types import Column, Table, Value

from hvdrec.config.label_join import Feedback, TimeUnit
from hvdrec.errors import choices, invalid_file, invalid_value
from hvdrec.samples.clock import clock, comparable, instant, microseconds_of, require_time
from hvdrec.samples.engine import INTERNAL, Engine, visible
from hvdrec.samples.feedback import CLOCK, KEY, ON, TIME, VALUE
from hvdrec.samples.raw_files import table_location
from hvdrec.samples.spec import SampleSpec
from hvdrec.storage.artifacts import StoredFiles, read_manifest
from hvdrec.storage.urls import Location

UNSETTLED = "unsettled"
"""Directory of the samples with the exposures and the feedback that the next run needs."""
NEVER = -(2**62)
"""Stands for the latest time of a table that has no times, in microseconds."""
META = "label_join"
"""Key of the counts in the manifest of the samples."""


@dataclass(frozen=True)
class RawFeedback:
    """The rows of a feedback table, with the columns that `feedback` describes.

    Attributes:
        rows: All rows, including rows without a key or a time.
        total: Number of rows.
    """

    rows: Table
    total: int


@dataclass(frozen=True)
class LabelTables:
    """The exposures and the feedback of a run.

    Attributes:
        exposures: All exposures with their CLOCK, including repeated rows and the unsettled
            exposures of the previous run.
        rows: Number of exposures.
        feedback: The feedback tables.
        end: End of the log, in microseconds.
        settled_before: The previous run has settled the exposures before this time; None if there
            is no previous run.
    """

    exposures: Table
    rows: int
    feedback: tuple[RawFeedback, ...]
    end: int
    settled_before: int | None


def open_tables(
    engine: Engine, spec: SampleSpec, raw: Location, exposures: Table, file: Location
) -> LabelTables:
    """Open the feedback tables; add the exposures that are unsettled since the run before.

    Args:
        engine: Runs the queries.
        spec: Definition of the samples.
        raw: Directory of the raw tables.
        exposures: The table of exposures.
        file: Location of that table, for error messages.

    Raises:
        UserError: A table or column is missing or has a type that does not fit.
    """
    samples = spec.samples
    left = [column for options in samples.feedback for column, _ in options.pairs]
    for column in (samples.user, samples.item, samples.time, *left, *samples.exposures.key):
        if column not in exposures.columns and (sql := samples.derive.get(column)):
            exposures = engine.derive(exposures, column, sql, f"samples.derive.{column}")
        if column not in exposures.columns:
            problem = f"column '{column}' is missing; the table has {choices(visible(exposures))}"
            raise invalid_file(file, problem, "correct the name or add it to samples.derive")
    require_time(exposures, samples.time, "samples.time", file)
    previous = _Previous.open(samples.exposures.unsettled)
    unit = samples.time_unit
    rows, end = _rows_and_end(engine, exposures, samples.time, unit, "samples.time_unit")
    ends = [end]
    if previous:
        exposures = _union(exposures, previous.table(engine, "exposures"))
        rows += previous.rows("exposures")
        ends.append(previous.end)
    exposures = exposures.mutate(**{CLOCK: clock(exposures[samples.time], unit)})
    tables = []
    for i, options in enumerate(samples.feedback):
        table, end = _open_feedback(engine, spec, raw, i, exposures)
        ends.append(end)
        if previous and (name := feedback_file(options.name)) in previous:
            carried = _internal(previous.table(engine, name))
            table = RawFeedback(_union(table.rows, carried), table.total + previous.rows(name))
        tables.append(table)
    end = max(ends)
    if samples.exposures.end:
        end = instant(samples.exposures.end, unit, "samples.exposures.end")
    return LabelTables(
        exposures, rows, tuple(tables), end, previous.settled_before if previous else None
    )


def feedback_file(name: str) -> str:
    """Return the name, without suffix, of the file with the carried rows of a feedback."""
    return f"feedback-{name}"


@dataclass(frozen=True)
class _Previous:
    """The unsettled exposures and the feedback in the samples of the previous run."""

    files: StoredFiles
    end: int
    settled_before: int

    @staticmethod
    def open(directory: str) -> _Previous | None:
        """Open the samples in a directory; return None if `directory` is empty."""
        if not directory:
            return None
        path = Path(directory)
        manifest = read_manifest(path, "samples")
        if META not in manifest.meta:
            problem = "was made without [[samples.feedback]], so nothing in it is unsettled"
            field = "samples.exposures.unsettled"
            raise invalid_value(field, directory, problem, "name the samples of the previous run")
        facts = manifest.meta[META]
        files = StoredFiles(path, manifest)
        return _Previous(files, int(facts["end"]), int(facts["settled_before"]))

    def __contains__(self, name: str) -> bool:
        return f"{UNSETTLED}/{name}.parquet" in self.files

    def rows(self, name: str) -> int:
        return int(pq.read_metadata(self._file(name)).num_rows)

    def table(self, engine: Engine, name: str) -> Table:
        file = self._file(name)
        return engine.read(file.parent, file.name)

    def _file(self, name: str) -> Path:
        return self.files.verified(f"{UNSETTLED}/{name}.parquet")


def _open_feedback(
    engine: Engine, spec: SampleSpec, raw: Location, number: int, exposures: Table
) -> tuple[RawFeedback, int]:
    """Open a feedback table; return its rows with the columns ON, KEY, TIME and VALUE, and its end.

    The end is the latest time in microseconds.
    """
    options, key = spec.samples.feedback[number], f"samples.feedback[{number}]"
    file = table_location(raw, options.table)
    table = engine.read(raw, options.table, spec.declared)
    if options.where:
        table = engine.derive(table, VALUE, options.where, f"{key}.where")
        if not (table[VALUE].type().is_boolean() or table[VALUE].type().is_integer()):
            problem = f"has type {table[VALUE].type()}"
            remedy = "write a condition, such as \"action = 'click'\""
            raise invalid_value(f"{key}.where", options.where, problem, remedy)
        table = table.filter(table[VALUE].cast("boolean").fill_null(False)).drop(VALUE)
    time, unit = options.time or spec.samples.time, options.time_unit or spec.samples.time_unit
    columns = {TIME: (f"{key}.time", time)}
    columns |= {f"{ON}{i}": (f"{key}.on", right) for i, (_, right) in enumerate(options.pairs)}
    columns |= {f"{KEY}{i}": (f"{key}.key", column) for i, column in enumerate(options.key)}
    if options.value:
        columns[VALUE] = (f"{key}.value", options.value)
    for name, (field, sql) in columns.items():
        if sql in table.columns:
            table = table.mutate(**{name: table[sql]})
        elif sql.isidentifier():
            problem = (
                f"column '{sql}' ({field}) is missing; the table has {choices(visible(table))}"
            )
            raise invalid_file(file, problem, "correct the name")
        else:
            table = engine.derive(table, name, sql, field)
    require_time(table, TIME, f"{key}.time", file, time)
    _require_comparable(table, exposures, options, file, key)
    value = _number(table, options.value, f"{key}.value")
    total, end = _rows_and_end(engine, table, TIME, unit, f"{key}.time_unit")
    table = table.mutate(**{TIME: clock(table[TIME], unit), VALUE: value})
    table = table.select(*dict.fromkeys((*columns, VALUE)))
    return RawFeedback(table, total), end


def _rows_and_end(
    engine: Engine, table: Table, time: str, unit: TimeUnit, key: str
) -> tuple[int, int]:
    """Return the number of rows and the latest time, in microseconds.

    `key` is the configuration key of the unit of numeric times, for error messages.
    """
    column = table[time]
    is_number = column.type().is_numeric()
    last = (column if is_number else clock(column, unit)).max()
    row: Mapping[str, Any] = engine.first(table.aggregate(rows=table.count(), last=last)) or {}
    if row["last"] is None:
        return int(row["rows"]), NEVER
    end = microseconds_of(row["last"], unit if is_number else "us", key)
    return int(row["rows"]), end


def _number(table: Table, expression: str, key: str) -> Value:
    """Return the value of each row as a float; NULL if `expression` is empty."""
    if not expression:
        return ibis.null("float64")
    dtype = table[VALUE].type()
    if not (dtype.is_numeric() or dtype.is_boolean()):
        raise invalid_value(key, expression, f"has type {dtype}", "it must give a number")
    return (table[VALUE].cast("int8") if dtype.is_boolean() else table[VALUE]).cast("float64")


def _require_comparable(
    table: Table, exposures: Table, options: Feedback, file: Location, key: str
) -> None:
    for i, (left, right) in enumerate(options.pairs):
        ours, theirs = exposures[left], table[f"{ON}{i}"]
        if comparable(ours, theirs) is None:
            problem = f"'{right}' is {theirs.type()}, but '{left}' of the exposures {ours.type()}"
            raise invalid_file(file, f"{problem} ({key}.on)", "use the same type in both tables")


def _union(table: Table, old: Table) -> Table:
    """Append the rows of a table of the previous run; columns that it lacks are NULL there."""
    columns: tuple[dict[str, Column], dict[str, Column]] = ({}, {})
    for name in table.columns:
        ours = table[name]
        theirs = old[name] if name in old.columns else ibis.null(ours.type())
        if ours.type().copy(nullable=True) != theirs.type().copy(nullable=True):
            pair = comparable(ours, theirs)
            ours, theirs = pair or (ours, theirs.cast(ours.type()))
        columns[0][name], columns[1][name] = ours, theirs
    return ibis.union(table.select(**columns[0]), old.select(**columns[1]))


def _internal(table: Table) -> Table:
    return table.rename({f"{INTERNAL}{name}": name for name in table.columns})
