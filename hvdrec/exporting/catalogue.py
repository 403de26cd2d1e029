"""Write the data of a bundle besides embeddings: titles, counts, filters, items seen by users."""

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
from hvdrec.config.names import file_name
from hvdrec.exporting.embed import key_array
from hvdrec.exporting.known_rows import KNOWN_UNTIL, latest_of_each
from hvdrec.features.raw import one_chunk
from hvdrec.samples.split import SPLITS, STATES
from hvdrec.samples.times import DAY, comparable_times, epoch_seconds
from hvdrec.storage.parquet import read_table

Array = NDArray[Any]


def write_catalogue(
    draft: Path,
    users: pa.Table,
    items: pa.Table,
    config: Config,
    notify: Callable[[str], None] = lambda _: None,
    *,
    users_know: str = "all",
) -> dict[str, Any]:
    """Write titles, popularity, trending counts, filters and seen items, sorted by item key.

    Popularity is the number of positive rows of an item in the training split. The trending count
    is the number in the last ``export.trending_days`` of the log, or the popularity if the samples
    have no times. The seen items of a user are the items of the user's positive rows, or of all the
    user's rows if ``evaluate.seen = "shown"``. Trending counts and seen items use the splits that
    ``export.users_as_of`` names.

    Args:
        draft: Directory of the bundle.
        users: Table of all users from the samples.
        items: Table of all items from the samples.
        config: Configuration of the run.
        notify: Called with a line of text if there are no times.
        users_know: One of `samples.split.STATES`: the splits that the users' embeddings depend on.

    Returns:
        Facts for the manifest about the log rows that the users' and the items' data depend on.
        ``users`` and ``items`` each hold the names of the ``splits`` and the latest time in them,
        ``until``. ``time`` is the name of the time column; ``type`` is "timestamp" or "number".
    """
    schema, export = config.schema, config.export
    item_order = np.argsort(key_array(items[schema.item_key]), kind="stable")
    items = items.take(item_order)
    folder = draft / "items"
    encoded = config.paths.of("features") / "items.parquet"
    # The encoded table of items has the same rows, in the same order, as the table in the samples.
    counted = schema.own_name("train_count")
    counts = read_table(encoded, [counted])[counted].to_numpy()
    popularity = counts[item_order].astype(np.int64)
    _save(folder / "popularity.npy", popularity)
    if (title := schema.own_name("title")) in items.column_names:
        _write_titles(folder, items[title])
    user_keys = users[schema.user_key].take(
        np.argsort(key_array(users[schema.user_key]), kind="stable")
    )
    log = _read_log(config, user_keys, items[schema.item_key])
    known = log.until(STATES.index(export.users_as_of))
    trending = _trending(known, export.trending_days, len(items))
    if trending is None:
        notify("the samples have no times: trending counts equal popularity")
        trending = popularity
    _save(folder / "trending.npy", trending)
    if export.seen:
        seen = slice(None) if config.evaluate.seen == "shown" else known.is_positive
        user, item = known.user[seen], known.item[seen]
        _write_lists(draft / "users" / "seen_{}.npy", user, item, len(users), len(items))
    for name in export.filters:
        _write_filter(folder / "filters" / file_name(name), items[name])
    facts = _write_known(draft, log, STATES.index(users_know), len(users))
    return facts | {"time": config.samples.time}


@dataclass(frozen=True)
class _Log:
    """n samples from the first splits, ordered by split.

    Attributes:
        split: Split of each sample, as an index into `SPLITS`, int8 [n].
        user: Row of each sample's user in the bundle, int64 [n].
        item: Row of each sample's item in the bundle, int64 [n].
        is_positive: True for each sample with label 1, bool [n].
        time: Time of each sample, float64 [n]; None if there are no times. See `comparable_times`.
        time_type: "timestamp" or "number"; empty if there are no times.
        splits: Number of splits: 1 for train, 2 for train and validation, 3 for all.
    """

    split: Array
    user: Array
    item: Array
    is_positive: Array
    time: Array | None
    time_type: str
    splits: int = len(SPLITS)

    def until(self, state: int) -> _Log:
        """Return the samples up to the end of split number `state`."""
        kept = self.split <= state
        return _Log(
            self.split[kept],
            self.user[kept],
            self.item[kept],
            self.is_positive[kept],
            None if self.time is None else self.time[kept],
            self.time_type,
            state + 1,
        )

    @property
    def latest(self) -> float | None:
        """Latest time of a sample; None if there are no times."""
        return float(self.time.max()) if self.time is not None and len(self.time) else None


def _read_log(config: Config, users: pa.ChunkedArray, items: pa.ChunkedArray) -> _Log:
    """Read all samples; `users` and `items` hold the key of each row in the bundle."""
    schema = config.schema
    label = schema.own_name("label")
    files = [str(config.paths.of("samples") / split) for split in SPLITS]
    splits = [ds.dataset(file, format="parquet") for file in files]
    # Earlier versions did not store the times if a feature or key was named "time".
    names = splits[0].schema.names if config.samples.time else []
    time = next((t for t in (schema.own_name("time"), config.samples.time) if t in names), None)
    columns = [schema.user_key, schema.item_key, label, *([time] if time else [])]
    parts = [split.to_table(columns=columns) for split in splits]
    table = pa.concat_tables(parts)
    times = comparable_times(table[time]) if time else None
    return _Log(
        np.repeat(np.arange(len(SPLITS), dtype=np.int8), [part.num_rows for part in parts]),
        _rows(table[schema.user_key], users),
        _rows(table[schema.item_key], items),
        table[label].to_numpy() == 1,
        None if times is None else times[1],
        "" if times is None else times[0],
    )


def _write_known(draft: Path, log: _Log, state: int, users: int) -> dict[str, Any]:
    """Write the latest sample time that each user's data depend on; return facts for the manifest.

    `state` is the number of the last split that the users' data depend on. The items' data depend
    only on the training split.
    """
    known, trained = log.until(state), log.until(0)
    if known.time is not None:
        _save(draft / KNOWN_UNTIL, latest_of_each(known.user, known.time, users))
    return {
        "type": log.time_type,
        "users": {"splits": SPLITS[: known.splits], "until": known.latest},
        "items": {"splits": SPLITS[: trained.splits], "until": trained.latest},
    }


def _rows(keys: pa.ChunkedArray, stored: pa.ChunkedArray) -> Array:
    rows: Array = pc.index_in(keys, value_set=stored.combine_chunks()).to_numpy()
    return rows.astype(np.int64)


def _trending(log: _Log, days: float, items: int) -> Array | None:
    if log.time is None or not len(log.time):
        return None
    seconds = epoch_seconds(log.time, log.time_type)
    if seconds is None:
        return None
    recent = seconds > seconds.max() - days * DAY
    return np.bincount(log.item[recent & log.is_positive], minlength=items).astype(np.int64)


def _write_titles(folder: Path, column: pa.ChunkedArray) -> None:
    titles = [(title or "").encode() for title in column.to_pylist()]
    offsets = np.zeros(len(titles) + 1, dtype=np.int64)
    np.cumsum([len(title) for title in titles], out=offsets[1:])
    _save(folder / "titles.npy", np.frombuffer(b"".join(titles), dtype=np.uint8))
    _save(folder / "titles_offsets.npy", offsets)


def _write_filter(folder: Path, column: pa.ChunkedArray) -> None:
    """Write each distinct value of a column and the rows that have it, without null and ""."""
    array = one_chunk(column)
    if pa.types.is_list(array.type):
        rows, values = pc.list_parent_indices(array).to_numpy(), array.flatten()
    else:
        rows, values = np.arange(len(array)), array
    present = pc.is_valid(values)
    if pa.types.is_string(values.type):
        present = pc.and_kleene(present, pc.not_equal(values, ""))
    kept = pc.fill_null(present, False).to_numpy(zero_copy_only=False)
    distinct, value_of = np.unique(
        key_array(pa.chunked_array([values.filter(pa.array(kept))])), return_inverse=True
    )
    if not len(distinct):
        distinct = distinct.astype(np.int64 if distinct.dtype.kind == "i" else "S1")
    folder.mkdir(parents=True)
    _save(folder / "values.npy", distinct)
    _write_lists(folder / "{}.npy", value_of, rows[kept], len(distinct), len(array))


def _write_lists(file: Path, list_of: Array, rows: Array, lists: int, items: int) -> None:
    """Write lists of item rows; each list is sorted, and no row is in it twice.

    Args:
        file: Path of the two files, with ``{}`` in place of "offsets" and "rows".
        list_of: Number of the list that each row belongs to, int64 [n].
        rows: Item rows, int64 [n].
        lists: Number of lists.
        items: Number of items.
    """
    pairs = np.unique(list_of.astype(np.int64) * max(1, items) + rows)
    offsets = np.searchsorted(pairs, np.arange(lists + 1, dtype=np.int64) * max(1, items))
    _save(Path(str(file).format("offsets")), offsets.astype(np.int64))
    _save(Path(str(file).format("rows")), (pairs % max(1, items)).astype(np.int32))


def _save(file: Path, array: Array) -> None:
    np.save(file, array, allow_pickle=False)
