"""Making the samples artifact: read, join, derive, label, draw negatives, split, add histories, write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvdrec.artifacts import write_artifact
from hvdrec.config import Config, to_dict
from hvdrec.errors import UserError
from hvdrec.samples import engine, negatives
from hvdrec.samples.columns import cast, key_type
from hvdrec.samples.engine import quoted
from hvdrec.samples.history import Events, combined_keys, slices, sort_events
from hvdrec.samples.split import SPLITS, split_sql
from hvdrec.schema import Feature

PART_ROWS = 524_288
Array = NDArray[Any]
Notify = Callable[[str], None]


@dataclass(frozen=True)
class _Histories:
    """Per configured history: its events, from training rows alone and from all rows."""

    trained: dict[str, Events]
    everything: dict[str, Events]
    key: Array
    base: Array


def make(
    config: Config,
    *,
    out: Path | None = None,
    overwrite: bool = False,
    notify: Notify = lambda _: None,
) -> dict[str, Any]:
    """Write the samples artifact of a configuration and return its meta.

    Columns derived in ``samples.derive`` are added as soon as the columns they name are there, so
    they may serve as keys of a join or be made of joined columns. Features of users (items) that are
    in no user (item) table take the value of the latest training row. Raises UserError for anything
    in the tables or the configuration that does not fit; nothing is then written.
    """
    samples = config.samples
    if not samples.interactions:
        raise UserError("samples.interactions: is empty; name the table of what was shown or done")
    meta: dict[str, Any] = {"config": to_dict(config)}
    target = out or config.paths.of("samples")
    with (
        write_artifact(target, "samples", meta, overwrite=overwrite) as draft,
        engine.connect() as db,
    ):
        notify("reading and joining tables")
        _read_tables(db, config)
        _labelled(db, config)
        if samples.negatives.per_positive:
            notify("drawing negatives")
            _add_negatives(db, config)
        db.execute(f"CREATE TABLE split_rows AS {split_sql(samples, 'labelled')}")
        _check_splits(db, config)
        notify("writing samples")
        meta |= _write_all(db, config, draft, notify)
    return meta


# ---------------------------------------------------------------- tables, joins, derived columns


def _read_tables(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    """Make the views ``interactions`` (with row numbers), ``users``, ``items``, ``join0`` …"""
    samples, raw = config.samples, Path(config.paths.raw)
    file = raw / samples.interactions
    found = engine.read_table(db, file, "raw_interactions")
    for key, column in (("user", samples.user), ("item", samples.item), ("time", samples.time)):
        if column:
            engine.require(file, found, column, f"samples.{key}")
    db.execute(
        "CREATE TABLE interactions AS "
        "SELECT (row_number() OVER ()) - 1 AS _row, * FROM raw_interactions"
    )
    for key in (samples.user, samples.item):
        empty = _count(db, f"SELECT count(*) FROM interactions WHERE {quoted(key)} IS NULL")
        if empty:
            raise UserError(
                f"{file}: column '{key}' is null in {empty} rows; a key is needed in every row: "
                "filter them out of the table"
            )
        key_type(file, key, engine.column_type(db, "interactions", key), config)
    for view, table, keys in _sides(config):
        found = engine.read_table(db, raw / table, view)
        for column in keys:
            engine.require(raw / table, found, column, f"key of {view}")
        names = ", ".join(quoted(column) for column in keys)
        twin = engine.first_row(
            db, f"SELECT {names} FROM {quoted(view)} GROUP BY ALL HAVING count(*) > 1"
        )
        if twin:
            shown = ", ".join(f"{k} = {v}" for k, v in zip(keys, twin, strict=True))
            raise UserError(f"{raw / table}: several rows have {shown}; keep one row per key")


def _sides(config: Config) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return (view, file, key columns) of every table that is joined."""
    samples = config.samples
    found: list[tuple[str, str, tuple[str, ...]]] = []
    if samples.users:
        found.append(("users", samples.users, (samples.user,)))
    if samples.items:
        found.append(("items", samples.items, (samples.item,)))
    found += [(f"join{i}", join.table, join.on) for i, join in enumerate(samples.joins)]
    return found


def _joined(db: duckdb.DuckDBPyConnection, config: Config, source: str, name: str) -> None:
    """Make a view of a relation joined with all tables, with all derived columns."""
    current, waiting = _derived(db, source, dict(config.samples.derive), f"{name}_0")
    for step, (view, table, keys) in enumerate(_sides(config), start=1):
        have = engine.columns(db, current)
        for key in keys:
            engine.require(Path(table), have, key, "key of the join, among the samples' columns")
        new = [c for c in engine.columns(db, view) if c not in have]
        on = " AND ".join(f"a.{quoted(k)}::VARCHAR = b.{quoted(k)}::VARCHAR" for k in keys)
        added = "".join(f", b.{quoted(column)}" for column in new)
        following = f"{name}_{step}j"
        db.execute(
            f"CREATE VIEW {following} AS SELECT a.*{added} FROM {current} a "
            f"LEFT JOIN {quoted(view)} b ON {on}"
        )
        current, waiting = _derived(db, following, waiting, f"{name}_{step}")
    for column, expression in waiting.items():
        engine.check_expression(db, current, expression, f"samples.derive.{column}")
    db.execute(f"CREATE VIEW {name} AS SELECT * FROM {current}")


def _derived(
    db: duckdb.DuckDBPyConnection, source: str, waiting: dict[str, str], name: str
) -> tuple[str, dict[str, str]]:
    """Add those derived columns whose own columns are there; return the view and what still waits."""
    current, left = source, dict(waiting)
    for number, (column, expression) in enumerate(waiting.items()):
        if not engine.binds(db, current, expression):
            continue
        following = f"{name}_{number}d"
        have = engine.columns(db, current)
        others = f"* EXCLUDE ({quoted(column)})" if column in have else "*"
        db.execute(
            f"CREATE VIEW {following} AS SELECT {others}, ({expression}) AS {quoted(column)} "
            f"FROM {current}"
        )
        current = following
        del left[column]
    return current, left


# ------------------------------------------------------------------------------ labels, negatives


def _labelled(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    """Make the table ``labelled``: joined rows that are not dropped, with label, weight and time."""
    samples = config.samples
    _joined(db, config, "interactions", "joined")
    for key, expression in (
        ("label", samples.label),
        ("weight", samples.weight),
        ("drop", samples.drop),
    ):
        if expression:
            engine.check_expression(db, "joined", expression, f"samples.{key}")
    for number, history in enumerate(samples.history):
        if history.where:
            engine.check_expression(db, "joined", history.where, f"samples.history[{number}].where")
    kept = f"WHERE ({samples.drop}) IS NOT TRUE" if samples.drop else ""
    try:
        db.execute(
            f"CREATE TABLE labelled AS SELECT {_facts(db, config, 'joined', samples.label)} "
            f"FROM joined {kept} ORDER BY _row"
        )
    except duckdb.Error as error:
        raise UserError(
            f"samples.label = '{samples.label}': {engine.first_line(error)}; it must give 0 or 1"
        ) from None
    file = Path(config.paths.raw) / samples.interactions
    if not _count(db, "SELECT count(*) FROM labelled"):
        raise UserError(f"{file}: no rows are left; check samples.drop = '{samples.drop}'")
    bad = engine.first_row(
        db,
        "SELECT _label, count(*) FROM labelled WHERE _label IS NULL OR _label NOT IN (0, 1) "
        "GROUP BY _label ORDER BY ALL LIMIT 1",
    )
    if bad:
        value = "null" if bad[0] is None else f"{bad[0]:g}"
        raise UserError(
            f"samples.label = '{samples.label}': gives {value} in {bad[1]} rows of {file}; "
            "it must give 0 or 1 (for example 'rating > 3')"
        )
    bad = engine.first_row(
        db,
        "SELECT _weight FROM labelled WHERE _weight IS NULL OR NOT isfinite(_weight) "
        "OR _weight < 0 LIMIT 1",
    )
    if bad:
        value = "null" if bad[0] is None else f"{bad[0]:g}"
        raise UserError(
            f"samples.weight = '{samples.weight}': gives {value} in rows of {file}; a weight is a "
            "number that is not negative"
        )
    if samples.time and _count(db, "SELECT count(*) FROM labelled WHERE _time IS NULL"):
        raise UserError(
            f"{file}: column '{samples.time}' (samples.time) holds nulls; fill or drop them"
        )


def _facts(
    db: duckdb.DuckDBPyConnection, config: Config, relation: str, label: str, drawn: bool = False
) -> str:
    """Return the SQL list of a labelled row's columns."""
    samples = config.samples
    time = "NULL::BIGINT"
    if samples.time:
        kind = engine.column_type(db, relation, samples.time)
        plain = quoted(samples.time)
        is_moment = kind.startswith(("TIMESTAMP", "DATE"))
        time = f"epoch_us({plain}::TIMESTAMP)" if is_moment else plain
    histories = "".join(
        f", coalesce({f'({h.where})' if h.where else f'({label})::DOUBLE = 1'}, false) "
        f"AND NOT {drawn} AS _event{i}"
        for i, h in enumerate(samples.history)
    )
    weight = f"({samples.weight})" if samples.weight and not drawn else "1"
    return (
        f"*, ({label})::DOUBLE AS _label, {weight}::DOUBLE AS _weight, {time} AS _time{histories}"
    )


def _add_negatives(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    """Append drawn negatives to ``labelled``, joined anew for their items."""
    samples = config.samples
    within = samples.negatives.within
    have = engine.columns(db, "labelled")
    for column in within:
        engine.require(
            Path(config.paths.raw) / samples.interactions, have, column, "samples.negatives.within"
        )
    same = ", ".join(quoted(column) for column in within) or "1"
    codes = db.sql(
        f"""SELECT dense_rank() OVER (ORDER BY {same}) - 1 AS g,
                   dense_rank() OVER (ORDER BY {quoted(samples.user)}) - 1 AS u,
                   dense_rank() OVER (ORDER BY {quoted(samples.item)}) - 1 AS i,
                   _label, _row FROM labelled ORDER BY _row"""
    ).fetchnumpy()
    keys = db.sql(
        f"SELECT DISTINCT {quoted(samples.item)} AS k FROM labelled ORDER BY k"
    ).to_arrow_table()["k"]
    positive = np.flatnonzero(codes["_label"] == 1)
    position, item = negatives.draw(
        codes["g"].astype(np.int64),
        codes["u"].astype(np.int64),
        codes["i"].astype(np.int64),
        positive,
        samples.negatives.per_positive,
        samples.negatives.seed,
    )
    drawn = pa.table(
        {"_positive": codes["_row"][positive][position], "_drawn": keys.take(pa.array(item))}
    )
    db.register("drawn", drawn)
    first = int(codes["_row"].max()) + 1
    kept = [c for c in engine.columns(db, "interactions") if c not in ("_row", samples.item)]
    db.execute(
        f"""CREATE TABLE negative_interactions AS
            SELECT {first} + (row_number() OVER (ORDER BY d._positive, d._drawn)) - 1 AS _row,
                   {", ".join(f"t.{quoted(c)}" for c in kept)}, d._drawn AS {quoted(samples.item)}
            FROM drawn d JOIN interactions t ON t._row = d._positive"""
    )
    _joined(db, config, "negative_interactions", "joined_negatives")
    facts = _facts(db, config, "joined_negatives", "0", drawn=True)
    db.execute(f"INSERT INTO labelled BY NAME SELECT {facts} FROM joined_negatives ORDER BY _row")


def _check_splits(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    split = config.samples.split
    rows = dict(db.sql("SELECT _split, count(*) FROM split_rows GROUP BY _split").fetchall())
    for number, name in enumerate(SPLITS):
        if not rows.get(number):
            raise UserError(
                f"samples.split: the {name} split is empty (method '{split.method}', fractions "
                f"{list(split.fractions)}, boundaries {list(split.boundaries)}); "
                "choose other cuts or give more rows"
            )


# ---------------------------------------------------------------------------------------- writing


def _write_all(
    db: duckdb.DuckDBPyConnection, config: Config, draft: Path, notify: Notify
) -> dict[str, Any]:
    samples, schema = config.samples, config.schema
    file = Path(config.paths.raw) / samples.interactions
    histories = {history.name for history in samples.history}
    side_of = {f.name: f.side for f in schema.features}
    have = engine.columns(db, "split_rows")
    for feature in schema.features:
        if feature.name not in histories:
            engine.require(file, have, feature.name, f"feature '{feature.name}'")
    names = [schema.user_key, schema.item_key, *(f.name for f in schema.features)]
    names = [name for name in dict.fromkeys(names) if name not in histories]
    selected = ", ".join(quoted(name) for name in names)
    events = "".join(f", _event{i}" for i in range(len(samples.history)))
    rows = db.sql(
        f"""SELECT {selected}, _label, _weight, _time, _split{events},
                   dense_rank() OVER (ORDER BY {quoted(samples.user)}) - 1 AS _user
            FROM split_rows ORDER BY _row"""
    ).to_arrow_table()
    data: dict[str, pa.ChunkedArray] = {}
    for name in names:
        data[name] = cast(file, name, rows[name], _feature_of(config, name))
    split = rows["_split"].to_numpy()
    label = rows["_label"].to_numpy()
    found = _histories(config, rows, data[schema.item_key].combine_chunks(), split)
    meta: dict[str, Any] = {"rows": {}, "positives": {}}
    random = np.random.default_rng(samples.split.seed)
    time = rows["_time"].to_numpy()
    for number, name in enumerate(SPLITS):
        chosen = np.flatnonzero(split == number)
        if number == 0:
            chosen = random.permutation(chosen)
        elif samples.time:
            chosen = chosen[np.argsort(time[chosen], kind="stable")]
        meta["rows"][name] = len(chosen)
        meta["positives"][name] = int(label[chosen].sum())
        notify(f"{name}: {len(chosen)} rows, {meta['positives'][name]} positive")
        (draft / name).mkdir()
        for part, start in enumerate(range(0, len(chosen), PART_ROWS)):
            index = chosen[start : start + PART_ROWS]
            table = _rows(config, data, rows, found, index)
            pq.write_table(table, draft / name / f"part-{part:05d}.parquet", compression="zstd")
    del rows
    for side, key in (("user", schema.user_key), ("item", schema.item_key)):
        features = [f for f in schema.features if side_of[f.name] == side]
        table = _side_table(db, config, side, key, [f for f in features if f.name not in histories])
        meta[f"{side}s"] = table.num_rows
        if side == "item":
            pq.write_table(table, draft / "items.parquet", compression="zstd")
            continue
        for suffix, events_of in (("train", found.trained), ("all", found.everything)):
            whole = _with_user_histories(config, table, data[key], found, events_of)
            pq.write_table(whole, draft / f"users_{suffix}.parquet", compression="zstd")
    return meta


def _feature_of(config: Config, name: str) -> Feature | None:
    return next((f for f in config.features if f.name == name), None)


def _histories(config: Config, rows: pa.Table, items: pa.Array, split: Array) -> _Histories:
    """Sort the events of every history, once of training rows and once of all."""
    samples = config.samples
    if not samples.history:
        empty = np.zeros(0, dtype=np.int64)
        return _Histories({}, {}, empty, empty)
    if not samples.time:
        raise UserError("samples.history: needs samples.time; name the column of the time")
    key, base = combined_keys(rows["_user"].to_numpy(), rows["_time"].to_numpy())
    items = items.chunk(0) if isinstance(items, pa.ChunkedArray) else items
    trained, everything = {}, {}
    for number, history in enumerate(samples.history):
        is_event = rows[f"_event{number}"].to_numpy().astype(bool)
        trained[history.name] = sort_events(items, key, is_event & (split == 0))
        everything[history.name] = sort_events(items, key, is_event)
    return _Histories(trained, everything, key, base)


def _rows(
    config: Config,
    data: dict[str, pa.ChunkedArray],
    rows: pa.Table,
    found: _Histories,
    index: Array,
) -> pa.Table:
    """Return samples by row number, with their histories."""
    samples = config.samples
    positions = pa.array(index)
    # In a random split, later knowledge must not reach a feature: only training rows count.
    is_random = samples.split.method in ("random", "random-per-user")
    events = found.trained if is_random else found.everything
    columns = {name: column.take(positions) for name, column in data.items()}
    for history in samples.history:
        start, stop = events[history.name].before(
            found.key[index], found.base[index], history.length
        )
        columns[history.name] = slices(events[history.name].items, start, stop)
    columns["label"] = rows["_label"].take(positions).cast(pa.float32())
    columns["weight"] = rows["_weight"].take(positions).cast(pa.float32())
    if samples.time and "time" not in columns:
        columns["time"] = rows["_time"].take(positions)
    return pa.table(columns)


def _with_user_histories(
    config: Config,
    table: pa.Table,
    users: pa.ChunkedArray,
    found: _Histories,
    events: dict[str, Events],
) -> pa.Table:
    """Add to a table of users their latest histories."""
    if not config.samples.history:
        return table
    # Any row of a user tells where that user's keys begin; the next user's beginning is their end.
    row = pc.index_in(table[config.schema.user_key], value_set=users).to_numpy()
    starts = np.unique(found.base)
    begin = found.base[row]
    following = np.searchsorted(starts, begin, side="right")
    end = np.append(starts, np.iinfo(np.int64).max)[following]
    for history in config.samples.history:
        start, stop = events[history.name].before(end, begin, history.length)
        table = table.append_column(history.name, slices(events[history.name].items, start, stop))
    return table


def _side_table(
    db: duckdb.DuckDBPyConnection, config: Config, side: str, key: str, features: list[Feature]
) -> pa.Table:
    """Return one row per user (item): key, features and, for items, the title; sorted by key."""
    samples = config.samples
    source = samples.users if side == "user" else samples.items
    view = f"{side}s"
    wanted = [f.name for f in features if f.name != key]
    if side == "item" and samples.title:
        wanted.append(samples.title)
    static = "(SELECT NULL WHERE false)"
    own: list[str] = []
    if source:
        static, _ = _derived(db, view, dict(samples.derive), f"{view}_own")
        own = [name for name in wanted if name in engine.columns(db, static)]
    have = engine.columns(db, "split_rows")
    latest = [name for name in wanted if name not in own]
    for name in latest:
        engine.require(Path(config.paths.raw) / (source or samples.interactions), have, name, side)
    k = quoted(key)
    order = "_time, _row" if samples.time else "_row"
    seen = "".join(
        f", arg_max({quoted(n)}, ROW({order})) FILTER (_split = 0 AND {quoted(n)} IS NOT NULL) "
        f"AS {quoted(n)}"
        for n in latest
    )
    joined_columns = "".join(f", s.{quoted(n)}" for n in own) + "".join(
        f", d.{quoted(n)}" for n in latest
    )
    # Users are those of the samples; the catalogue also holds items that nobody has met yet.
    join = "FULL JOIN" if side == "item" else "LEFT JOIN"
    done = (
        f"(SELECT {k}::VARCHAR AS _key, any_value({k}) AS {k}{seen} FROM split_rows GROUP BY ALL)"
    )
    if source:
        query = (
            f"SELECT coalesce(d.{k}::VARCHAR, s.{k}::VARCHAR) AS {k}{joined_columns} "
            f"FROM {done} d {join} {static} s ON d._key = s.{k}::VARCHAR"
        )
    else:
        query = f"SELECT d._key AS {k}{joined_columns} FROM {done} d"
    table = db.sql(query).to_arrow_table()
    file = Path(config.paths.raw) / (source or samples.interactions)
    feature = _feature_of(config, key)
    keys = table[key].cast(pa.int64()) if feature and feature.dtype == "int" else table[key]
    columns = {key: keys}
    for item in features:
        if item.name != key:
            columns[item.name] = cast(file, item.name, table[item.name], item)
    if side == "item" and samples.title:
        columns["title"] = table[samples.title].cast(pa.string())
    whole = pa.table(columns)
    return whole.sort_by([(key, "ascending")]).combine_chunks()


def _count(db: duckdb.DuckDBPyConnection, query: str) -> int:
    row = engine.first_row(db, query)
    return int(row[0]) if row else 0
