"""Samples: labels, splits, histories and negatives, against naive counterparts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdrec import samples
from hvdrec.config import Config, History, Join, Negatives, Paths, Samples, Split
from hvdrec.errors import UserError
from hvdrec.samples.history import combined_keys, slices, sort_events
from hvdrec.samples.negatives import draw
from hvdrec.schema import Feature

Rows = list[dict[str, Any]]


def config(folder: Path, **settings: Any) -> Config:
    return Config(
        name="test",
        features=(
            Feature("user"),
            Feature("likes", kind="sequence"),
            Feature("item", side="item"),
            Feature("colour", side="item"),
            Feature("hour", side="scene", dtype="int"),
        ),
        paths=Paths(raw=str(folder), work=str(folder / "work")),
        samples=Samples(
            **{
                "interactions": "log.parquet",
                "items": "items.parquet",
                "user": "user",
                "item": "item",
                "time": "time",
                "label": "liked",
                "derive": {"hour": "time % 24"},
                "history": (History("likes", length=3),),
                **settings,
            }
        ),
    )


def write_log(folder: Path, rows: int = 400, seed: int = 0, times: int = 60) -> Rows:
    """Write a log with many equal times, and its catalogue; return the log's rows."""
    random = np.random.default_rng(seed)
    log = pa.table(
        {
            "user": random.integers(0, 12, rows),
            "item": [f"i{i}" for i in random.integers(0, 20, rows)],
            "time": random.integers(0, times, rows),
            "liked": random.integers(0, 2, rows),
            "day": random.integers(0, 4, rows),
        }
    )
    pq.write_table(log, folder / "log.parquet")
    items = {"item": [f"i{i}" for i in range(22)], "colour": [f"c{i % 3}" for i in range(22)]}
    pq.write_table(pa.table(items), folder / "items.parquet")
    found: Rows = log.to_pylist()
    return found


def made(folder: Path, **settings: Any) -> dict[str, Rows]:
    samples.make(config(folder, **settings), out=folder / "out", overwrite=True)
    return {
        split: pq.read_table(folder / "out" / split).to_pylist()
        for split in ("train", "validation", "test")
    }


def naive_history(log: Rows, sample: dict[str, Any], length: int) -> list[str]:
    before = [
        row
        for row in sorted(log, key=lambda row: row["time"])
        if str(row["user"]) == sample["user"] and row["time"] < sample["time"] and row["liked"]
    ]
    return [row["item"] for row in before][-length:]


def test_temporal_never_divides_a_time_and_keeps_all_rows(tmp_path: Path) -> None:
    log = write_log(tmp_path)
    found = made(tmp_path)
    times = {split: {row["time"] for row in rows} for split, rows in found.items()}
    assert max(times["train"]) < min(times["validation"])
    assert max(times["validation"]) < min(times["test"])
    assert sum(map(len, found.values())) == len(log)
    assert abs(len(found["train"]) - 320) <= 15
    assert [row["time"] for row in found["test"]] == sorted(row["time"] for row in found["test"])
    train = [row["time"] for row in found["train"]]
    assert train != sorted(train)


def test_temporal_history_is_what_was_known_then(tmp_path: Path) -> None:
    log = write_log(tmp_path)
    found = made(tmp_path)
    for rows in found.values():
        for row in rows:
            assert row["likes"] == naive_history(log, row, 3)
            assert row["hour"] == row["time"] % 24
            assert row["colour"] == f"c{int(row['item'][1:]) % 3}"


@pytest.mark.parametrize("method", ["random", "random-per-user"])
def test_random_history_is_of_training_rows_alone(tmp_path: Path, method: str) -> None:
    write_log(tmp_path, times=100_000)
    found = made(tmp_path, split=Split(method=method))  # type: ignore[arg-type]
    train = [{**row, "liked": row["label"]} for row in found["train"]]
    for rows in found.values():
        for row in rows:
            assert row["likes"] == naive_history(train, row, 3)


def test_random_is_exact_repeatable_and_seeded(tmp_path: Path) -> None:
    write_log(tmp_path)
    first = made(tmp_path, split=Split(method="random"))
    assert {split: len(rows) for split, rows in first.items()} == {
        "train": 320,
        "validation": 40,
        "test": 40,
    }
    assert made(tmp_path, split=Split(method="random")) == first
    assert made(tmp_path, split=Split(method="random", seed=1))["test"] != first["test"]


def test_random_per_user_gives_every_user_a_share(tmp_path: Path) -> None:
    log = write_log(tmp_path)
    found = made(tmp_path, split=Split(method="random-per-user"))
    rows = Counter(str(row["user"]) for row in log)
    for split in ("validation", "test"):
        assert Counter(row["user"] for row in found[split]) == {u: n // 10 for u, n in rows.items()}


def test_leave_last_out(tmp_path: Path) -> None:
    log = write_log(tmp_path, times=100_000)
    found = made(tmp_path, split=Split(method="leave-last-out"))
    for split, place in (("test", -1), ("validation", -2)):
        assert len(found[split]) == 12
        for row in found[split]:
            times = sorted(r["time"] for r in log if str(r["user"]) == row["user"])
            assert row["time"] == times[place]


def test_boundaries_cut_at_values_of_a_column(tmp_path: Path) -> None:
    log = write_log(tmp_path)
    found = made(tmp_path, split=Split(column="day", boundaries=(1, 2)))
    days = Counter(row["day"] for row in log)
    assert len(found["train"]) == days[0] + days[1]
    assert len(found["test"]) == days[3]


def test_users_and_catalogue(tmp_path: Path) -> None:
    log = write_log(tmp_path)
    found = made(tmp_path)
    items = pq.read_table(tmp_path / "out/items.parquet").to_pylist()
    assert [row["item"] for row in items] == sorted(f"i{i}" for i in range(22))
    assert all(row["colour"] for row in items)
    end = {"time": 10**9}
    for name, rows in (
        ("users_train", [{**row, "liked": row["label"]} for row in found["train"]]),
        ("users_all", log),
    ):
        users = pq.read_table(tmp_path / f"out/{name}.parquet").to_pylist()
        assert [row["user"] for row in users] == sorted({str(row["user"]) for row in log})
        for user in users:
            expected = naive_history(rows, {**user, **end}, 3)
            # Rows of one time may stand in either order.
            assert len(user["likes"]) == len(expected)
            if len({row["time"] for row in rows}) == len(rows):
                assert user["likes"] == expected


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 9), st.booleans()), min_size=1, max_size=40
    ),
    st.integers(1, 5),
)
@settings(max_examples=150, deadline=None)
def test_history_equals_a_naive_one(rows: list[tuple[int, int, bool]], length: int) -> None:
    user = np.array([row[0] for row in rows])
    time = np.array([row[1] for row in rows])
    chosen = np.array([row[2] for row in rows])
    items = pa.array([f"i{n}" for n in range(len(rows))])
    key, base = combined_keys(user, time)
    events = sort_events(items, key, chosen)
    start, stop = events.before(key, base, length)
    got = slices(events.items, start, stop).to_pylist()
    for n in range(len(rows)):
        before = [
            m
            for m in sorted(range(len(rows)), key=lambda m: (time[m], m))
            if chosen[m] and user[m] == user[n] and time[m] < time[n]
        ]
        assert got[n] == [f"i{m}" for m in before][-length:]


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 7), st.booleans()),
        min_size=1,
        max_size=60,
    ),
    st.integers(1, 5),
    st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_negatives_are_of_the_group_and_not_taken(
    rows: list[tuple[int, int, int, bool]], per_positive: int, seed: int
) -> None:
    group, user, item = (np.array([row[i] for row in rows]) for i in range(3))
    positive = np.flatnonzero([row[3] for row in rows])
    position, drawn = draw(group, user, item, positive, per_positive, seed)
    assert (np.diff(position) >= 0).all()
    for place, row in enumerate(positive):
        mine = drawn[position == place].tolist()
        pool = {i for g, _, i, _ in rows if g == group[row]}
        taken = {i for g, u, i, _ in rows if g == group[row] and u == user[row]}
        assert len(mine) == len(set(mine)) == min(per_positive, len(pool - taken))
        assert set(mine) <= pool - taken


def test_negatives_are_drawn_uniformly() -> None:
    group = np.zeros(2000, dtype=np.int64)
    user = np.repeat([0, 1], 1000)
    item = np.concatenate([np.zeros(1000, dtype=np.int64), np.arange(1000) % 100])
    _, drawn = draw(group, user, item, np.arange(1000), 4, 0)
    counts = np.bincount(drawn, minlength=100)
    assert counts[0] == 0
    assert 15 < counts[1:].min() <= counts[1:].max() < 80  # 40.4 expected, deviation 6.4


def test_negatives_take_their_items_columns_and_the_positives_scene(tmp_path: Path) -> None:
    log = write_log(tmp_path)
    stock = {"item": [f"i{i}" for i in range(20)] * 4, "day": sorted([0, 1, 2, 3] * 20)}
    stock["shelf"] = [f"{i}/{d}" for i, d in zip(stock["item"], stock["day"], strict=True)]
    pq.write_table(pa.table(stock), tmp_path / "stock.parquet")
    base = config(
        tmp_path,
        label="1",
        drop="liked = 0",
        joins=(Join("stock.parquet", ("item", "day")),),
        negatives=Negatives(2, ("day",)),
        split=Split(method="random"),
    )
    whole = replace(base, features=(*base.features, Feature("shelf", side="scene")))
    meta = samples.make(whole, out=tmp_path / "out")
    rows = [
        row
        for split in ("train", "validation", "test")
        for row in pq.read_table(tmp_path / "out" / split).to_pylist()
    ]
    positives = [row for row in log if row["liked"]]
    assert sum(meta["positives"].values()) == len(positives)
    assert len(rows) == 3 * len(positives)
    bought = {(str(r["user"]), r["item"], r["day"]) for r in positives}
    days = {(str(r["user"]), r["time"], r["day"]) for r in positives}
    for row in rows:
        item, day = row["shelf"].split("/")
        assert item == row["item"]
        assert row["colour"] == f"c{int(item[1:]) % 3}"
        assert (row["user"], row["time"], int(day)) in days
        if row["label"] == 0:
            assert (row["user"], item, int(day)) not in bought


def test_integers_become_canonical_strings_and_floats_do_not(tmp_path: Path) -> None:
    write_log(tmp_path)
    assert {row["user"] for row in made(tmp_path)["train"]} <= {str(u) for u in range(12)}
    with pytest.raises(UserError, match=r"column 'colour' is double, dtype 'string' takes"):
        made(tmp_path, derive={"hour": "time % 24", "colour": "time * 1.5::DOUBLE"}, items="")


def test_errors_name_the_key(tmp_path: Path) -> None:
    write_log(tmp_path)
    with pytest.raises(UserError, match=r"samples.weight = 'liked - 1': gives -1 in rows"):
        made(tmp_path, weight="liked - 1")
    with pytest.raises(UserError, match=r"needs samples.time"):
        made(tmp_path, time="", history=())
    with pytest.raises(UserError, match=r"samples.drop = 'lked': .*columns are \[_row, user"):
        made(tmp_path, drop="lked")
    with pytest.raises(UserError, match=r"samples.derive.hour = 'tme % 24'"):
        made(tmp_path, derive={"hour": "tme % 24"})
    with pytest.raises(UserError, match=r"samples.history\[0\].where = 'nothing'"):
        made(tmp_path, history=(History("likes", where="nothing"),))
    with pytest.raises(UserError, match=r"no rows are left; check samples.drop"):
        made(tmp_path, drop="true")
    assert not (tmp_path / "out").exists()
