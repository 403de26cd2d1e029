"""Making the samples artifact: join, label, draw negatives, split, add histories, write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hvdrec.config import Config
from hvdrec.config.sections import Samples
from hvdrec.config.structure import to_dict
from hvdrec.errors import UserError
from hvdrec.samples import negatives
from hvdrec.samples import sources as tables
from hvdrec.samples.columns import groups
from hvdrec.samples.engine import Engine, connect, visible
from hvdrec.samples.history import Events, Moments
from hvdrec.samples.rows import Keys, Rows, collect_rows, concatenated_rows, moments
from hvdrec.samples.split import RANDOM, SPLITS, shuffled, split_rows
from hvdrec.samples.write import (
    Histories,
    latest_rows,
    side_table,
    write_split,
    write_table,
    write_users,
)
from hvdrec.storage.artifacts import write_artifact

DRAWN_ROWS = 2_097_152
Array = NDArray[Any]
Notify = Callable[[str], None]


def make(
    config: Config,
    *,
    out: Path | None = None,
    overwrite: bool = False,
    notify: Notify = lambda _: None,
) -> dict[str, Any]:
    """Write the samples artifact of a configuration and return its meta.

    In this order: read the tables; join users, items and joins, with each derived column as soon
    as the columns it is made of are there; leave out dropped rows; label and weigh; divide into
    splits; draw negatives, which go to their positive's split, take its columns of the interactions
    and are joined anew; add histories. The result depends on the rows and the seeds, not on the
    order of rows in the files.

    Features of users (items) that their own table does not give take the value of the user's
    (item's) latest training row. Raises UserError for anything in the tables or the configuration
    that does not fit; what stood at `out` is then left as it was.
    """
    samples, schema = config.samples, config.schema
    _check(samples)
    meta: dict[str, Any] = {"config": to_dict(config)}
    target = out or config.paths.of("samples")
    with write_artifact(target, "samples", meta, overwrite=overwrite) as draft, connect() as engine:
        notify("reading and joining tables")
        source = tables.read_source(engine, config)
        joined = tables.joined(engine, config, source, source.interactions)
        table = tables.labelled(engine, config, source, joined)
        rows = collect_rows(engine, config, source, joined, table)
        real = len(rows.label)
        if not real:
            why = f"samples.drop = '{samples.drop}' leaves none"
            why = why if samples.drop else "the table is empty"
            raise UserError(f"{source.file}: no rows: {why}; give rows")
        notify(f"{real} labelled rows, {int(rows.label.sum())} positive")
        users, items = (
            Keys.of(rows.columns[schema.user_key]),
            Keys.of(rows.columns[schema.item_key]),
        )
        time = _time(config, joined, rows)
        split = split_rows(samples, users.code, _split_time(config, joined, rows, time))
        if samples.negatives.per_positive:
            _require_item_tables(config, source)
            drawn, positive = _drawn(engine, config, source, rows, users, items)
            notify(f"{len(positive)} negatives drawn")
            rows = concatenated_rows([rows, *drawn])
            split = np.concatenate([split, split[positive]])
            time = None if time is None else np.concatenate([time, time[positive]])
            users = Keys.of(rows.columns[schema.user_key])
            items = Keys.of(rows.columns[schema.item_key])
        histories = _histories(config, rows, users, split, time)
        _require_known(config, rows, split)
        meta["rows"], meta["positives"] = {}, {}
        if config.tasks:
            meta["tasks"] = {task.name: {} for task in config.tasks}
        for number, name in enumerate(SPLITS):
            chosen = np.flatnonzero(split == number)
            if number == 0:
                chosen = chosen[shuffled(len(chosen), samples.split.seed + 1)]
            elif time is not None:
                chosen = chosen[np.argsort(time[chosen], kind="stable")]
            meta["rows"][name] = len(chosen)
            meta["positives"][name] = int(rows.label[chosen].sum())
            notify(f"{name}: {len(chosen)} rows, {meta['positives'][name]} positive")
            for task, label in zip(config.tasks, rows.tasks, strict=True):
                known = label[chosen][~np.isnan(label[chosen])]
                counts = {"rows": len(known), "positives": int(known.sum())}
                meta["tasks"][task.name][name] = counts
                notify(f"{name}: {task.name}: {len(known)} rows, {counts['positives']} positive")
            write_split(draft / name, config, rows, chosen, histories)
        # The latest training row comes last; a drawn row says nothing of its item's own columns.
        trained = np.flatnonzero(split[:real] == 0)
        if time is not None:
            trained = trained[np.argsort(time[trained], kind="stable")]
        for side, key, keys in (
            ("user", schema.user_key, users),
            ("item", schema.item_key, items),
        ):
            table = side_table(
                engine,
                config,
                source,
                joined,
                next((s for s in source.sides if s.name == f"samples.{side}s"), None),
                (key, keys.values),
                [
                    f
                    for f in schema.features
                    if f.side == side and f.name not in {h.name for h in samples.history}
                ],
                (latest_rows(keys, trained), rows),
            )
            meta[f"{side}s"] = len(table)
            notify(f"{len(table)} {side}s")
            if side == "item":
                write_table(draft / "items.parquet", table)
                continue
            for name, is_trained in (("train", True), ("all", False)):
                file = draft / f"users_{name}.parquet"
                write_users(file, config, table, histories, trained=is_trained)
    return meta


def _check(samples: Samples) -> None:
    """Refuse what needs a time that is not named."""
    split = samples.split
    by_column = split.method == "temporal" and split.column
    if split.method in ("temporal", "leave-last-out") and not (samples.time or by_column):
        also = " or samples.split.column" if split.method == "temporal" else ""
        raise UserError(
            f"samples.split.method = '{split.method}': needs samples.time{also}, which is empty; "
            "name the column of the time, or take method = 'random'"
        )
    if samples.history and not samples.time:
        raise UserError(
            f"samples.history '{samples.history[0].name}': needs samples.time, which is empty; "
            "name the column of the time"
        )
    for history in samples.history:
        if history.scope == "others" and split.method not in RANDOM:
            raise UserError(
                f"samples.history '{history.name}': scope = 'others' tells of later rows, which "
                f"samples.split.method = '{split.method}' forbids; take scope = 'before'"
            )
        if history.scope == "others" and not history.repeats:
            raise UserError(
                f"samples.history '{history.name}': repeats = false goes with scope = 'before' "
                "alone; leave it out"
            )


def _require_known(config: Config, rows: Rows, split: Array) -> None:
    """Refuse a task of which no training row tells anything."""
    for i, (task, label) in enumerate(zip(config.tasks, rows.tasks, strict=True)):
        if np.isnan(label[split == 0]).all():
            raise UserError(
                f"tasks[{i}].label = '{task.label}': is NULL in every training row; correct the "
                "expression or leave the task out"
            )


def _time(config: Config, joined: tables.Joined, rows: Rows) -> Array | None:
    name = config.samples.time
    return moments(joined.origin[name], name, "samples.time", rows.raw[name]) if name else None


def _split_time(
    config: Config, joined: tables.Joined, rows: Rows, time: Array | None
) -> Array | None:
    """Return the values that order rows for the split."""
    split = config.samples.split
    if split.method != "temporal":
        return time
    name = split.column or config.samples.time
    array = rows.raw[name]
    if split.boundaries and (pa.types.is_temporal(array.type)):
        raise UserError(
            f"samples.split.boundaries = {list(split.boundaries)}: column '{name}' is "
            f"{array.type}, boundaries are numbers; derive a number, for example "
            f'samples.derive.day = "epoch({name}) / 86400", and name it in samples.split.column'
        )
    return (
        moments(joined.origin[name], name, "samples.split.column", array) if split.column else time
    )


def _require_item_tables(config: Config, source: tables.Source) -> None:
    """Refuse item features of the interactions: a drawn item would get its positive's values."""
    for feature in config.features:
        is_key = feature.name == config.samples.item
        if feature.side == "item" and not is_key and feature.name in visible(source.interactions):
            raise UserError(
                f"feature '{feature.name}': side 'item' but a column of {source.file}; with "
                "samples.negatives an item's columns must come from samples.items or samples.joins"
            )


def _drawn(
    engine: Engine, config: Config, source: tables.Source, rows: Rows, users: Keys, items: Keys
) -> tuple[list[Rows], Array]:
    """Return the drawn negatives, in parts, and for each the place of its positive in rows."""
    samples = config.samples
    within = groups([rows.raw[c] for c in samples.negatives.within], len(rows.label))
    positive = np.flatnonzero(rows.label == 1)
    place, item = negatives.draw(
        within,
        users.code,
        items.code,
        positive,
        samples.negatives.per_positive,
        samples.negatives.seed,
    )
    of = positive[place]
    first = int(rows.number.max()) + 1
    number = first + np.arange(len(of))
    context = source.interactions.drop(samples.item)
    parts = []
    for start in range(0, len(of), DRAWN_ROWS):
        part = slice(start, start + DRAWN_ROWS)
        pairs = engine.register(
            pa.table(
                {
                    "__drawn": pa.array(number[part]),
                    "__of": pa.array(rows.number[of[part]]),
                    samples.item: items.values.take(pa.array(item[part])),
                }
            )
        )
        interactions = pairs.inner_join(context, pairs["__of"] == context[tables.ROW])
        interactions = interactions.drop("__of", tables.ROW).rename({tables.ROW: "__drawn"})
        joined = tables.joined(engine, config, source, interactions, given=(samples.item,))
        table = tables.labelled(engine, config, source, joined, is_drawn=True)
        parts.append(collect_rows(engine, config, source, joined, table))
    kept = [part.number - first for part in parts]
    return parts, of[np.concatenate([np.zeros(0, dtype=np.int64), *kept])]


def _histories(
    config: Config, rows: Rows, users: Keys, split: Array, time: Array | None
) -> Histories | None:
    samples = config.samples
    if not samples.history:
        return None
    assert time is not None
    found = Moments.of(users.code, time)

    def events(allowed: Array) -> dict[str, Events]:
        made = {}
        for history, chosen in zip(samples.history, rows.events, strict=True):
            values = rows.columns[history.column or samples.item]
            code = None if history.repeats else groups([values], len(values))
            known = values.is_valid().to_numpy(zero_copy_only=False)
            made[history.name] = Events.of(values, found, chosen & allowed & known, code)
        return made

    return Histories(found, events(split == 0), events(split >= 0))
