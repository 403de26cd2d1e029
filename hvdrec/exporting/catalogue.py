"""What a bundle tells of items and users beside embeddings, out of the samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from numpy.typing import NDArray

from hvdrec.config import Config
from hvdrec.exporting.embed import key_array
from hvdrec.samples.split import SPLITS
from hvdrec.storage.urls import read_table

Array = NDArray[Any]
DAY = 86_400
EPOCH_SECONDS = (1e8, 1e11)
"""Numbers between them are seconds since 1970 (years 1973 to 5138); a thousand times as large,
milliseconds, and so on to nanoseconds. Smaller ones count something else."""


def write_catalogue(
    draft: Path,
    users: pa.Table,
    items: pa.Table,
    config: Config,
    notify: Callable[[str], None] = lambda _: None,
) -> None:
    """Write titles, popularity, trending counts, filters and what users have seen.

    users, items: the samples' tables of all users and items. Rows are in the order of sorted keys.

    trending: positives of the log's last ``export.trending_days``, over all splits; where the
    samples have no time that tells days, it equals popularity, positives of the training split.
    seen: the distinct pairs of users and items in the samples, over all splits. Samples do not
    tell drawn negatives from rows of the log: where negatives are drawn, only positives count.
    Rows that ``samples.drop`` left out are not there.
    """
    schema, export = config.schema, config.export
    item_order = np.argsort(key_array(items[schema.item_key]), kind="stable")
    items = items.take(item_order)
    folder = draft / "items"
    encoded = config.paths.of("features") / "items.parquet"
    # Rows of the encoded catalogue are those of the samples' catalogue.
    counts = read_table(encoded, ["train_count"])["train_count"].to_numpy()
    popularity = counts[item_order].astype(np.int64)
    _save(folder / "popularity.npy", popularity)
    if "title" in items.column_names:
        _write_titles(folder, items["title"])
    user_keys = users[schema.user_key].take(
        np.argsort(key_array(users[schema.user_key]), kind="stable")
    )
    log = _read_log(config, user_keys, items[schema.item_key])
    trending = _trending(log, export.trending_days, len(items))
    if trending is None:
        notify("the samples have no time that tells days: what is popular counts as trending")
        trending = popularity
    _save(folder / "trending.npy", trending)
    if export.seen:
        met = log.is_positive if config.samples.negatives.per_positive else slice(None)
        _write_lists(
            draft / "users" / "seen_{}.npy", log.user[met], log.item[met], len(users), len(items)
        )
    for name in export.filters:
        _write_filter(folder / "filters" / name, items[name])


@dataclass(frozen=True)
class _Log:
    """The samples of all splits. user, item: rows int64 [n]; seconds: float64 [n], if told."""

    user: Array
    item: Array
    is_positive: Array
    seconds: Array | None


def _read_log(config: Config, users: pa.ChunkedArray, items: pa.ChunkedArray) -> _Log:
    """Return the samples with the rows of their users and items; keys in the order of rows."""
    samples, schema = config.samples, config.schema
    # A feature or key that is called "time" stands in the place of samples.time.
    names = {schema.user_key, schema.item_key, *(f.name for f in schema.features)}
    has_time = bool(samples.time) and ("time" not in names or samples.time == "time")
    columns = [schema.user_key, schema.item_key, "label", *(["time"] if has_time else [])]
    files = [str(config.paths.of("samples") / split) for split in SPLITS]
    table = pa.concat_tables(
        [ds.dataset(file, format="parquet").to_table(columns=[*dict.fromkeys(columns)])
         for file in files]
    )  # fmt: skip
    return _Log(
        _rows(table[schema.user_key], users),
        _rows(table[schema.item_key], items),
        table["label"].to_numpy() == 1,
        _seconds(table["time"]) if has_time else None,
    )


def _rows(keys: pa.ChunkedArray, stored: pa.ChunkedArray) -> Array:
    found: Array = pc.index_in(keys, value_set=stored.combine_chunks()).to_numpy()
    return found.astype(np.int64)


def _seconds(times: pa.ChunkedArray) -> Array | None:
    """Return times as seconds, float64 [n]; None where they do not tell any."""
    kind = times.type
    if pa.types.is_timestamp(kind):
        units = {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}
        return np.asarray(times.cast(pa.int64()).to_numpy() / units[kind.unit])
    if pa.types.is_date(kind):
        return np.asarray(times.cast(pa.date32()).cast(pa.int32()).to_numpy() * float(DAY))
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return None
    numbers = times.to_numpy().astype(np.float64)
    latest = numbers.max(initial=0.0)
    for divisor in (1.0, 1e3, 1e6, 1e9):
        if EPOCH_SECONDS[0] <= latest / divisor < EPOCH_SECONDS[1]:
            return np.asarray(numbers / divisor)
    return None


def _trending(log: _Log, days: float, items: int) -> Array | None:
    if log.seconds is None or not len(log.seconds):
        return None
    recent = log.seconds > log.seconds.max() - days * DAY
    return np.bincount(log.item[recent & log.is_positive], minlength=items).astype(np.int64)


def _write_titles(folder: Path, column: pa.ChunkedArray) -> None:
    titles = [(title or "").encode() for title in column.to_pylist()]
    offsets = np.zeros(len(titles) + 1, dtype=np.int64)
    np.cumsum([len(title) for title in titles], out=offsets[1:])
    _save(folder / "titles.npy", np.frombuffer(b"".join(titles), dtype=np.uint8))
    _save(folder / "titles_offsets.npy", offsets)


def _write_filter(folder: Path, column: pa.ChunkedArray) -> None:
    """Write which rows have each value of a feature; null and empty values are missing."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if pa.types.is_list(array.type):
        rows, values = pc.list_parent_indices(array).to_numpy(), array.flatten()
    else:
        rows, values = np.arange(len(array)), array
    present = pc.is_valid(values)
    if pa.types.is_string(values.type):
        present = pc.and_kleene(present, pc.not_equal(values, ""))
    chosen = pc.fill_null(present, False).to_numpy(zero_copy_only=False)
    distinct, place = np.unique(
        key_array(pa.chunked_array([values.filter(pa.array(chosen))])), return_inverse=True
    )
    if not len(distinct):
        distinct = distinct.astype(np.int64 if distinct.dtype.kind == "i" else "S1")
    folder.mkdir(parents=True)
    _save(folder / "values.npy", distinct)
    _write_lists(folder / "{}.npy", place, rows[chosen], len(distinct), len(array))


def _write_lists(file: Path, place: Array, rows: Array, lists: int, items: int) -> None:
    """Write rows int32 in lists, ascending and each once; place: int64 [n], of which list.

    ``{}`` in the file's name stands for "offsets" and "rows".
    """
    pairs = np.unique(place.astype(np.int64) * max(1, items) + rows)
    offsets = np.searchsorted(pairs, np.arange(lists + 1, dtype=np.int64) * max(1, items))
    _save(Path(str(file).format("offsets")), offsets.astype(np.int64))
    _save(Path(str(file).format("rows")), (pairs % max(1, items)).astype(np.int32))


def _save(file: Path, array: Array) -> None:
    np.save(file, array, allow_pickle=False)
