"""Item and user data of a bundle besides embeddings: titles, counts, filters, seen items."""

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
from hvdrec.exporting.known_rows import DAY, KNOWN_UNTIL, comparable_times, latest_of_each
from hvdrec.features.raw import one_chunk
from hvdrec.samples.split import SPLITS, STATES
from hvdrec.storage.parquet import read_table

Array = NDArray[Any]
EPOCH_SECONDS = (1e8, 1e11)
"""Range of times in seconds since 1970 (years 1973 to 5138). Numbers that are 1e3, 1e6 or 1e9 times
as large are milli-, micro- or nanoseconds; smaller numbers are not times."""


def write_catalogue(
    draft: Path,
    users: pa.Table,
    items: pa.Table,
    config: Config,
    notify: Callable[[str], None] = lambda _: None,
    *,
    users_know: str = "all",
) -> dict[str, Any]:
    """Write titles, popularity, trending counts, filters and seen items, in the order of keys.

    Popularity counts positives of the training split. Trending counts positives of the log's last
    ``export.trending_days``, or equals popularity if the samples have no times. Seen items are the
    distinct pairs of users and items: of positive rows, or of all rows with ``evaluate.seen =
    "shown"``. Both cover the splits of ``export.users_as_of``.

    Args:
        draft: The bundle's directory.
        users: The samples' table of all users.
        items: The samples' table of all items.
        config: The run; ``export``, ``samples``, ``paths`` and the schema are used.
        notify: Called with a line if there are no times.
        users_know: State of `samples.split.STATES` whose rows the users' embeddings depend on.

    Returns:
        The latest time in the splits that the users and the items know, for the manifest: ``users``
        and ``items`` hold ``splits`` and ``until``; ``time`` and ``type`` say what a time is.
    """
    schema, export = config.schema, config.export
    item_order = np.argsort(key_array(items[schema.item_key]), kind="stable")
    items = items.take(item_order)
    folder = draft / "items"
    encoded = config.paths.of("features") / "items.parquet"
    # The encoded table of items has the rows of the samples' table.
    counts = read_table(encoded, ["train_count"])["train_count"].to_numpy()
    popularity = counts[item_order].astype(np.int64)
    _save(folder / "popularity.npy", popularity)
    if "title" in items.column_names:
        _write_titles(folder, items["title"])
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
        _write_filter(folder / "filters" / name, items[name])
    return _write_known(draft, log, STATES.index(users_know), len(users)) | {
        "time": config.samples.time
    }


@dataclass(frozen=True)
class _Log:
    """The samples of the first splits, in their order.

    Attributes:
        split: Index into `SPLITS`, int8 [n].
        user: Rows of users, int64 [n].
        item: Rows of items, int64 [n].
        is_positive: bool [n].
        time: float64 [n], None if there are no times; see `comparable_times`.
        time_type: What times count; empty if there are no times.
        splits: How many splits.
    """

    split: Array
    user: Array
    item: Array
    is_positive: Array
    time: Array | None
    time_type: str
    splits: int = len(SPLITS)

    def until(self, state: int) -> _Log:
        """Return the rows that a state, an index into `STATES`, includes."""
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
        """The latest time."""
        return float(self.time.max()) if self.time is not None and len(self.time) else None


def _read_log(config: Config, users: pa.ChunkedArray, items: pa.ChunkedArray) -> _Log:
    """Read the samples; `users` and `items` are the keys in the order of rows."""
    samples, schema = config.samples, config.schema
    # In the samples, a feature or key named "time" replaces samples.time.
    names = {schema.user_key, schema.item_key, *(column.name for column in schema.columns())}
    has_time = bool(samples.time) and ("time" not in names or samples.time == "time")
    columns = [schema.user_key, schema.item_key, "label", *(["time"] if has_time else [])]
    files = [str(config.paths.of("samples") / split) for split in SPLITS]
    parts = [
        ds.dataset(file, format="parquet").to_table(columns=[*dict.fromkeys(columns)])
        for file in files
    ]
    table = pa.concat_tables(parts)
    times = comparable_times(table["time"]) if has_time else None
    return _Log(
        np.repeat(np.arange(len(SPLITS), dtype=np.int8), [part.num_rows for part in parts]),
        _rows(table[schema.user_key], users),
        _rows(table[schema.item_key], items),
        table["label"].to_numpy() == 1,
        None if times is None else times[1],
        "" if times is None else times[0],
    )


def _write_known(draft: Path, log: _Log, state: int, users: int) -> dict[str, Any]:
    """Write the latest time of each user's rows up to a state; return what both sides know."""
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


def _seconds(time: Array, time_type: str) -> Array | None:
    """Convert times to seconds, float64 [n]; None if numbers do not look like times."""
    if time_type == "timestamp":
        return time
    latest = time.max(initial=0.0)
    for divisor in (1.0, 1e3, 1e6, 1e9):
        if EPOCH_SECONDS[0] <= latest / divisor < EPOCH_SECONDS[1]:
            return np.asarray(time / divisor)
    return None


def _trending(log: _Log, days: float, items: int) -> Array | None:
    if log.time is None or not len(log.time):
        return None
    seconds = _seconds(log.time, log.time_type)
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
    """Write the rows that have each value of a column; null and empty values are left out."""
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
    """Write lists of rows int32, ascending and without repetition.

    Args:
        file: Path in which ``{}`` stands for "offsets" and "rows".
        list_of: int64 [n], the list that each row belongs to.
        rows: int64 [n].
        lists: Number of lists.
        items: Number of items.
    """
    pairs = np.unique(list_of.astype(np.int64) * max(1, items) + rows)
    offsets = np.searchsorted(pairs, np.arange(lists + 1, dtype=np.int64) * max(1, items))
    _save(Path(str(file).format("offsets")), offsets.astype(np.int64))
    _save(Path(str(file).format("rows")), (pairs % max(1, items)).astype(np.int32))


def _save(file: Path, array: Array) -> None:
    np.save(file, array, allow_pickle=False)
