"""Features that go on from earlier ones: codes stay, new values are admitted, old ones evicted."""

from __future__ import annotations

import datetime
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdrec.config import Feature, Grow, Schema
from hvdrec.config.schema import FIRST_CODE, UNKNOWN
from hvdrec.errors import UserError
from hvdrec.features.encoder import Encoder
from hvdrec.features.fit import Fitted, fit
from hvdrec.features.grow import grow
from hvdrec.features.vocabulary import Growth, Vocabulary, first_vocabulary, grown_vocabulary

KEYS = (Feature("user"), Feature("item", side="item"))
DAY = 86_400


def write(folder: Path, name: str, **columns: object) -> Path:
    """Write the training split of samples; return the samples' directory."""
    table = pa.table(columns)
    rows = table.num_rows
    for key in ("user", "item"):
        if key not in columns:
            table = table.append_column(key, pa.array([key] * rows))
    (folder / name / "train").mkdir(parents=True)
    pq.write_table(table, folder / name / "train/part-00000.parquet")
    return folder / name


def schema(*features: Feature) -> Schema:
    return Schema((*KEYS, *features), "user", "item")


def saved(fitted: Fitted, folder: Path) -> Fitted:
    """Write fitted features and read them again, as the next preparation does."""
    folder.mkdir(exist_ok=True)
    fitted.save(folder)
    return Fitted.load(folder, to_grow=True)


def seen(counts: dict[str, int], day: float = 0.0) -> pa.Table:
    values = sorted(counts, key=lambda value: (-counts[value], value.encode()))
    return pa.table(
        {
            "value": pa.array(values, pa.string()),
            "count": pa.array([counts[value] for value in values], pa.int64()),
            "day": pa.array([day] * len(values), pa.float64()),
        }
    )


def test_a_value_is_admitted_when_its_occurrences_over_all_preparations_suffice(
    tmp_path: Path,
) -> None:
    features = schema(Feature("word", min_count=3))
    first = write(tmp_path, "first", word=["a"] * 3 + ["b"] * 2 + ["c"], time=[1 * DAY] * 6)
    # The rows at time 1 were counted before; they are repeated here, as in overlapping windows.
    words, times = ["b", "b", "c", "d", "d", "d", "d"], [1, 1, 2, 2, 2, 2, 2]
    second = write(tmp_path, "second", word=words, time=[time * DAY for time in times])
    third = write(tmp_path, "third", word=["b", "c"], time=[3 * DAY] * 2)
    fitted = saved(fit(first, features), tmp_path / "f0")
    assert fitted.features["word"].values == ["a"]
    fitted = saved(grow(second, features, fitted, Grow()), tmp_path / "f1")
    assert fitted.features["word"].values == ["a", "d"]
    fitted = saved(grow(third, features, fitted, Grow()), tmp_path / "f2")
    assert fitted.features["word"].values == ["a", "d", "b", "c"]
    assert fitted.generation == 2
    assert fitted.changed_in("word").tolist() == [0, 0, 0, 1, 2, 2]
    assert fitted.features["user"].values == ["user"]


def test_an_evicted_value_becomes_unknown_and_its_code_goes_to_a_new_value(tmp_path: Path) -> None:
    features, options = schema(Feature("word")), Grow(evict_days=2.0)
    days = {"first": ("old", "kept", 0), "second": ("kept", "kept", 2), "third": ("new", "x", 3)}
    folders = {
        name: write(tmp_path, name, word=[one, other], time=[day * DAY] * 2)
        for name, (one, other, day) in days.items()
    }
    fitted = saved(fit(folders["first"], features), tmp_path / "f0")
    old = fitted.features["word"].values.index("old")  # type: ignore[union-attr]
    fitted = saved(grow(folders["second"], features, fitted, options), tmp_path / "f1")
    assert fitted.features["word"].values == ["kept", "old"]  # unseen for exactly two days
    fitted = saved(grow(folders["third"], features, fitted, options), tmp_path / "f2")
    values = fitted.features["word"].values
    assert values is not None
    assert values[old] == "new"
    assert values == ["kept", "new", "x"]
    encoded = Encoder(fitted).encode(
        [fitted.schema["word"]], pa.table({"word": ["old", "kept", "new", "x"]})
    )
    assert encoded["word"].to_pylist() == [UNKNOWN, FIRST_CODE, FIRST_CODE + 1, FIRST_CODE + 2]
    assert fitted.changed_in("word").tolist() == [0, 0, 0, 2, 2]
    # Everything but the last word expires; free codes stay free, and the table keeps its size.
    late = write(tmp_path, "late", word=["x"], time=[30 * DAY])
    fitted = saved(grow(late, features, fitted, options), tmp_path / "f3")
    assert fitted.features["word"].values == [None, None, "x"]
    assert fitted.sizes["word"] == FIRST_CODE + 3
    assert fitted.changed_in("word").tolist() == [0, 0, 3, 3, 2]
    encoded = Encoder(fitted).encode([fitted.schema["word"]], pa.table({"word": ["kept", "x"]}))
    assert encoded["word"].to_pylist() == [UNKNOWN, FIRST_CODE + 2]


counts = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 3), max_size=6)


@given(
    st.lists(st.tuples(st.integers(1, 3), counts), min_size=1, max_size=8),
    st.integers(1, 4),
    st.sampled_from([0.0, 2.0, 4.0]),
)
@settings(max_examples=60, deadline=None)
def test_growth_equals_a_plain_simulation(
    steps: list[tuple[int, dict[str, int]]], min_count: int, evict_days: float
) -> None:
    day = 0
    vocabulary: Vocabulary | None = None
    codes: dict[str, int] = {}
    last: dict[str, int] = {}
    total: Counter[str] = Counter()
    for generation, (gap, new) in enumerate(steps):
        day += gap
        before = dict(codes)
        if vocabulary is None:
            vocabulary = first_vocabulary(seen(new, day), min_count)
        else:
            growth = Growth(generation, now=float(day), evict_days=evict_days)
            vocabulary = grown_vocabulary(vocabulary, seen(new, day), min_count, growth)
        for value, count in new.items():
            last[value] = day
            total[value] += 0 if value in codes else count
        if generation and evict_days:
            for value in [value for value in last if last[value] < day - evict_days]:
                codes.pop(value, None)
                del last[value], total[value]
        for value in sorted(total, key=lambda value: (-total[value], value)):
            if value not in codes and total[value] >= min_count:
                codes[value] = next(i for i in range(99) if i not in codes.values())
        assert {v: i for i, v in enumerate(vocabulary.values) if v is not None} == codes
        assert all(codes[value] == before[value] for value in codes if value in before)
        changed = [i for i, s in enumerate(vocabulary.since) if s == generation]
        assert {codes[v] for v in codes if v not in before} <= {*changed}


@pytest.mark.parametrize(
    "time",
    [
        pa.array([10 * DAY, 12 * DAY]),
        pa.array([1_700_000_000_000, 1_700_000_000_000 + 2 * DAY * 1000]),
        pa.array([datetime.datetime(2024, 1, 1), datetime.datetime(2024, 1, 3)]),
        pa.array([datetime.date(2024, 1, 1), datetime.date(2024, 1, 3)]),
    ],
    ids=["seconds", "milliseconds", "timestamps", "dates"],
)
def test_times_of_all_types_become_days(tmp_path: Path, time: pa.Array) -> None:
    fitted = fit(write(tmp_path, "s", word=["a", "b"], time=time), schema(Feature("word")))
    vocabulary = fitted.features["word"].vocabulary
    assert vocabulary is not None
    assert vocabulary.day[1] - vocabulary.day[0] == pytest.approx(2.0)
    assert fitted.newest_day == vocabulary.day[1]


def test_statistics_stay_or_follow(tmp_path: Path) -> None:
    numbers = Feature("x", kind="numeric", dtype="float")
    buckets = Feature("q", kind="numeric", dtype="float", transform="quantile", buckets=4)
    features = schema(numbers, buckets)
    wide, flat = [0.0, 1.0, 2.0, 3.0], [5.0, 5.0, 7.0, 7.0]
    first = fit(write(tmp_path, "first", x=wide, q=wide), features)
    second = write(tmp_path, "second", x=flat, q=flat)
    kept = grow(second, features, first, Grow())
    assert kept.features["x"].statistics == first.features["x"].statistics
    assert kept.features["q"].statistics == first.features["q"].statistics
    followed = grow(second, features, first, Grow(statistics="follow"))
    assert followed.features["x"].statistics == pytest.approx({"mean": 6.0, "deviation": 1.0})
    assert followed.features["q"].statistics["boundaries"] == [5.0, 6.0]
    # Fewer distinct boundaries: the table keeps its rows.
    assert followed.sizes["q"] == first.sizes["q"] == FIRST_CODE + 4


def test_a_new_feature_starts_in_this_generation(tmp_path: Path) -> None:
    first = fit(write(tmp_path, "first", word=["a"]), schema(Feature("word")))
    both = schema(Feature("word"), Feature("more"), Feature("shop", kind="hashed", dtype="int"))
    second = write(tmp_path, "second", word=["b"], more=["m"], shop=[1])
    fitted = saved(grow(second, both, first, Grow()), tmp_path / "f1")
    assert fitted.changed_in("word").tolist() == [0, 0, 0, 1]
    assert fitted.changed_in("more").tolist() == [1, 1, 1]
    assert set(fitted.changed_in("shop")) == {1}


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        (Feature("word", dimension=4), "features.word.dimension"),
        (Feature("word", dtype="int"), "features.word.dtype"),
    ],
)
def test_a_feature_whose_codes_change_their_meaning_is_refused(
    tmp_path: Path, changed: Feature, field: str
) -> None:
    first = fit(write(tmp_path, "first", word=["a"]), schema(Feature("word")))
    column = [1] if changed.dtype == "int" else ["a"]
    with pytest.raises(UserError) as caught:
        grow(write(tmp_path, "second", word=column), schema(changed), first, Grow())
    assert caught.value.field == field
    assert "rename" in str(caught.value)


def test_eviction_without_times_is_refused(tmp_path: Path) -> None:
    features = schema(Feature("word"))
    first = fit(write(tmp_path, "first", word=["a"]), features)
    with pytest.raises(UserError) as caught:
        grow(write(tmp_path, "second", word=["a"]), features, first, Grow(evict_days=1.0))
    assert caught.value.field == "grow.evict_days"
    assert caught.value.value == 1.0
    assert "samples.time" in str(caught.value)


def test_a_vocabulary_of_an_earlier_version_can_grow(tmp_path: Path) -> None:
    features = schema(Feature("word"))
    fitted = fit(write(tmp_path, "first", word=["a", "b"], time=[0, DAY]), features)
    folder = tmp_path / "f0"
    folder.mkdir()
    fitted.save(folder)
    file = folder / "vocabulary/word.parquet"
    pq.write_table(pq.read_table(file).select(["code", "value"]), file)
    for each in folder.glob("vocabulary/*.json"):
        each.unlink()
    before = Fitted.load(folder, to_grow=True)
    second = write(tmp_path, "second", word=["c"], time=[5 * DAY])
    grown = grow(second, features, before, Grow(evict_days=2.0))
    # When a value was last seen is unknown, so its time starts now.
    assert grown.features["word"].values == ["a", "b", "c"]
    vocabulary = grown.features["word"].vocabulary
    assert vocabulary is not None
    np.testing.assert_array_equal(vocabulary.day, [5.0, 5.0, 5.0])
