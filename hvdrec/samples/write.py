"""Writing the files of the samples artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvdrec.config import Config
from hvdrec.config.schema import Feature
from hvdrec.errors import UserError, choices
from hvdrec.samples.columns import cast, concatenated, plain
from hvdrec.samples.engine import Engine, visible
from hvdrec.samples.history import Events, Moments
from hvdrec.samples.rows import Keys, Rows, declared
from hvdrec.samples.sources import Joined, Side, Source, derive_ready
from hvdrec.samples.split import RANDOM

PART_ROWS = 524_288
ROW_GROUP_ROWS = 65_536
Array = NDArray[Any]


@dataclass(frozen=True)
class Histories:
    """Per history, its events of training rows alone and of all rows."""

    moments: Moments
    trained: dict[str, Events]
    everything: dict[str, Events]


def write_split(
    folder: Path, config: Config, rows: Rows, chosen: Array, histories: Histories | None
) -> None:
    """Write the chosen rows, in their order, as parts of a moderate size."""
    folder.mkdir()
    for part, start in enumerate(range(0, len(chosen), PART_ROWS)):
        index = chosen[start : start + PART_ROWS]
        groups = (
            _samples(config, rows, index[i : i + ROW_GROUP_ROWS], histories)
            for i in range(0, len(index), ROW_GROUP_ROWS)
        )
        _write(folder / f"part-{part:05d}.parquet", groups)


def write_users(
    file: Path, config: Config, users: pa.Table, histories: Histories | None, *, trained: bool
) -> None:
    """Write one row per user with the histories of training rows alone, or of all rows."""
    if histories is not None:
        events = histories.trained if trained else histories.everything
        for history in config.samples.history:
            latest = events[history.name].latest(
                len(users), histories.moments.times, history.length
            )
            users = users.append_column(history.name, latest)
    write_table(file, users)


def write_table(file: Path, table: pa.Table) -> None:
    """Write a table to one file."""
    _write(file, (table.slice(i, ROW_GROUP_ROWS) for i in range(0, len(table), ROW_GROUP_ROWS)))


def side_table(
    engine: Engine,
    config: Config,
    source: Source,
    rows: Joined,
    side: Side | None,
    keys: tuple[str, pa.Array],
    features: list[Feature],
    latest: tuple[Array, Rows],
) -> pa.Table:
    """Return one row per user or item, sorted by key: the key, its features, an item's title.

    side: the users' or the items' table, if there is one. keys: the key's name and the values that
    occur in samples, to which those of the items' table are added. latest: per value, a row number
    (-1 for none) into rows; features that are in no table of their own are taken from there.
    """
    samples = config.samples
    name, values = keys
    at, labelled_rows = latest
    is_item = name == samples.item
    own, where = _own_columns(engine, config, rows, side) if side else ({}, {})
    place = None
    if side:
        known = _keys(config, where[name], name, own[name])
        if is_item:
            values = Keys.of(concatenated([values, known], values.type)).values
            at = np.append(at, -1)[pc.fill_null(pc.index_in(values, keys[1]), -1).to_numpy()]
        place = pc.index_in(values, value_set=known)
    missing = pa.array(at, mask=at < 0)
    columns = {name: values}
    for feature in features:
        if feature.name == name:
            continue
        if feature.name in own:
            typed = declared(config, where[feature.name], feature.name, own[feature.name])
            columns[feature.name] = _taken(typed, place)
        else:
            columns[feature.name] = _taken(labelled_rows.columns[feature.name], missing)
    if is_item and samples.title:
        column, taken = samples.title, missing
        array, file = labelled_rows.raw.get(column), rows.origin.get(column, "")
        if column in own:
            array, file, taken = own[column], where[column], place
        if array is None:
            assert side is not None
            raise UserError(
                f"{side.file}: column '{column}' (samples.title) is missing; the table has "
                f"{choices(visible(side.table))}; correct the name"
            )
        title = cast(array, "string", where=file, name=column, purpose="samples.title")
        columns["title"] = _taken(title, taken)
    return pa.table({column: plain(array) for column, array in columns.items()})


def latest_rows(keys: Keys, order: Array) -> Array:
    """Return, per key, the last of its rows in `order`, int64 [keys], -1 for none.

    order: row numbers [m].
    """
    found = np.full(len(keys.values), -1, dtype=np.int64)
    # Of several assignments to one place, numpy keeps the last.
    found[keys.code[order]] = order
    return found


def _own_columns(
    engine: Engine, config: Config, rows: Joined, side: Side
) -> tuple[dict[str, pa.Array], dict[str, str]]:
    """Return the columns that a users' or items' table gives by itself, and where each is from.

    They are those that samples take from it, and those derived of nothing else.
    """
    derived = config.samples.derive
    taken = [
        c
        for c in side.table.columns
        if c in (*side.on, *derived) or rows.origin[c] == str(side.file)
    ]
    where = {column: str(side.file) for column in taken}
    waiting = {c: sql for c, sql in derived.items() if c not in side.on}
    table, left = derive_ready(engine, side.table.select(*taken), waiting, where)
    names = [f.name for f in config.features] + [config.samples.title]
    wanted = [c for c in table.columns if c in side.on or (c in names and c not in left)]
    return engine.collect(table.select(*wanted)), where


def _keys(config: Config, where: str, name: str, array: pa.Array) -> pa.Array:
    """Return the keys of a users' or items' table in the type that the samples have."""
    feature = next((f for f in config.features if f.name == name), None)
    if feature and feature.dtype == "int" and pa.types.is_dictionary(array.type):
        try:
            return plain(array).cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise UserError(
                f"{where}: key column '{name}' is string, feature '{name}' is of dtype 'int': "
                f"{str(error).splitlines()[0]}; declare dtype = 'string'"
            ) from None
    return plain(declared(config, where, name, array))


def _samples(config: Config, rows: Rows, index: Array, histories: Histories | None) -> pa.Table:
    positions = pa.array(index)
    columns = {name: array.take(positions) for name, array in rows.columns.items()}
    if histories is not None:
        # In a random split, later knowledge must not reach a feature: only training rows count.
        is_random = config.samples.split.method in RANDOM
        events = histories.trained if is_random else histories.everything
        for history in config.samples.history:
            of = events[history.name]
            lists = of.others if history.scope == "others" else of.before
            columns[history.name] = lists(histories.moments, index, history.length)
    columns["label"] = pa.array(rows.label[index].astype(np.float32))
    for task, label in zip(config.tasks, rows.tasks, strict=True):
        known = label[index]
        columns[task.column] = pa.array(known.astype(np.float32), mask=np.isnan(known))
    columns["weight"] = pa.array(rows.weight[index].astype(np.float32))
    if config.samples.time and "time" not in columns:
        columns["time"] = plain(rows.raw[config.samples.time].take(positions))
    return pa.table(columns)


def _taken(array: pa.Array, place: pa.Array) -> pa.Array:
    """Return entries by place; a null place gives null, or an empty list."""
    taken = array.take(place)
    if not pa.types.is_list(taken.type) or not taken.null_count:
        return taken
    lengths = pc.fill_null(pc.list_value_length(taken), 0).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), taken.flatten())


def _write(file: Path, groups: Any) -> None:
    """Write row groups; without Arrow's own schema, so that encoded strings are read as strings."""
    writer = None
    try:
        for table in groups:
            if writer is None:
                writer = pq.ParquetWriter(
                    file, table.schema, compression="zstd", store_schema=False
                )
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
    finally:
        if writer is not None:
            writer.close()
