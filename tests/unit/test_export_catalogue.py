"""Counts, filters and seen items that export writes, from samples written by hand."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvdrec.config import Config
from hvdrec.config.data_sections import Paths, Samples
from hvdrec.config.schema import Feature
from hvdrec.config.sections import Evaluate, Export
from hvdrec.exporting.catalogue import write_catalogue

DAY = 86_400
NOW = 1_700_000_000
# user, item, label, days before the log's end; the last two rows are validation and test.
ROWS = [
    ("b", "y", 1, 90),
    ("a", "x", 1, 30),
    ("a", "x", 1, 29),
    ("a", "y", 0, 5),
    ("é", "x", 1, 3),
    ("a", "é", 1, 1),
    ("b", "x", 0, 0),
]
FEATURES = (
    Feature("user_id"),
    Feature("item_id", side="item"),
    Feature("genres", side="item", kind="categorical_list", max_length=1),
    Feature("shop", side="item", kind="hashed", dtype="int"),
)
# Not in the order of keys; z was never shown.
ITEMS = {
    "item_id": ["z", "é", "x", "y"],
    "genres": [["War", "War", "Épos"], None, ["Drama", "", None], ["War", "Drama"]],
    "shop": [7, None, -3, 7],
    "title": ["Zet", None, "Íks", ""],
}


def write_samples(
    folder: Path,
    times: Sequence[Any] | None = None,
    *,
    integer_keys: bool = False,
    **samples: Any,
) -> Config:
    """Write the samples (time in seconds if not given) and return their configuration."""
    kind = pa.int64() if integer_keys else pa.string()

    def keys(names: Sequence[str]) -> pa.Array:
        return pa.array([ord(n) - 110 if integer_keys else n for n in names], kind)

    columns = {
        "user_id": keys([row[0] for row in ROWS]),
        "item_id": keys([row[1] for row in ROWS]),
        "label": pa.array([row[2] for row in ROWS], pa.float32()),
        "time": pa.array([int(NOW - row[3] * DAY) for row in ROWS] if times is None else times),
    }
    rows = pa.table(columns)
    for split, part in (("train", rows[:5]), ("validation", rows[5:6]), ("test", rows[6:])):
        (folder / "samples" / split).mkdir(parents=True)
        pq.write_table(part, folder / "samples" / split / "part-00000.parquet")
    (folder / "features").mkdir()
    pq.write_table(pa.table({"train_count": [0, 0, 3, 1]}), folder / "features" / "items.parquet")
    options = {"time": "when", **samples}
    return Config("c", FEATURES, paths=Paths(work=str(folder)), samples=Samples(**options))


def write(folder: Path, config: Config, *, integer_keys: bool = False) -> tuple[Path, list[str]]:
    draft, lines = folder / "draft", list[str]()
    (draft / "users").mkdir(parents=True)
    (draft / "items").mkdir()
    users, items = ["b", "é", "a"], dict(ITEMS)
    if integer_keys:
        users = [ord(name) - 110 for name in users]  # type: ignore[misc]
        items["item_id"] = [ord(name) - 110 for name in ITEMS["item_id"]]  # type: ignore[misc]
    state = config.export.users_as_of
    tables = pa.table({"user_id": users}), pa.table(items)
    write_catalogue(draft, *tables, config, lines.append, users_know=state)
    return draft, lines


def lists(file: Path) -> list[list[int]]:
    offsets, rows = (np.load(str(file).format(name)) for name in ("offsets", "rows"))
    assert (offsets.dtype, rows.dtype) == (np.int64, np.int32)
    assert offsets[-1] == len(rows)
    return [rows[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def test_all_files_by_hand(tmp_path: Path) -> None:
    config = replace(
        write_samples(tmp_path),
        evaluate=Evaluate(seen="shown"),
        export=Export(filters=("genres", "shop")),
    )
    draft, lines = write(tmp_path, config)
    assert lines == []
    # In the order of keys: x, y, z, é.
    popularity, trending = (np.load(draft / f"items/{n}.npy") for n in ("popularity", "trending"))
    assert (popularity.dtype, popularity.tolist()) == (np.int64, [3, 1, 0, 0])
    # Of 30 days and all splits: x by a and é, é by a in the validation split; y was not liked.
    assert (trending.dtype, trending.tolist()) == (np.int64, [2, 0, 0, 1])
    blob, ends = np.load(draft / "items/titles.npy"), np.load(draft / "items/titles_offsets.npy")
    texts = [blob[a:b].tobytes().decode() for a, b in itertools.pairwise(ends)]
    assert texts == ["Íks", "", "Zet", ""]
    # Of a, b, é: each item once, shown or liked, in every split.
    assert lists(draft / "users/seen_{}.npy") == [[0, 1, 3], [0, 1], [0]]
    values = np.load(draft / "items/filters/genres/values.npy")
    assert [value.decode() for value in values] == ["Drama", "War", "Épos"]
    assert lists(draft / "items/filters/genres/{}.npy") == [[0, 1], [1, 2], [2]]
    assert np.load(draft / "items/filters/shop/values.npy").tolist() == [-3, 7]
    assert lists(draft / "items/filters/shop/{}.npy") == [[0], [1, 2]]


def test_integer_keys_are_sorted_as_numbers(tmp_path: Path) -> None:
    config = replace(write_samples(tmp_path, integer_keys=True), evaluate=Evaluate(seen="shown"))
    draft, _ = write(tmp_path, config, integer_keys=True)
    # Items x 10, y 11, z 12, é 123; users a -13, b -12, é 123.
    assert np.load(draft / "items/trending.npy").tolist() == [2, 0, 0, 1]
    assert lists(draft / "users/seen_{}.npy") == [[0, 1, 3], [0, 1], [0]]
    assert not (draft / "items/filters").exists()


def test_only_positives_count_as_seen_by_default(tmp_path: Path) -> None:
    draft, _ = write(tmp_path, write_samples(tmp_path))
    assert lists(draft / "users/seen_{}.npy") == [[0, 3], [1], [0]]


@pytest.mark.parametrize(
    ("state", "seen", "trending", "until"),
    [
        ("train", [[0], [1], [0]], [3, 0, 0, 0], [-5, -90, -3]),
        ("validation", [[0, 3], [1], [0]], [3, 0, 0, 1], [-1, -90, -3]),
        ("all", [[0, 3], [1], [0]], [2, 0, 0, 1], [-1, 0, -3]),
    ],
)
def test_users_know_the_rows_up_to_a_split(
    tmp_path: Path, state: Any, seen: Any, trending: Any, until: Any
) -> None:
    config = replace(write_samples(tmp_path), export=Export(users_as_of=state))
    draft, _ = write(tmp_path, config)
    assert lists(draft / "users/seen_{}.npy") == seen
    assert np.load(draft / "items/trending.npy").tolist() == trending
    # Of a, b, é, in days before the log's end: all rows, liked or not.
    assert ((np.load(draft / "users/known_until.npy") - NOW) / DAY).tolist() == until


def test_seen_items_can_be_switched_off(tmp_path: Path) -> None:
    config = replace(write_samples(tmp_path), export=Export(seen=False))
    draft, _ = write(tmp_path, config)
    assert not list((draft / "users").glob("seen_*"))


def at(days: float) -> datetime.datetime:
    return datetime.datetime(2024, 3, 31) - datetime.timedelta(days=days)


@pytest.mark.parametrize(
    "times",
    [
        [(NOW - row[3] * DAY) * 1000 for row in ROWS],
        [int((NOW - row[3] * DAY) * 1e9) for row in ROWS],
        pa.array([at(row[3]) for row in ROWS], pa.timestamp("us")),
        pa.array([at(row[3]) for row in ROWS], pa.timestamp("ms", tz="UTC")),
        pa.array([at(row[3]).date() for row in ROWS], pa.date32()),
    ],
    ids=["milliseconds", "nanoseconds", "timestamps", "with a zone", "dates"],
)
def test_times_of_all_types_and_units_are_understood(tmp_path: Path, times: Any) -> None:
    draft, lines = write(tmp_path, write_samples(tmp_path, times))
    assert np.load(draft / "items/trending.npy").tolist() == [2, 0, 0, 1]
    assert lines == []


@pytest.mark.parametrize(
    ("times", "name"),
    [
        ([row[3] for row in ROWS], "when"),  # days, weeks: nobody knows
        (["today"] * len(ROWS), "when"),
        (None, ""),
    ],
    ids=["small numbers", "text", "no time"],
)
def test_trending_counts_equal_popularity_without_times(
    tmp_path: Path, times: Any, name: str
) -> None:
    draft, lines = write(tmp_path, write_samples(tmp_path, times, time=name))
    assert np.load(draft / "items/trending.npy").tolist() == [3, 1, 0, 0]
    assert lines == ["the samples have no times: trending counts equal popularity"]


def test_a_feature_named_time_is_not_the_time(tmp_path: Path) -> None:
    config = write_samples(tmp_path)
    features = (*FEATURES, Feature("time", side="scene", dtype="int"))
    draft, lines = write(tmp_path, replace(config, features=features))
    assert len(lines) == 1
    named = replace(config, features=features, samples=replace(config.samples, time="time"))
    (tmp_path / "again").mkdir()
    draft, lines = write(tmp_path / "again", named)
    assert (np.load(draft / "items/trending.npy").tolist(), lines) == ([2, 0, 0, 1], [])


def test_a_filter_without_values(tmp_path: Path) -> None:
    config = replace(write_samples(tmp_path), export=Export(filters=("genres",)))
    draft = tmp_path / "draft"
    (draft / "users").mkdir(parents=True)
    (draft / "items").mkdir()
    nothing = pa.array([None, [], [""], [None]], pa.list_(pa.string()))
    items = pa.table({"item_id": ITEMS["item_id"], "genres": nothing})
    write_catalogue(draft, pa.table({"user_id": ["a", "b", "é"]}), items, config)
    values = np.load(draft / "items/filters/genres/values.npy")
    assert (values.dtype.kind, len(values)) == ("S", 0)
    assert lists(draft / "items/filters/genres/{}.npy") == []
    assert not (draft / "items/titles.npy").exists()
