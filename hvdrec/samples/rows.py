"""Collect labelled rows in memory, check them, and cast them to the declared types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hvdrec.errors import choices, invalid_file, invalid_value
from hvdrec.samples.columns import canonical, concatenate, encode_keys, family, type_name
from hvdrec.samples.join import (
    LABEL,
    ROW,
    WEIGHT,
    JoinedTable,
    LabelJoin,
    event,
    matched,
    task_label,
)
from hvdrec.samples.remedies import time_remedy, type_remedy
from hvdrec.samples.spec import SampleSpec
from hvdrec.samples.sql import basic_string, written

Array = NDArray[Any]


@dataclass(frozen=True)
class LabelledRows:
    """n labelled rows, sorted by `number`.

    Attributes:
        number: Number of each row among the interactions, int64 [n]; it depends only on the data.
        columns: Name -> column, for keys and features; cast to their declared types and compact
            (see `columns`).
        raw: Name -> column, for other columns that the samples need, such as the time; not cast.
        label: Label of each row, 0 or 1, float64 [n].
        weight: Weight of each row, float64 [n].
        events: For each history, True for the rows that are events of it, bool [n].
        tasks: For each task, the labels of the rows, float64 [n]; NaN if unknown.
        matched: For each joined table, True for the rows that have a match in it, bool [n].
    """

    number: Array
    columns: Mapping[str, pa.Array]
    raw: Mapping[str, pa.Array]
    label: Array
    weight: Array
    events: tuple[Array, ...]
    tasks: tuple[Array, ...]
    matched: tuple[Array, ...]


@dataclass(frozen=True)
class KeyCodes:
    """The users or items of n rows as numbers.

    Attributes:
        code: Index of each row's key in `values`, int64 [n].
        values: The distinct keys, in ascending order.
    """

    code: Array
    values: pa.Array

    @staticmethod
    def of(array: pa.Array) -> KeyCodes:
        """Number the keys of a compact column."""
        return KeyCodes(*encode_keys(array))


def collect_rows(join: LabelJoin, joined: JoinedTable, *, negatives: bool = False) -> LabelledRows:
    """Compute the labelled rows, check them, and cast features to their declared types.

    Args:
        join: The raw tables.
        joined: The joined interactions.
        negatives: True if the rows are sampled negatives, which have label 0.

    Raises:
        UserError: A column is missing, a key is null, a type is wrong, a label is not 0 or 1, or a
            weight is negative.
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
    events = [event(i) for i in range(len(samples.history))]
    tasks = [task_label(i) for i in range(len(spec.tasks))]
    matches = [matched(i) for i in range(len(join.sides))]
    flags = [*events, *matches]
    names = dict.fromkeys([ROW, LABEL, WEIGHT, *tasks, *flags, *spec.columns, *raw])
    columns = join.engine.collect(labelled.select(*names))
    number = columns[ROW].to_numpy()
    order = np.argsort(number)
    number = number[order]
    if len(number) > 1 and (np.diff(number) == 0).any():
        join.require_one_match()
    columns = {name: canonical(array.take(pa.array(order))) for name, array in columns.items()}
    label, weight, *task_labels = _numbers(columns, [LABEL, WEIGHT, *tasks])
    _check_label("samples.label", samples.label, join.file, label)
    _check_weight(samples.weight, join.file, weight)
    for i, (task, values) in enumerate(zip(spec.tasks, task_labels, strict=True)):
        _check_label(f"tasks[{i}].label", task.label, join.file, values[~np.isnan(values)])
    for name in (samples.user, samples.item):
        _check_key(joined.origin[name], name, columns[name])
    return LabelledRows(
        number,
        {name: spec.cast(name, columns[name], joined.origin[name]) for name in spec.columns},
        {name: columns[name] for name in raw},
        label,
        weight,
        _booleans(columns, events),
        tuple(task_labels),
        _booleans(columns, matches),
    )


def concatenate_rows(parts: Sequence[LabelledRows]) -> LabelledRows:
    """Concatenate several sets of rows."""

    def columns(of_parts: Iterable[Mapping[str, pa.Array]]) -> dict[str, pa.Array]:
        first, *rest = of_parts
        return {
            name: concatenate([array, *(part[name] for part in rest)], array.type)
            for name, array in first.items()
        }

    def arrays(of_parts: Iterable[tuple[Array, ...]]) -> tuple[Array, ...]:
        return tuple(np.concatenate(each) for each in zip(*of_parts, strict=True))

    return LabelledRows(
        np.concatenate([part.number for part in parts]),
        columns(part.columns for part in parts),
        columns(part.raw for part in parts),
        np.concatenate([part.label for part in parts]),
        np.concatenate([part.weight for part in parts]),
        arrays(part.events for part in parts),
        arrays(part.tasks for part in parts),
        arrays(part.matched for part in parts),
    )


def time_values(where: str, name: str, key: str, array: pa.Array) -> Array:
    """Convert a column of numbers, dates or timestamps to numbers in the same order [n].

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
    bad = array.null_count
    if dtype == "float" and not bad:
        bad = int((~np.isfinite(array.to_numpy())).sum())
    if bad:
        problem = f"column '{name}' ({key}) is null or not finite in {bad} rows"
        rule = f"{written(name)} IS NULL"
        if dtype == "float" and not array.null_count:
            rule = f"NOT isfinite({written(name)})"
        elif dtype == "float":
            rule += f" OR NOT isfinite({written(name)})"
        remedy = f"every row needs a time: drop them with samples.drop = {basic_string(rule)}"
        raise invalid_file(where, problem, remedy)
    return np.asarray(array.to_numpy())


def _other_columns(spec: SampleSpec) -> dict[str, str]:
    """Return each column that is needed besides keys and features -> what needs it."""
    samples, split = spec.samples, spec.samples.split
    columns = {samples.time: "samples.time"}
    if split.method == "temporal":
        columns[split.column] = "samples.split.column"
    if samples.negatives.per_positive:
        columns |= dict.fromkeys(samples.negatives.within, "samples.negatives.within")
    columns.pop("", None)
    return columns


def _numbers(columns: Mapping[str, pa.Array], names: Sequence[str]) -> list[Array]:
    # Cast to float, because DuckDB makes a literal such as 1.0 a decimal.
    return [columns[n].cast(pa.float64()).to_numpy(zero_copy_only=False) for n in names]


def _booleans(columns: Mapping[str, pa.Array], names: Sequence[str]) -> tuple[Array, ...]:
    return tuple(columns[n].to_numpy(zero_copy_only=False).astype(bool) for n in names)


def _check_key(where: str, name: str, array: pa.Array) -> None:
    if family(array.type) not in ("string", "integer"):
        allowed = choices(["string", "integer"])
        problem = f"key column '{name}' is {type_name(array.type)}, a key is {allowed}"
        raise invalid_file(
            where, problem, type_remedy(name, array, type_name(array.type), "string")
        )
    is_text = pa.types.is_dictionary(array.type)
    empty = array.null_count
    if is_text:
        empty += int(pc.sum(pc.equal(array.cast(pa.string()), "")).as_py() or 0)
    if empty:
        column = written(name)
        rule = f"{column} IS NULL OR {column} = ''" if is_text else f"{column} IS NULL"
        problem = f"key column '{name}' is null{' or empty' if is_text else ''} in {empty} rows"
        remedy = f"every row needs a key: drop them with samples.drop = {basic_string(rule)}"
        raise invalid_file(where, problem, remedy)


def _check_label(key: str, expression: str, file: object, label: Array) -> None:
    bad = label[~np.isin(label, (0.0, 1.0))]
    if len(bad):
        problem = f"is neither 0 nor 1 in {_example(bad, label, file)}"
        remedy = "write a condition such as 'rating > 3'"
        if np.isnan(bad).all():
            drop = basic_string(f"({expression}) IS NULL")
            remedy = f"write coalesce({expression}, false), or samples.drop = {drop}"
        raise invalid_value(key, expression, problem, remedy)


def _check_weight(expression: str, file: object, weight: Array) -> None:
    bad = weight[~(np.isfinite(weight) & (weight >= 0))]
    if len(bad):
        problem = f"is negative or not finite in {_example(bad, weight, file)}"
        raise invalid_value("samples.weight", expression, problem, "a weight is 0 or greater")


def _example(bad: Array, values: Array, file: object) -> str:
    value = "null" if np.isnan(bad[0]) else f"{bad[0]:g}"
    return f"{len(bad)} of {len(values)} rows of {file}, for example {value}"
