"""Labelled rows in memory: collected from the engine, checked and in their declared types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ibis.expr.types import Table
from numpy.typing import NDArray

from hvdrec.config import Config
from hvdrec.config.sections import Samples
from hvdrec.errors import UserError, choices
from hvdrec.samples.columns import canonical, cast, codes, concatenated, family, type_name
from hvdrec.samples.engine import Engine
from hvdrec.samples.sources import (
    LABEL,
    ROW,
    WEIGHT,
    Joined,
    Source,
    event,
    require_columns,
    require_one_match,
    task_label,
)

Array = NDArray[Any]


@dataclass(frozen=True)
class Rows:
    """Labelled rows in an order that depends on the data alone; arrays are [n], compact.

    number: of the interaction. columns: keys and features in their declared types. raw: as
    collected, the columns that serve something else. label, weight: float64. events: per history,
    whether the row is one of its events. tasks: per task its label, float64, NaN where unknown.
    """

    number: Array
    columns: Mapping[str, pa.Array]
    raw: Mapping[str, pa.Array]
    label: Array
    weight: Array
    events: tuple[Array, ...]
    tasks: tuple[Array, ...]


@dataclass(frozen=True)
class Keys:
    """Users or items by number. code: int64 [n]; values: the distinct keys, ascending."""

    code: Array
    values: pa.Array

    @staticmethod
    def of(array: pa.Array) -> Keys:
        """Number keys by their rank."""
        return Keys(*codes(array))


def feature_columns(config: Config) -> list[str]:
    """Return the keys and the features that are no histories, each once."""
    histories = {history.name for history in config.samples.history}
    names = [config.samples.user, config.samples.item, *(f.name for f in config.features)]
    return [name for name in dict.fromkeys(names) if name not in histories]


def collect_rows(
    engine: Engine, config: Config, source: Source, rows: Joined, table: Table
) -> Rows:
    """Run the label join, check what came out and cast features to their declared types.

    rows: the joined tables; table: the same with label, weight and events. Raises UserError for a
    missing column, a null key, a wrong type, a label that is not 0 or 1, a negative weight.
    """
    samples = config.samples
    histories = {history.name for history in samples.history}
    require_columns(
        source,
        rows,
        {f.name: f"feature '{f.name}'" for f in config.features if f.name not in histories},
    )
    more = {name: purpose for purpose, name in _other_columns(samples) if name}
    title = samples.title if samples.title in table.columns else ""
    if samples.title and not (title or samples.items):
        more[samples.title] = "samples.title"
    require_columns(source, rows, more)
    features = feature_columns(config)
    events = [event(i) for i in range(len(samples.history))]
    tasks = [task_label(i) for i in range(len(config.tasks))]
    raw_names = [*more, *([title] if title else [])]
    wanted = dict.fromkeys([ROW, LABEL, WEIGHT, *tasks, *events, *features, *raw_names])
    found = engine.collect(table.select(*wanted))
    number = found[ROW].to_numpy()
    order = np.argsort(number)
    number = number[order]
    if len(number) > 1 and (np.diff(number) == 0).any():
        require_one_match(engine, source)
    for name in found:
        found[name] = canonical(found[name].take(pa.array(order)))
    # A literal 1.0 is a decimal to some engines.
    label, weight, *of_tasks = (
        found[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
        for name in (LABEL, WEIGHT, *tasks)
    )
    _check_numbers(samples, source.file, label, weight)
    for i, (task, values) in enumerate(zip(config.tasks, of_tasks, strict=True)):
        _check_label(f"tasks[{i}].label", task.label, source.file, values[~np.isnan(values)])
    for name in (samples.user, samples.item):
        _check_key(rows.origin[name], name, found[name])
    columns = {name: declared(config, rows.origin[name], name, found[name]) for name in features}
    return Rows(
        number,
        columns,
        {name: found[name] for name in raw_names},
        label,
        weight,
        tuple(found[name].to_numpy(zero_copy_only=False).astype(bool) for name in events),
        tuple(of_tasks),
    )


def declared(config: Config, where: str, name: str, array: pa.Array) -> pa.Array:
    """Return a key or feature in its declared type (a key that is no feature: as a string)."""
    feature = next((f for f in config.features if f.name == name), None)
    if feature is None:
        return cast(array, "string", where=where, name=name, purpose="a key")
    purpose = f"feature '{name}'"
    return cast(
        array, feature.dtype, where=where, name=name, purpose=purpose, lists=feature.is_list
    )


def concatenated_rows(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all parts, one after the other."""

    def arrays(columns: Sequence[Mapping[str, pa.Array]]) -> dict[str, pa.Array]:
        return {
            name: concatenated([part[name] for part in columns], array.type)
            for name, array in columns[0].items()
        }

    return Rows(
        np.concatenate([part.number for part in parts]),
        arrays([part.columns for part in parts]),
        arrays([part.raw for part in parts]),
        np.concatenate([part.label for part in parts]),
        np.concatenate([part.weight for part in parts]),
        tuple(np.concatenate(of) for of in zip(*(part.events for part in parts), strict=True)),
        tuple(np.concatenate(of) for of in zip(*(part.tasks for part in parts), strict=True)),
    )


def moments(where: str, name: str, key: str, array: pa.Array) -> Array:
    """Return a column of times as sortable numbers [n].

    where, name, key: file, column and configuration key, for the UserError that a null or another
    type raises.
    """
    kind = family(array.type)
    if kind not in ("integer", "float", "decimal", "date", "timestamp"):
        raise UserError(
            f"{where}: column '{name}' ({key}) is {type_name(array.type)}, a time is "
            f"{choices(['integer', 'float', 'date', 'timestamp'])}; derive it, for example "
            f'samples.derive.{name} = "CAST({name} AS TIMESTAMP)"'
        )
    if kind == "date":
        array = array.cast(pa.date32()).cast(pa.int32())
    elif kind != "float":
        array = array.cast(pa.float64() if kind == "decimal" else pa.int64())
    bad = array.null_count
    if kind == "float" and not bad:
        bad = int((~np.isfinite(array.to_numpy())).sum())
    if bad:
        raise UserError(
            f"{where}: column '{name}' ({key}) is null or not finite in {bad} rows; every row "
            f'needs a time: leave them out with samples.drop = "{name} IS NULL"'
        )
    return np.asarray(array.to_numpy())


def _other_columns(samples: Samples) -> list[tuple[str, str]]:
    """Return (what needs it, column) of the columns that are wanted beside keys and features."""
    split = samples.split
    return [
        ("samples.time", samples.time),
        ("samples.split.column", split.column if split.method == "temporal" else ""),
        *(
            ("samples.negatives.within", column)
            for column in (samples.negatives.within if samples.negatives.per_positive else ())
        ),
    ]


def _check_key(where: str, name: str, array: pa.Array) -> None:
    if family(array.type) not in ("string", "integer"):
        raise UserError(
            f"{where}: key column '{name}' is {type_name(array.type)}, a key is "
            f"{choices(['string', 'integer'])}; derive it, for example "
            f'samples.derive.{name} = "CAST({name} AS BIGINT)"'
        )
    empty = array.null_count
    if pa.types.is_dictionary(array.type):
        empty += int(pc.sum(pc.equal(array.cast(pa.string()), "")).as_py() or 0)
    if empty:
        is_text = pa.types.is_dictionary(array.type)
        rule = f"{name} IS NULL OR {name} = ''" if is_text else f"{name} IS NULL"
        raise UserError(
            f"{where}: key column '{name}' is null{' or empty' if is_text else ''} in {empty} "
            f'rows; every row needs a key: leave them out with samples.drop = "{rule}"'
        )


def _check_label(key: str, expression: str, file: Path, label: Array) -> None:
    bad = label[~np.isin(label, (0.0, 1.0))]
    if len(bad):
        raise UserError(
            f"{key} = '{expression}': is neither 0 nor 1 in {len(bad)} of {len(label)} "
            f"rows of {file}, for example {_shown(bad[0])}; write a condition such as 'rating > 3'"
        )


def _check_numbers(samples: Samples, file: Path, label: Array, weight: Array) -> None:
    _check_label("samples.label", samples.label, file, label)
    bad = weight[~(np.isfinite(weight) & (weight >= 0))]
    if len(bad):
        raise UserError(
            f"samples.weight = '{samples.weight}': is negative or no number in {len(bad)} of "
            f"{len(weight)} rows of {file}, for example {_shown(bad[0])}; a weight is 0 or greater"
        )


def _shown(value: float) -> str:
    return "null" if np.isnan(value) else f"{value:g}"
