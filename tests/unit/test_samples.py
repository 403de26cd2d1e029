"""Samples: whole runs, splits, histories, negatives and errors, against worked examples."""

from __future__ import annotations

import datetime
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hvdrec.config import Config
from hvdrec.config.data_sections import Split, Task
from hvdrec.config.structure import from_dict, to_dict
from hvdrec.errors import UserError
from hvdrec.samples import make_samples
from hvdrec.samples.engine import connect
from hvdrec.samples.history import EventFile, Events, Positions
from hvdrec.samples.negatives import Block, Candidates, draw_negatives
from hvdrec.samples.split import Splitter, hash64, time_cuts
from hvdrec.storage.artifacts import read_manifest, verify_artifact

Row = dict[str, Any]
SPLITS = ("train", "validation", "test")

USERS = [
    {"user_id": "u1", "age": 20},
    {"user_id": "u2", "age": None},
    {"user_id": "u9", "age": 90},
]
ITEMS = [
    {"item_id": "a", "name": "Alpha", "genres": ["x", "y"]},
    {"item_id": "b", "name": "Beta", "genres": []},
    {"item_id": "z", "name": "Zeta", "genres": None},
]
LOG = [
    {"user_id": "u1", "item_id": "a", "rating": 5, "t": 1},
    {"user_id": "u1", "item_id": "b", "rating": 1, "t": 2},
    {"user_id": "u2", "item_id": "a", "rating": 4, "t": 3},
    {"user_id": "u1", "item_id": "c", "rating": 5, "t": 4},
    {"user_id": "u2", "item_id": "b", "rating": 5, "t": 4},
    {"user_id": "u3", "item_id": "a", "rating": 2, "t": 5},
    {"user_id": "u1", "item_id": "d", "rating": 3, "t": 6},
    {"user_id": "u1", "item_id": "a", "rating": 4, "t": 7},
    {"user_id": "u2", "item_id": "c", "rating": 1, "t": 8},
]
FEATURES = [
    {"name": "user_id"},
    {"name": "age", "dtype": "int"},
    {"name": "liked", "kind": "sequence"},
    {"name": "item_id", "side": "item"},
    {"name": "genres", "side": "item", "kind": "categorical_list"},
    {"name": "late", "side": "scene", "dtype": "int"},
]
SAMPLES: dict[str, Any] = {
    "interactions": "log.parquet",
    "users": "users.parquet",
    "items": "items.parquet",
    "time": "t",
    "title": "name",
    "label": "rating > 3",
    "derive": {"late": "t > 4"},
    "history": [{"name": "liked", "length": 2}],
    "split": {"fractions": [0.5, 0.25, 0.25]},
}


def write(file: Path, rows: Sequence[Row] | pa.Table) -> None:
    """Write rows as CSV or Parquet, by the file's suffix."""
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows))
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".csv":
        pyarrow.csv.write_csv(table, file)
    else:
        pq.write_table(table, file)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder with the three small tables."""
    folder = tmp_path / "raw"
    write(folder / "log.parquet", LOG)
    write(folder / "users.parquet", USERS)
    write(folder / "items.parquet", ITEMS)
    return folder


def configured(raw: Path, features: Sequence[Row] | None = None, **changes: Any) -> Config:
    """Return the small configuration with changes of [samples]; None removes a key."""
    merged = {k: v for k, v in {**SAMPLES, **changes}.items() if v is not None}
    table = {
        "name": "small",
        "paths": {"raw": str(raw), "work": str(raw.parent / "work")},
        "features": list(FEATURES if features is None else features),
        "samples": merged,
    }
    return from_dict(Config, table)


def make(config: Config) -> dict[str, list[Row]]:
    """Make samples and return the rows of every table by its name."""
    out = config.paths.of("samples")
    make_samples(config, overwrite=True)
    tables = {name: pq.read_table(out / name) for name in SPLITS}
    tables |= {
        n: pq.read_table(out / f"{n}.parquet")
        for n in ("users_train", "users_validation", "users_all", "items")
    }
    return {name: table.to_pylist() for name, table in tables.items()}


def error_of(config: Config) -> str:
    """Return the one-line error of making samples; check that no file was changed."""
    out = config.paths.of("samples")
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(UserError) as caught:
        make_samples(config)
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.rglob("*")) == before
    return str(caught.value)


# ---------------------------------------------------------------------------------- whole runs


def test_a_small_log_equals_a_worked_example(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(raw)
    result = make_samples(config)
    out = config.paths.of("samples")
    # Times 1 2 3 4 4 5 6 7 8: the cut between times nearest to 4.5 rows is after row 5, the one
    # nearest to 6.75 rows after row 7.
    facts = {
        "rows": {"train": 5, "validation": 2, "test": 2},
        "positives": {"train": 4, "validation": 0, "test": 1},
        "users": 3,
        "items": 5,
        "matches": {
            "samples.users": {"file": "users.parquet", "rows": 9, "matched": 8},
            "samples.items": {"file": "items.parquet", "rows": 9, "matched": 6},
        },
    }
    assert result.to_dict() == {"path": str(out), **facts, "warnings": (), "label_join": {}}
    states = {"validation": "train", "test": "validation"}
    assert read_manifest(out, "samples").meta == {
        "config": to_dict(config),
        **facts,
        "user_states": states,
        "copies": {"validation": 0, "test": 0},
        "columns": ["user_id", "item_id", "rating", "t", "late", "age", "name", "genres"],
    }
    verify_artifact(out, "samples")
    assert "9 labelled rows" in capsys.readouterr().err
    make_samples(config, overwrite=True, progress=False)
    assert capsys.readouterr().err == ""

    found = make(config)
    assert found["validation"] == [
        {
            "user_id": "u3",
            "item_id": "a",
            "age": None,
            "genres": ["x", "y"],
            "late": 1,
            "liked": [],
            "label": 0.0,
            "weight": 1.0,
            "time": 5,
        },
        {
            "user_id": "u1",
            "item_id": "d",
            "age": 20,
            "genres": [],
            "late": 1,
            "liked": ["a", "c"],
            "label": 0.0,
            "weight": 1.0,
            "time": 6,
        },
    ]
    assert [(r["time"], r["liked"]) for r in found["test"]] == [(7, ["a", "c"]), (8, ["a", "b"])]
    by_time = {(r["user_id"], r["time"]): r["liked"] for r in found["train"]}
    assert by_time == {
        ("u1", 1): [],
        ("u1", 2): ["a"],
        ("u2", 3): [],
        ("u1", 4): ["a"],
        ("u2", 4): ["a"],
    }
    assert found["users_train"] == [
        {"user_id": "u1", "age": 20, "liked": ["a", "c"]},
        {"user_id": "u2", "age": None, "liked": ["a", "b"]},
        {"user_id": "u3", "age": None, "liked": []},
    ]
    assert [r["liked"] for r in found["users_all"]] == [["c", "a"], ["a", "b"], []]
    assert found["items"] == [
        {"item_id": "a", "genres": ["x", "y"], "title": "Alpha"},
        {"item_id": "b", "genres": [], "title": "Beta"},
        {"item_id": "c", "genres": [], "title": None},
        {"item_id": "d", "genres": [], "title": None},
        {"item_id": "z", "genres": [], "title": "Zeta"},
    ]


def test_declared_types_are_written(raw: Path) -> None:
    config = configured(raw)
    make_samples(config)
    found = pq.read_schema(config.paths.of("samples") / "train" / "part-00000.parquet")
    lists = pa.list_(pa.field("element", pa.string()))
    expected = {
        "user_id": pa.string(),
        "item_id": pa.string(),
        "age": pa.int64(),
        "genres": lists,
        "late": pa.int64(),
        "liked": lists,
        "label": pa.float32(),
        "weight": pa.float32(),
        "time": pa.int64(),
    }
    assert {name: found.field(name).type for name in found.names} == expected


def test_samples_depend_on_rows_and_seed_not_on_file_order(raw: Path) -> None:
    log = [{**row, "t": row["t"] + 100 * i} for i in range(40) for row in LOG]

    def digests(name: str, seed: int) -> dict[str, str]:
        negative = {"per_positive": 1, "within": ["late"], "seed": 3}
        split = {"method": "random", "seed": seed}
        config = configured(raw, interactions=name, negatives=negative, split=split)
        make_samples(config, overwrite=True)
        manifest = read_manifest(config.paths.of("samples"), "samples")
        return {file: facts["sha256"] for file, facts in manifest.files.items()}

    write(raw / "one.parquet", log)
    random.Random(1).shuffle(log)
    write(raw / "two" / "b.parquet", log[:100])
    write(raw / "two" / "a.parquet", log[100:])
    assert digests("one.parquet", 0) == digests("two/*.parquet", 0)
    assert digests("one.parquet", 0) != digests("one.parquet", 1)


def test_training_rows_are_shuffled_and_held_out_rows_sorted_by_time(raw: Path) -> None:
    write(raw / "log.parquet", [{**LOG[0], "t": t} for t in range(200)])
    found = make(configured(raw))
    times = [row["time"] for row in found["train"]]
    assert sorted(times) == list(range(100)) and times != sorted(times)
    assert [row["time"] for row in found["validation"]] == list(range(100, 150))
    assert [row["time"] for row in found["test"]] == list(range(150, 200))


def test_csv_gives_the_same_samples(raw: Path) -> None:
    expected = make(configured(raw))
    write(raw / "log.csv", LOG)
    write(raw / "users.csv", USERS)
    write(raw / "items.csv", [{**i, "genres": "|".join(i["genres"] or [])} for i in ITEMS])
    files = {"interactions": "log.csv", "users": "users.csv", "items": "items.csv"}
    split = "string_split(nullif(genres, ''), '|')"
    assert make(configured(raw, **files, derive={"late": "t > 4", "genres": split})) == expected


def test_text_in_a_csv_file_is_kept_as_written(raw: Path) -> None:
    (raw / "users.csv").write_text("user_id,zip,flag\nu1,01234,true\nu2,99999,false\n")
    features = [*FEATURES, {"name": "zip"}, {"name": "flag"}]
    found = make(
        configured(raw, features, users="users.csv", derive={**SAMPLES["derive"], "age": "1"})
    )
    assert [(r["zip"], r["flag"]) for r in found["users_all"]][:2] == [
        ("01234", "true"),
        ("99999", "false"),
    ]


def test_integer_columns_feed_string_features_and_join_string_keys(raw: Path) -> None:
    numbers = {"u1": 1, "u2": 2, "u3": 10}
    write(raw / "log.parquet", [{**row, "user_id": numbers[row["user_id"]]} for row in LOG])
    write(raw / "users.parquet", [{"user_id": "1", "age": 20}, {"user_id": "10", "age": 30}])
    found = make(configured(raw))
    # Sorted as text, since the key is a string feature.
    assert [(r["user_id"], r["age"]) for r in found["users_all"]] == [
        ("1", 20),
        ("10", 30),
        ("2", None),
    ]
    features = [{"name": "user_id", "dtype": "int"}, *FEATURES[1:]]
    found = make(configured(raw, features))
    assert [(r["user_id"], r["age"]) for r in found["users_all"]] == [(1, 20), (2, None), (10, 30)]


def test_types_are_cast_as_declared(raw: Path) -> None:
    derive = {
        "late": "t > 4",
        "tiny": "t::UTINYINT",
        "half": "(t / 2)::DECIMAL(6, 1)",
        "level": "rating::VARCHAR::ENUM('1', '2', '3', '4', '5')",
        "codes": "[t, t + 1]",
        "total": "(t::HUGEINT)",
    }
    features = [
        *FEATURES,
        {"name": "tiny", "side": "scene"},
        {"name": "half", "side": "scene", "kind": "numeric", "dtype": "float"},
        {"name": "level", "side": "scene"},
        {"name": "codes", "side": "scene", "kind": "categorical_list"},
        {"name": "total", "side": "scene", "dtype": "int"},
    ]
    last = make(configured(raw, features, derive=derive))["test"][-1]
    assert {name: last[name] for name in ("tiny", "half", "level", "codes", "total")} == {
        "tiny": "8",
        "half": 4.0,
        "level": "1",
        "codes": ["8", "9"],
        "total": 8,
    }


def test_joins_use_derived_keys_and_give_nulls_without_a_match(raw: Path) -> None:
    write(
        raw / "days.parquet",
        [{"day": 1, "price": 1.5, "promo": 4}, {"day": 2, "price": 2.5, "promo": 5}],
    )
    features = [*FEATURES, {"name": "price", "side": "scene", "kind": "numeric", "dtype": "float"}]
    features += [{"name": "double", "side": "scene", "kind": "numeric", "dtype": "float"}]
    # `double` is declared first but needs the join, whose key is derived.
    found = make(
        configured(
            raw,
            features,
            derive={"double": "price * 2", "late": "t > 4", "day": "t // 3"},
            joins=[{"table": "days.parquet", "on": ["day"]}],
        )
    )
    rows = {r["time"]: (r["price"], r["double"]) for name in SPLITS for r in found[name]}
    assert rows[2] == (None, None) and rows[3] == (1.5, 3.0) and rows[7] == (2.5, 5.0)


def test_drop_weight_and_history_predicates_are_applied(raw: Path) -> None:
    history = [{"name": "liked", "where": "rating = 5"}]
    config = configured(raw, drop="rating = 3", weight="rating / 2", history=history)
    found = make(config)
    rows = {(r["user_id"], r["time"]): r for name in SPLITS for r in found[name]}
    assert ("u1", 6) not in rows and len(rows) == 8
    assert rows["u1", 7]["weight"] == 2.0
    assert rows["u2", 8]["liked"] == ["b"]  # "a" has rating 4


def test_without_tables_users_come_from_the_latest_row_of_each_state_and_items_of_training(
    raw: Path,
) -> None:
    # The latest row of u1 has its smallest item, so that only time order finds it.
    renamed = {"a": "a", "b": "b", "c": "C", "d": "d"}
    log = [
        {**row, "item_id": renamed[row["item_id"]], "city": f"c{row['t']}", "size": row["t"]}
        for row in LOG
    ]
    write(raw / "log.parquet", log)
    features = [
        *(f for f in FEATURES if f["name"] not in ("age", "genres")),
        {"name": "city"},
        {"name": "size", "side": "item", "dtype": "int"},
    ]
    found = make(configured(raw, features, users=None, items=None, title="city"))
    for state, cities in (
        ("train", {"u1": "c4", "u2": "c4", "u3": None}),  # u3 is only in validation
        ("validation", {"u1": "c6", "u2": "c4", "u3": "c5"}),
        ("all", {"u1": "c7", "u2": "c8", "u3": "c5"}),
    ):
        assert {r["user_id"]: r["city"] for r in found[f"users_{state}"]} == cities
    assert found["items"][1:3] == [
        {"item_id": "a", "size": 3, "title": "c3"},
        {"item_id": "b", "size": 4, "title": "c4"},
    ]


def test_timestamps_and_dates_are_times(raw: Path) -> None:
    start = datetime.datetime(2020, 1, 1)
    moments = [start + datetime.timedelta(days=row["t"]) for row in LOG]
    expected = make(configured(raw))
    for values in (moments, [m.date() for m in moments]):
        log = [{**row, "t": value} for row, value in zip(LOG, values, strict=True)]
        write(raw / "log.parquet", log)
        found = make(configured(raw, derive={"late": "t > TIMESTAMP '2020-01-05'"}))
        for name in SPLITS:
            assert [r["liked"] for r in found[name]] == [r["liked"] for r in expected[name]]
        assert found["test"][-1]["time"] == values[-1]


def test_a_derived_interval_is_used_by_another_expression(raw: Path) -> None:
    past = "to_timestamp(t * 3600) - to_timestamp(0)"
    found = make(configured(raw, derive={"past": past, "late": "extract(hour FROM past)"}))
    assert [row["late"] for row in found["test"]] == [7, 8]


def test_derived_times_are_in_utc(raw: Path) -> None:
    derive = {"late": "extract(hour FROM to_timestamp(t * 3600)) -- of the day"}
    found = make(configured(raw, derive=derive))
    assert [row["late"] for row in found["test"]] == [7, 8]


def test_existing_samples_are_replaced_only_on_request_and_only_by_complete_ones(
    raw: Path,
) -> None:
    config = configured(raw)
    make_samples(config)
    out = config.paths.of("samples")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="already exists; pass --overwrite"):
        make_samples(config)
    with pytest.raises(UserError, match="is neither 0 nor 1"):
        make_samples(configured(raw, label="rating"), overwrite=True)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert [entry.name for entry in out.parent.iterdir()] == ["samples"]


# --------------------------------------------------------------------------------------- history

events = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(0, 9), st.booleans()), max_size=40
)


def naive_history(
    rows: Sequence[tuple[int, int, int, bool]], user: int, time: int | None
) -> list[int]:
    """Return the events of a user strictly before a time (None: all), oldest first."""
    mine = [(t, i) for i, (u, t, _, chosen) in enumerate(rows) if u == user and chosen]
    return [rows[i][2] for t, i in sorted(mine) if time is None or t < time]


@dataclass(frozen=True)
class History:
    """The events among some rows, which are sorted by user and time, and the range of each row."""

    events: Events
    first: np.ndarray[Any, Any]
    stop: np.ndarray[Any, Any]
    own: np.ndarray[Any, Any]

    @staticmethod
    def of(
        folder: Path, rows: Sequence[tuple[int, int, int, bool]], batch: int, *, distinct: bool
    ) -> History:
        """Read the rows in batches of a size; the third value of a row is its entry."""
        columns = np.array(rows, dtype=np.int64).reshape(-1, 4)
        user, time, entry, chosen = *columns[:, :3].T, columns[:, 3].astype(bool)
        path = folder / f"events-{len(list(folder.iterdir()))}"
        file, positions = EventFile(path, np.zeros(4, dtype=np.int64), np.int64), Positions()
        found = []
        for start in range(0, len(rows), batch):
            part = slice(start, start + batch)
            found.append(positions.advance(user[part], time[part], chosen[part]))
            events = np.flatnonzero(chosen[part]) + start
            file.append(user[events], entry[events], time[events])
        first, stop, own = (
            np.concatenate([np.zeros(0, int), *c]) for c in zip(*found, strict=True)
        )
        return History(file.read(distinct=distinct), first, stop, own)

    def before(self, length: int) -> list[list[int]]:
        return as_lists(*self.events.last(self.first, self.stop, length))

    def latest(self, length: int) -> list[list[int]]:
        return as_lists(*self.events.last(self.events.starts[:-1], self.events.starts[1:], length))


def as_lists(lengths: Any, codes: Any) -> list[list[int]]:
    ends = np.cumsum(lengths)
    return [codes[a:b].tolist() for a, b in zip(ends - lengths, ends, strict=True)]


@settings(deadline=None)
@given(events, st.integers(1, 5), st.integers(1, 12))
def test_histories_equal_a_plain_loop(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[int, int, int, bool]],
    length: int,
    batch: int,
) -> None:
    if not rows:
        return
    rows = sorted(rows, key=lambda row: row[:2])
    found = History.of(tmp_path_factory.mktemp("events"), rows, batch, distinct=False)
    assert found.before(length) == [naive_history(rows, u, t)[-length:] for u, t, _, _ in rows]
    expected = [naive_history(rows, user, None)[-length:] for user in range(4)]
    assert found.latest(length) == expected


@settings(deadline=None)
@given(events, st.integers(1, 5), st.integers(1, 12))
def test_histories_without_repeats_keep_each_item_at_its_latest_time(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[int, int, int, bool]],
    length: int,
    batch: int,
) -> None:
    if not rows:
        return
    rows = sorted(rows, key=lambda row: row[:2])
    found = History.of(tmp_path_factory.mktemp("events"), rows, batch, distinct=True)

    def distinct(history: list[int]) -> list[int]:
        latest_first = list(dict.fromkeys(reversed(history)))
        return list(reversed(latest_first))[-length:]

    assert found.before(length) == [distinct(naive_history(rows, u, t)) for u, t, _, _ in rows]
    assert found.latest(length) == [distinct(naive_history(rows, u, None)) for u in range(4)]


def test_lists_without_repeats_reach_far_back_in_bounded_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One item fills the last 200 events, so the other items of the list are far back.
    monkeypatch.setattr("hvdrec.samples.history.GATHERED", 16)
    rows = [(0, t, t if t < 100 else 7, True) for t in range(300)]
    found = History.of(tmp_path, rows, 64, distinct=True)
    assert found.before(5)[-1] == [96, 97, 98, 99, 7]
    assert found.before(5)[:4] == [[], [0], [0, 1], [0, 1, 2]]
    assert found.latest(3)[0] == [98, 99, 7]


@settings(deadline=None)
@given(events, st.integers(1, 5), st.integers(0, 7))
def test_histories_end_at_an_age(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[int, int, int, bool]],
    length: int,
    age: int,
) -> None:
    if not rows:
        return
    rows = sorted(rows, key=lambda row: row[:2])
    found = History.of(tmp_path_factory.mktemp("events"), rows, 7, distinct=False)
    oldest = np.array([t - age for _, t, _, _ in rows])
    first = found.events.since(found.first, found.stop, oldest)
    expected = [
        [i for v, s, i, chosen in rows if v == u and chosen and t - age <= s < t][-length:]
        for u, t, _, _ in rows
    ]
    assert as_lists(*found.events.last(first, found.stop, length)) == expected


@settings(deadline=None)
@given(events, st.integers(1, 5), st.integers(1, 12))
def test_other_events_are_the_nearest_ones_without_the_row_itself(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[int, int, int, bool]],
    length: int,
    batch: int,
) -> None:
    if not rows:
        return
    ordered = sorted(rows, key=lambda row: row[:2])
    rows = [(u, t, i, chosen) for i, (u, t, _, chosen) in enumerate(ordered)]
    found = History.of(tmp_path_factory.mktemp("events"), rows, batch, distinct=False)
    user, chosen_rows = np.array([r[0] for r in rows]), np.array([r[3] for r in rows])
    position = np.where(chosen_rows, found.own, found.stop)
    others = as_lists(*found.events.others(user, position, chosen_rows, length))
    for number, (user_, time, _, chosen) in enumerate(rows):
        mine = sorted((t, i) for i, (u, t, _, c) in enumerate(rows) if u == user_ and c)
        left = [i for _, i in mine if i != number]
        assert number not in others[number]
        assert len(others[number]) == min(length, len(left))
        # They are contiguous in time order and adjacent to the row.
        place = mine.index((time, number)) if chosen else sum(t < time for t, _ in mine)
        first = left.index(others[number][0]) if others[number] else place
        assert others[number] == left[first : first + length]
        before, after = place - first, first + len(others[number]) - place
        enough = place >= length // 2 and len(left) - place >= length - length // 2
        assert not enough or (before, after) == (length // 2, length - length // 2)


@settings(max_examples=12, deadline=None, phases=(Phase.reuse, Phase.generate))
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 8), st.integers(0, 1)),
        min_size=12,
        max_size=40,
        unique=True,
    ),
    method=st.sampled_from(["temporal", "random", "random-per-user", "leave-last-out"]),
)
def test_no_history_contains_later_or_held_out_events(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[int, int, int, int]],
    method: str,
) -> None:
    raw = tmp_path_factory.mktemp("run") / "raw"
    log = [
        {"user_id": f"u{u}", "item_id": f"i{i}", "t": t, "label": label} for u, i, t, label in rows
    ]
    write(raw / "log.parquet", log)
    features = [f for f in FEATURES if f["name"] not in ("age", "genres", "late")]
    config = configured(
        raw,
        features,
        users=None,
        items=None,
        title=None,
        derive=None,
        label="label",
        split={"method": method, "fractions": [0.4, 0.3, 0.3]},
        history=[{"name": "liked", "length": 100}],
    )
    try:
        found = make(config)
    except UserError as error:
        assert "split" in str(error)
        return
    everything = [row for name in SPLITS for row in found[name]]
    assert Counter((r["user_id"], r["item_id"], r["time"]) for r in everything) == Counter(
        (r["user_id"], r["item_id"], r["t"]) for r in log
    )
    allowed = found["train"] if method.startswith("random") else everything
    for row in everything:
        before = [
            (r["time"], r["item_id"])
            for r in allowed
            if r["user_id"] == row["user_id"] and r["time"] < row["time"] and r["label"] == 1
        ]
        assert row["liked"] == [item for _, item in sorted(before)]
    for name, source in (("users_train", found["train"]), ("users_all", everything)):
        for user in found[name]:
            mine = [r for r in source if r["user_id"] == user["user_id"] and r["label"] == 1]
            assert user["liked"] == [
                r["item_id"] for r in sorted(mine, key=lambda r: (r["time"], r["item_id"]))
            ]


# ---------------------------------------------------------------------------------------- splits


def divided(
    method: str,
    user: Sequence[int],
    time: Sequence[float] | None,
    **more: Any,
) -> list[int]:
    """Return the split of each row; users are read one by one, sorted by time."""
    split = Split(method=method, **more)  # type: ignore[arg-type]
    users, times = np.array(user), np.zeros(len(user)) if time is None else np.array(time)
    order = np.lexsort((np.arange(len(user)), times, users))
    cuts = split.boundaries[:2] or None
    if method == "temporal" and not cuts:
        with connect() as engine:
            log = str(engine.register(pa.table({"t": times})).get_name())
            after = -np.inf if split.after is None else split.after
            new = f"t > CAST('{after}' AS DOUBLE)"
            histogram = f"SELECT t, count(*) AS c FROM {log} WHERE {new} GROUP BY t"
            found = engine.one(time_cuts(split, histogram, int((times > after).sum())))
        cuts = (found["first"], found["second"])
    splitter = Splitter.of(split, np.unique(users, return_counts=True)[1], cuts)
    starts, ends = splitter.starts[:-1].tolist(), splitter.starts[1:].tolist()
    parts = [
        splitter.assign(start, np.arange(start, end), times[order][start:end])
        for start, end in zip(starts, ends, strict=True)
    ]
    result = np.empty(len(order), dtype=np.int64)
    result[order] = np.concatenate(parts)
    return [int(part) for part in result]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 12), min_size=3, max_size=60))
def test_temporal_split_is_strict_and_closest_to_its_fractions(time: list[int]) -> None:
    if len(set(time)) < 3:
        return
    found = divided("temporal", [0] * len(time), time, fractions=(0.6, 0.2, 0.2))
    parts = [[t for t, s in zip(time, found, strict=True) if s == part] for part in range(3)]
    assert max(parts[0]) < min(parts[1]) and max(parts[1]) < min(parts[2])
    # No other cut with three non-empty splits is closer to the first fraction.
    sizes = [sum(t <= cut for t in time) for cut in sorted(set(time))[:-2]]
    assert abs(len(parts[0]) - 0.6 * len(time)) == min(abs(s - 0.6 * len(time)) for s in sizes)


@pytest.mark.parametrize("spread", [1, 40, 4000])
def test_long_logs_are_cut_at_the_same_times_as_short_ones(
    raw: Path, monkeypatch: pytest.MonkeyPatch, spread: int
) -> None:
    dice = random.Random(spread)
    log = [{**LOG[0], "user_id": f"u{t}", "t": int(dice.gauss(0, spread))} for t in range(3000)]
    write(raw / "log.parquet", log)
    config = configured(raw, users=None, items=None, title=None, features=[FEATURES[0]], history=[])
    short = make(config)
    monkeypatch.setattr("hvdrec.samples.row_plan.COARSE_ROWS", 0)
    assert make(config) == short


def test_temporal_split_equals_a_worked_example() -> None:
    time = [9, 1, 5, 5, 5, 2, 3, 4, 8, 7]
    assert divided("temporal", [0] * 10, time, fractions=(0.7, 0.2, 0.1)) == [
        2, 0, 0, 0, 0, 0, 0, 0, 1, 1,
    ]  # fmt: skip


def test_boundaries_are_the_last_values_of_train_and_validation() -> None:
    found = divided("temporal", [0] * 6, [44, 45, 48, 49, 1, 60], boundaries=(44.0, 48.0))
    assert found == [0, 1, 1, 2, 0, 2]


def test_rows_up_to_after_are_in_no_split() -> None:
    time = [1, 9, 2, 5, 5, 5, 2, 6, 6, 8, 7]
    assert divided("temporal", [0] * 11, time, after=2.0, fractions=(0.7, 0.2, 0.1)) == [
        -1, 2, -1, 0, 0, 0, -1, 0, 0, 1, 0,
    ]  # fmt: skip
    assert divided("temporal", [0] * 4, [1, 2, 3, 4], after=1.0, boundaries=(2.0, 3.0)) == [
        -1, 0, 1, 2,
    ]  # fmt: skip


def later(folder: Path, after: float) -> Config:
    """Return the configuration of a log with a row at each time from 0 to 9, in two users."""
    log = [{"user_id": f"u{t % 2}", "item_id": f"i{t}", "t": t, "label": 1} for t in range(10)]
    write(folder / "raw/log.parquet", log)
    return configured(
        folder / "raw",
        [f for f in FEATURES if f["name"] not in ("age", "genres", "late")],
        users=None,
        items=None,
        title=None,
        derive=None,
        label="label",
        split={"after": after, "fractions": [0.5, 0.25, 0.25]},
        history=[{"name": "liked", "length": 100}],
    )


def test_rows_in_no_split_fill_histories(tmp_path: Path) -> None:
    found = make(later(tmp_path, 5.0))
    rows = sorted((row for name in SPLITS for row in found[name]), key=lambda row: row["time"])
    assert [row["time"] for row in rows] == [6, 7, 8, 9]
    assert [row["liked"] for row in rows] == [
        [f"i{t}" for t in range(time % 2, time, 2)] for time in (6, 7, 8, 9)
    ]
    assert {user["user_id"]: len(user["liked"]) for user in found["users_all"]} == {
        "u0": 5,
        "u1": 5,
    }


def test_too_few_rows_after_a_time_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        make(later(tmp_path, 7.5))
    assert (caught.value.field, caught.value.value) == ("samples.split.after", 7.5)
    assert "2 distinct times" in str(caught.value)


@given(st.integers(20, 300), st.integers(0, 5))
def test_random_split_has_its_sizes_and_depends_on_the_seed(rows: int, seed: int) -> None:
    found = divided("random", [0] * rows, None, seed=seed)
    for part, share in enumerate((0.8, 0.1, 0.1)):
        assert abs(found.count(part) - share * rows) <= 1
    assert found == divided("random", [0] * rows, None, seed=seed)
    assert found != divided("random", [0] * rows, None, seed=seed + 1)


def test_random_split_is_the_same_on_every_machine() -> None:
    # SplitMix64 in Python integers.
    def mixed(x: int, seed: int) -> int:
        for salt in (seed, 0):
            x = (x + salt + 0x9E3779B97F4A7C15) % 2**64
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
            x ^= x >> 31
        return x

    assert hash64(np.arange(50), 7).tolist() == [mixed(row, 7) for row in range(50)]
    train = sorted(range(50), key=lambda row: mixed(row, 7))[:40]
    found = divided("random", [0] * 50, None, seed=7)
    assert [row for row in range(50) if found[row] == 0] == sorted(train)


def test_random_per_user_holds_out_of_every_user_with_three_rows() -> None:
    user = [0] * 25 + [1] * 3 + [2] * 2
    found = divided("random-per-user", user, None)
    assert [found[:25].count(part) for part in range(3)] == [21, 2, 2]
    assert sorted(found[25:28]) == [0, 1, 2]
    assert found[28:] == [0, 0]


def test_leave_last_out_takes_the_last_two_rows() -> None:
    user, time = [0, 1, 0, 0, 1, 0, 2, 2, 2], [5, 1, 7, 6, 2, 1, 3, 3, 3]
    assert divided("leave-last-out", user, time) == [0, 0, 2, 1, 0, 0, 0, 1, 2]


# ------------------------------------------------------------------------------------- negatives

taken = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 11)), min_size=1, max_size=80
)


def candidates(group: Any, item: Any) -> Candidates:
    pairs = np.unique(np.stack([group, item], 1), axis=0)
    return Candidates(pairs[:, 1], np.searchsorted(pairs[:, 0], np.arange(group.max() + 2)))


def drawn_items(group: Any, user: Any, item: Any, positive: Any, count: int, seed: int) -> Any:
    rows = np.arange(len(group))
    block = Block(rows, group, user, item, np.isin(rows, positive))
    return draw_negatives(candidates(group, item), block, count, seed)


@settings(deadline=None)
@given(taken, st.integers(1, 6), st.integers(0, 3))
def test_negatives_are_items_of_the_group_that_the_user_has_not_taken(
    rows: list[tuple[int, int, int]], per_positive: int, seed: int
) -> None:
    group, user, item = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    positive = np.arange(0, len(rows), 2)
    place, drawn = drawn_items(group, user, item, positive, per_positive, seed)
    # The draws of a row do not depend on the rows of other pairs that are in its block.
    for g, u in set(zip(group.tolist(), user.tolist(), strict=True)):
        own = np.flatnonzero((group == g) & (user == u))
        alone = Block(own, group[own], user[own], item[own], np.isin(own, positive))
        part, again = draw_negatives(candidates(group, item), alone, per_positive, seed)
        mine = np.isin(place, own)
        assert place[mine].tolist() == own[part].tolist() and drawn[mine].tolist() == again.tolist()
    assert (np.diff(place) >= 0).all()
    for row in positive:
        g, u, _ = rows[row]
        free = {i for h, _, i in rows if h == g} - {i for h, v, i in rows if h == g and v == u}
        mine = drawn[place == row].tolist()
        assert len(mine) == len(set(mine)) == min(per_positive, len(free))
        assert set(mine) <= free


@pytest.mark.parametrize("items", [9, 40])
def test_negatives_are_drawn_uniformly(items: int) -> None:
    # User 0 took item 0 in 3,000 rows; user 1 took all items. 9 candidates are enumerated, 40 are
    # drawn by rejection.
    count = 3000
    user = np.concatenate([np.zeros(count), np.ones(items)]).astype(np.int64)
    item = np.concatenate([np.zeros(count), np.arange(items)]).astype(np.int64)
    place, drawn = drawn_items(np.zeros_like(user), user, item, np.arange(count), 4, 0)
    assert np.array_equal(np.bincount(place), np.full(count, 4))
    seen = np.bincount(drawn, minlength=items)
    expected = 4 * count / (items - 1)
    assert seen[0] == 0
    # Chi-squared has items - 2 degrees of freedom; the bound is its mean plus five deviations.
    chi_squared = ((seen[1:] - expected) ** 2 / expected).sum()
    assert chi_squared < items - 2 + 5 * np.sqrt(2 * (items - 2))


@pytest.fixture
def shop(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Purchases in two stores, with a price per item and store, and products with a colour."""
    raw, dice = tmp_path / "raw", random.Random(0)
    log = [
        {
            "user_id": f"u{dice.randrange(5)}",
            "item_id": f"i{dice.randrange(20)}",
            "store": t % 2,
            "t": t,
        }
        for t in range(120)
    ]
    write(raw / "log.parquet", log)
    write(raw / "items.parquet", [{"item_id": f"i{i}", "colour": f"c{i}"} for i in range(20)])
    prices = [
        {"item_id": f"i{i}", "store": s, "price": i + 100 * s} for i in range(20) for s in (0, 1)
    ]
    write(raw / "prices.parquet", prices)
    changes = {
        "users": None,
        "title": None,
        "label": "1",
        "derive": {"dear": "price * 2"},
        "joins": [{"table": "prices.parquet", "on": ["item_id", "store"]}],
        "negatives": {"per_positive": 3, "within": ["store"]},
        "weight": "2",
    }
    return raw, changes


SHOP_FEATURES = [
    {"name": "liked", "kind": "sequence"},
    {"name": "item_id", "side": "item"},
    {"name": "colour", "side": "item"},
    {"name": "dear", "side": "scene", "dtype": "int"},
    {"name": "store", "side": "scene", "dtype": "int"},
]


@pytest.mark.parametrize("method", ["temporal", "random", "random-per-user", "leave-last-out"])
def test_negatives_share_context_and_split_and_get_their_own_joined_columns(
    shop: tuple[Path, dict[str, Any]], method: str
) -> None:
    raw, changes = shop
    found = make(configured(raw, SHOP_FEATURES, **{**changes, "split": {"method": method}}))
    log = pq.read_table(raw / "log.parquet").to_pylist()
    bought = {(r["user_id"], r["store"], r["item_id"]) for r in log}
    sold = {(r["store"], r["item_id"]) for r in log}
    total = 0
    for name in SPLITS:
        positives = {(r["user_id"], r["time"]): r for r in found[name] if r["label"] == 1}
        for row in found[name]:
            number = int(row["item_id"][1:])
            assert row["colour"] == f"c{number}"
            assert row["dear"] == 2 * (number + 100 * row["store"])
            if row["label"] == 1:
                assert row["weight"] == 2.0
                continue
            total += 1
            twin = positives[row["user_id"], row["time"]]  # its positive is in the same split
            assert (row["store"], row["liked"]) == (twin["store"], twin["liked"])
            assert (row["store"], row["item_id"]) in sold
            assert (row["user_id"], row["store"], row["item_id"]) not in bought
            assert row["weight"] == 1.0
    free = {
        (u, s): len({i for t, i in sold if t == s} - {i for v, t, i in bought if (v, t) == (u, s)})
        for u, s, _ in bought
    }
    assert total == sum(min(3, free[r["user_id"], r["store"]]) for r in log)
    assert [len(r["liked"]) for r in found["users_all"]] == [2] * 5


def test_negatives_have_label_zero_in_every_task(shop: tuple[Path, dict[str, Any]]) -> None:
    raw, changes = shop
    tasks = (Task("bought", "1"), Task("even", "CASE WHEN store = 0 THEN t % 4 = 0 END"))
    config = replace(configured(raw, SHOP_FEATURES, **changes), tasks=tasks)
    for row in make(config)["train"]:
        if row["label"] == 0:
            assert (row["label_bought"], row["label_even"]) == (0.0, 0.0)
        else:
            even = None if row["store"] else float(row["time"] % 4 == 0)
            assert (row["label_bought"], row["label_even"]) == (1.0, even)


def test_negatives_do_not_depend_on_the_size_of_blocks(
    shop: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, changes = shop
    whole = make(configured(raw, SHOP_FEATURES, **changes))
    monkeypatch.setattr("hvdrec.samples.sampled.BLOCK_ROWS", 7)
    assert make(configured(raw, SHOP_FEATURES, **changes)) == whole


def test_no_negatives_are_drawn_if_the_user_took_every_item(
    shop: tuple[Path, dict[str, Any]],
) -> None:
    raw, changes = shop
    write(
        raw / "log.parquet",
        [{"user_id": "u", "item_id": "i1", "store": 1, "t": t} for t in range(9)],
    )
    found = make(configured(raw, SHOP_FEATURES, **changes))
    assert [len(found[name]) for name in SPLITS] == [4, 3, 2]


# ------------------------------------------------------------------------------- user errors


def age_as(values: Mapping[str, Any]) -> pa.Table:
    """Return the users table with other columns."""
    return pa.table({"user_id": ["u1", "u2", "u9"], **values})


def test_missing_tables_are_named(raw: Path) -> None:
    hint = "no such file; check paths.raw and the table's name"
    assert error_of(configured(raw, interactions="logs.parquet")) == f"{raw}/logs.parquet: {hint}"
    assert error_of(configured(raw, items="part-*.csv")) == f"{raw}/part-*.csv: {hint}"
    suffixes = ".parquet, .csv, .csv.gz, .tsv, .tsv.gz, .jsonl, .jsonl.gz, .ndjson, .ndjson.gz"
    known = f"must be a directory or end in one of [{suffixes}]"
    assert error_of(configured(raw, users="users.xlsx")) == (
        f"{raw}/users.xlsx: {known}; convert the table, or declare its format in [[samples.tables]]"
    )
    hint = "check paths.raw and the table's name"
    assert error_of(configured(raw, users="users")) == f"{raw}/users: {known}; {hint}"
    assert error_of(configured(raw, interactions="")) == (
        "samples.interactions = '': is empty; name the table of impressions or actions"
    )


def test_a_file_with_a_wrong_suffix_is_refused(raw: Path) -> None:
    (raw / "log.parquet").write_text("user_id,item_id\n1,2\n")
    text = error_of(configured(raw))
    assert text.startswith(f"{raw}/log.parquet: not a readable Parquet file (")
    assert text.endswith("); write the table again")


def test_a_damaged_parquet_file_is_refused(raw: Path) -> None:
    file = raw / "log.parquet"
    write(file, [{**row, "t": i} for i in range(3000) for row in LOG])
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert error_of(configured(raw)).startswith(f"{file}: not a readable Parquet file (")
    # The footer is intact and the pages are not, so that only reading rows fails.
    file.write_bytes(whole[:4] + b"\xff" * 2000 + whole[2004:])
    assert error_of(configured(raw)).startswith(f"{file}: not a readable Parquet file (")
    write(file, LOG)
    users = raw / "users.parquet"
    write(users, [{"user_id": f"u{i}", "age": i} for i in range(3000)])
    whole = users.read_bytes()
    users.write_bytes(whole[:4] + b"\xff" * 2000 + whole[2004:])
    assert error_of(configured(raw)).startswith(f"{users}: not a readable Parquet file (")


def test_missing_columns_are_named(raw: Path) -> None:
    write(raw / "log.parquet", [{k: v for k, v in row.items() if k != "item_id"} for row in LOG])
    assert error_of(configured(raw)) == (
        f"{raw}/log.parquet: column 'item_id' (samples.item) is missing; the table has "
        "[user_id, rating, t]; correct the name"
    )
    write(raw / "log.parquet", LOG)
    features = [*FEATURES, {"name": "gender"}]
    assert error_of(configured(raw, features)) == (
        f"{raw}/log.parquet: column 'gender' (feature 'gender') is missing; the table and those "
        "joined to it have [user_id, item_id, rating, t, late, age, name, genres]; correct the "
        "name or add it to samples.derive"
    )
    assert "column 'when' (samples.time) is missing" in error_of(configured(raw, time="when"))
    assert "column 'week' (samples.split.column)" in error_of(
        configured(raw, split={"column": "week"})
    )
    assert "column 'store' (samples.negatives.within) is missing" in error_of(
        configured(raw, negatives={"per_positive": 1, "within": ["store"]})
    )
    assert error_of(configured(raw, title="label")) == (
        f"{raw}/items.parquet: column 'label' (samples.title) is missing; the table has "
        "[item_id, name, genres]; correct the name"
    )
    write(raw / "users.parquet", [{"uid": "u1", "age": 1}])
    assert error_of(configured(raw)) == (
        f"{raw}/users.parquet: column 'user_id' (key of samples.users) is missing; the table has "
        "[uid, age]; correct the name"
    )


def test_missing_or_mismatched_join_keys_are_refused(raw: Path) -> None:
    write(raw / "days.parquet", [{"day": 1, "price": 1.5}])
    joins = [{"table": "days.parquet", "on": ["day"]}]
    assert error_of(configured(raw, joins=joins)) == (
        f"samples.joins[0].on = 'day': not a column of {raw}/log.parquet or of a table joined "
        "before; known: [user_id, item_id, rating, t, late, age, name, genres]; add it to "
        "samples.derive"
    )
    derive = {"late": "t > 4", "day": "DATE '2020-01-01'"}
    assert error_of(configured(raw, joins=joins, derive=derive)) == (
        f"{raw}/days.parquet: key column 'day' is int64, but date in the interactions; use the "
        "same type in both tables"
    )


def test_duplicate_keys_are_refused(raw: Path) -> None:
    write(raw / "users.parquet", [*USERS, {"user_id": "u1", "age": 21}])
    assert error_of(configured(raw)) == (
        f"{raw}/users.parquet: 2 rows have user_id = u1 (samples.users); keep one row per key"
    )
    write(raw / "users.parquet", USERS)
    write(raw / "days.parquet", [{"t": 1, "x": 1}, {"t": 2, "x": 2}, {"t": 2, "x": 3}])
    assert error_of(configured(raw, joins=[{"table": "days.parquet", "on": ["t"]}])) == (
        f"{raw}/days.parquet: 2 rows have t = 2 (samples.joins[0]); keep one row per key"
    )


def test_null_and_empty_keys_are_refused(raw: Path) -> None:
    write(raw / "log.parquet", [*LOG, {**LOG[0], "user_id": None}, {**LOG[0], "user_id": ""}])
    config = configured(raw)
    assert error_of(config) == (
        f"{raw}/log.parquet: key column 'user_id' is null or empty in 2 rows; every row needs a "
        "key: drop them with samples.drop = \"user_id IS NULL OR user_id = ''\""
    )
    rest = configured(raw, drop="user_id IS NULL OR user_id = ''")
    write(raw / "items.parquet", [*ITEMS, {"item_id": None, "name": "?", "genres": None}])
    assert error_of(rest) == (
        f"{raw}/items.parquet: key column 'item_id' is null in 1 rows; every row needs a key: "
        "remove these rows"
    )
    write(raw / "items.parquet", ITEMS)
    assert len(make(rest)["train"]) == 5


@pytest.mark.parametrize("name", ["log.parquet", "log.csv"])
def test_float_keys_are_refused(raw: Path, name: str) -> None:
    write(raw / "log.parquet", [{**row, "user_id": float(row["user_id"][1:])} for row in LOG])
    lines = [f"{row['user_id'][1:]}.0,{row['item_id']},{row['rating']},{row['t']}" for row in LOG]
    (raw / "log.csv").write_text("\n".join(["user_id,item_id,rating,t", *lines]))
    derive = {"late": "t > 4", "age": "1"}
    assert error_of(configured(raw, interactions=name, users=None, derive=derive)) == (
        f"{raw}/{name}: key column 'user_id' is float, a key is [string, integer]; derive it, for "
        'example samples.derive.user_id = "CAST(user_id AS BIGINT)"'
    )
    derive["user_id"] = "CAST(user_id AS BIGINT)"
    found = make(configured(raw, interactions=name, users=None, derive=derive))
    assert [row["user_id"] for row in found["users_all"]] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("feature", "values", "message"),
    [
        (
            {"name": "age"},
            [1.0, 2.0, None],
            "is float, feature 'age' of dtype 'string' takes [string, integer]; derive it, for "
            'example samples.derive.age = "CAST(age AS BIGINT)"',
        ),
        (
            {"name": "age", "dtype": "int"},
            ["20", "old", None],
            "is string, feature 'age' of dtype 'int' takes [integer, boolean]; correct values such "
            "as 'old', or turn them into nulls with "
            'samples.derive.age = "TRY_CAST(age AS BIGINT)"',
        ),
        (
            {"name": "age", "kind": "numeric", "dtype": "float"},
            ["20", "old", None],
            "is string, feature 'age' of dtype 'float' takes [float, integer, decimal]; correct "
            "values such as 'old', or turn them into nulls with "
            'samples.derive.age = "TRY_CAST(age AS DOUBLE)"',
        ),
        (
            {"name": "age", "kind": "categorical_list"},
            ["x|y", "x", None],
            "is string, feature 'age' needs a list; derive it, for example "
            "samples.derive.age = \"string_split(age, '|')\"",
        ),
        (
            {"name": "age", "kind": "categorical_list"},
            [[1.5], [2.5], None],
            "is a list of float, feature 'age' of dtype 'string' takes [string, integer]; derive "
            'it, for example samples.derive.age = "CAST(age AS VARCHAR[])"',
        ),
        (
            {"name": "age"},
            [["x"], ["y"], None],
            "is a list of string, feature 'age' takes one value; declare kind = 'categorical_list'",
        ),
        (
            {"name": "age"},
            [True, False, None],
            "is boolean, feature 'age' of dtype 'string' takes [string, integer]; derive it, for "
            'example samples.derive.age = "CAST(age AS VARCHAR)"',
        ),
    ],
)
def test_columns_of_the_wrong_type_are_refused(
    raw: Path, feature: Row, values: list[Any], message: str
) -> None:
    write(raw / "users.parquet", age_as({"age": values}))
    features = [feature, *(f for f in FEATURES if f["name"] != "age")]
    text = error_of(configured(raw, features))
    assert text == f"{raw}/users.parquet: column 'age' {message}"


def test_integers_beyond_64_bits_are_refused(raw: Path) -> None:
    write(raw / "users.parquet", age_as({"age": pa.array([2**64 - 1, 1, 2], pa.uint64())}))
    text = error_of(configured(raw))
    assert text.startswith(f"{raw}/users.parquet: column 'age' (integer) does not fit dtype 'int'")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"label": "rating >"}, "samples.label = 'rating >'"),
        ({"label": "score > 3"}, "samples.label = 'score > 3'"),
        ({"weight": "1 +"}, "samples.weight = '1 +'"),
        ({"drop": "nothing = 1"}, "samples.drop = 'nothing = 1'"),
        ({"derive": {"late": "hour(when)"}}, "samples.derive.late = 'hour(when)'"),
        (
            {"history": [{"name": "liked", "where": "stars > 3"}]},
            "samples.history[0].where = 'stars > 3'",
        ),
    ],
)
def test_invalid_expressions_are_refused(raw: Path, changes: dict[str, Any], key: str) -> None:
    text = error_of(configured(raw, **changes))
    assert text.startswith(f"{key}: ")
    assert "; the columns are [user_id, item_id, rating, t" in text


def test_histories_of_later_rows_need_a_random_split(raw: Path) -> None:
    others = {"name": "liked", "scope": "others"}
    assert error_of(configured(raw, history=[others], split={"method": "temporal"})) == (
        "samples.history[0].scope = 'others': contains later rows, which "
        "samples.split.method = 'temporal' forbids; use scope = 'before'"
    )
    both = [{**others, "repeats": False}]
    assert error_of(configured(raw, history=both, split={"method": "random"})) == (
        "samples.history[0].repeats = false: works only with scope = 'before'; leave it out"
    )


def test_histories_of_another_column_use_its_values(raw: Path) -> None:
    write(raw / "items.parquet", [{**row, "maker": m} for row, m in zip(ITEMS, "qr?", strict=True)])
    features = [
        *FEATURES,
        {"name": "maker", "side": "item"},
        {"name": "makers", "kind": "sequence", "shares": "maker"},
    ]
    history = [{"name": "liked"}, {"name": "makers", "column": "maker", "repeats": False}]
    found = make(configured(raw, features, history=history))
    users = {row["user_id"]: row for row in found["users_all"]}
    # u1 liked a, then c, which has no maker, then a again.
    assert (users["u1"]["liked"], users["u1"]["makers"]) == (["a", "c", "a"], ["q"])
    assert (users["u2"]["liked"], users["u2"]["makers"]) == (["a", "b"], ["q", "r"])
    history[1]["column"] = "genres"
    with pytest.raises(UserError) as raised:
        configured(raw, features, history=history)
    assert (raised.value.field, raised.value.value) == ("samples.history[1].column", "genres")
    assert "known: [user_id, age, item_id, late, maker]" in str(raised.value)


def test_an_expression_that_fails_on_a_row_is_named(raw: Path) -> None:
    write(raw / "users.parquet", age_as({"age": ["20", "old", "3"]}))
    text = error_of(configured(raw, derive={"late": "t > 4", "age": "CAST(age AS INT)"}))
    assert text.startswith("samples.derive.age = 'CAST(age AS INT)': ")
    assert "'old'" in text and text.endswith("(TRY_CAST gives null where CAST fails)")


def test_labels_other_than_0_and_1_are_refused(raw: Path) -> None:
    assert error_of(configured(raw, label="CASE WHEN rating = 3 THEN 7 ELSE 1 END")) == (
        "samples.label = 'CASE WHEN rating = 3 THEN 7 ELSE 1 END': is neither 0 nor 1 in 1 of 9 "
        f"rows of {raw}/log.parquet, for example 7; write a condition such as 'rating > 3'"
    )
    text = error_of(configured(raw, label="CASE WHEN t > 1 THEN 1 END"))
    assert "is neither 0 nor 1 in 1 of 9 rows" in text and "for example null" in text
    assert error_of(configured(raw, label="item_id")) == (
        "samples.label = 'item_id': has type string; it must give 0 or 1, such as 'rating > 3'"
    )


LIKE, LOVE = Task("like", "rating > 3"), Task("love", "CASE WHEN rating > 3 THEN rating = 5 END")


def test_task_labels_are_written_beside_the_main_label(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(configured(raw), tasks=(LIKE, LOVE))
    make_samples(config)
    meta = read_manifest(config.paths.of("samples"), "samples").meta
    rows = pq.read_table(config.paths.of("samples") / "train")
    assert rows.schema.field("label_love").type == pa.float32()
    ratings = {(r["user_id"], r["t"]): r["rating"] for r in LOG}
    for name in SPLITS:
        found = pq.read_table(config.paths.of("samples") / name).to_pylist()
        for row in found:
            rating = ratings[row["user_id"], row["time"]]
            assert row["label_like"] == row["label"] == float(rating > 3)
            assert row["label_love"] == (float(rating == 5) if rating > 3 else None)
    # Training holds the ratings 5, 1, 4, 5 and 5.
    assert meta["tasks"]["like"]["train"] == {"rows": 5, "positives": 4}
    assert meta["tasks"]["love"]["train"] == {"rows": 4, "positives": 3}
    assert "train: love: 4 rows, 3 positive" in capsys.readouterr().err.splitlines()


def test_invalid_task_labels_are_refused(raw: Path) -> None:
    def error(label: str) -> str:
        return error_of(replace(configured(raw), tasks=(LIKE, Task("love", label))))

    assert error("rating") == (
        "tasks[1].label = 'rating': is neither 0 nor 1 in 7 of 9 rows of "
        f"{raw}/log.parquet, for example 4; write a condition such as 'rating > 3'"
    )
    assert error("item_id") == (
        "tasks[1].label = 'item_id': has type string; it must give 0 or 1, such as 'rating > 3'"
    )
    assert error("stars = 5").startswith("tasks[1].label = 'stars = 5': ")
    assert error("CASE WHEN t > 4 THEN 1 END") == (
        "tasks[1].label = 'CASE WHEN t > 4 THEN 1 END': is NULL in every training row; correct "
        "the expression or leave the task out"
    )


@pytest.mark.parametrize(
    ("weight", "count", "value"),
    [("3.5 - t", 6, "-3.5"), ("nullif(t, 8)", 1, "null"), ("1e308 * 10 * t", 9, "inf")],
)
def test_invalid_weights_are_refused(raw: Path, weight: str, count: int, value: str) -> None:
    assert error_of(configured(raw, weight=weight)) == (
        f"samples.weight = '{weight}': is negative or not finite in {count} of 9 rows of "
        f"{raw}/log.parquet, for example {value}; a weight is 0 or greater"
    )


def test_an_expression_that_is_not_a_condition_is_refused(raw: Path) -> None:
    assert error_of(configured(raw, drop="item_id")) == (
        "samples.drop = 'item_id': has type string; write a condition, such as 'rating > 3'"
    )


def test_invalid_times_are_refused(raw: Path) -> None:
    write(raw / "log.parquet", [*LOG, {**LOG[0], "t": None}])
    assert error_of(configured(raw)) == (
        f"{raw}/log.parquet: column 't' (samples.time) is null or not finite in 1 rows; every row "
        'needs a time: drop them with samples.drop = "t IS NULL"'
    )
    write(raw / "log.parquet", [{**row, "t": f"2020-01-0{row['t']} 10:00"} for row in LOG])
    assert error_of(configured(raw, derive={"late": "1"})) == (
        f"{raw}/log.parquet: column 't' (samples.time) is string, a time is "
        "[integer, float, date, timestamp]; derive it, for example "
        'samples.derive.t = "CAST(t AS TIMESTAMP)"'
    )
    derive = {"late": "1", "t": "CAST(t AS TIMESTAMP)"}
    assert len(make(configured(raw, derive=derive))["train"]) == 5


def test_a_missing_time_column_is_refused(raw: Path) -> None:
    assert error_of(configured(raw, time=None)) == (
        "samples.split.method = 'temporal': needs samples.time or samples.split.column, which is "
        "empty; name the column of the time or use method = 'random'"
    )
    assert error_of(configured(raw, time=None, split={"method": "leave-last-out"})) == (
        "samples.split.method = 'leave-last-out': needs samples.time, which is empty; name the "
        "column of the time or use method = 'random'"
    )
    assert error_of(configured(raw, time=None, split={"method": "random"})) == (
        "samples.history[0].name = 'liked': needs samples.time, which is empty; name the "
        "column of the time"
    )


def test_empty_splits_are_refused(raw: Path) -> None:
    assert error_of(configured(raw, split={"boundaries": [4, 9]})) == (
        "samples.split.boundaries = [4.0, 9.0]: the test split is empty: 't' ranges from 1 to 8; "
        "choose boundaries that leave rows on each side"
    )
    assert error_of(configured(raw, drop="t > 2")) == (
        "samples.split.column = 't': has 2 distinct values, a temporal split needs 3 or more (rows "
        "of one time stay together); choose another column or method = 'random'"
    )
    assert error_of(configured(raw, drop="t > 3", split={"method": "random"})) == (
        "samples.split.fractions = [0.8, 0.1, 0.1]: the test split is empty with 3 rows; provide "
        "more rows or other fractions"
    )
    for method in ("random-per-user", "leave-last-out"):
        assert error_of(configured(raw, drop="t > 3", split={"method": method})) == (
            f"samples.split.method = '{method}': the validation split is empty: no user has 3 or "
            "more rows (the maximum is 2); choose another method"
        )
    assert error_of(configured(raw, drop="true")) == (
        f"samples.drop = 'true': removes every row of {raw}/log.parquet; keep some rows"
    )


def test_boundaries_are_numbers(raw: Path) -> None:
    day = "DATE '2020-01-01' + t::INT"
    split = {"column": "day", "boundaries": [1, 2]}
    assert error_of(configured(raw, derive={"late": "1", "day": day}, split=split)) == (
        "samples.split.boundaries = [1.0, 2.0]: column 'day' is date32[day], boundaries are "
        'numbers; derive a number, for example samples.derive.day = "epoch(day) / 86400", and name '
        "it in samples.split.column"
    )


def test_negatives_refuse_item_features_of_the_interactions(raw: Path) -> None:
    features = [*FEATURES, {"name": "rating", "side": "item", "dtype": "int"}]
    assert error_of(configured(raw, features, negatives={"per_positive": 1})) == (
        f"features.name = 'rating': has side 'item' but is a column of {raw}/log.parquet; with "
        "samples.negatives, columns of items must come from samples.items or samples.joins"
    )
