"""Recommendations of the bundle of tests/bundles.py: filters, what was seen, trends, diversity.

Of user 1, embedding [2, 2, 0.2], the items have the inner products 30: 4, 20: 3.5, 10: 3, 40: 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdrec.scoring import BundleError, Recommendation, RequestError, Scorer
from hvdrec.scoring.diversity import diversified
from hvdrec.scoring.item_data import Titles
from hvdrec.storage.artifacts import write_manifest
from tests.bundles import write_bundle


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return Scorer.load(write_bundle(tmp_path_factory.mktemp("bundles") / "b"), verify=True)


@pytest.fixture(scope="module")
def integers(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return Scorer.load(write_bundle(tmp_path_factory.mktemp("bundles") / "b", key_dtype="int"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    """The scorer of a bundle that holds nothing optional but its titles."""
    path = tmp_path_factory.mktemp("bundles") / "b"
    return Scorer.load(write_bundle(path, trending=None, seen=None, filters=()))


def items(found: list[Recommendation]) -> list[Any]:
    return [r.item for r in found]


def refusal(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------ what is known


@pytest.mark.parametrize(
    "user",
    [
        None,
        "no such user",
        float("nan"),
        {},
        {"user_id": "no such user"},
        {"user_id": None, "age": math.nan, "history": []},
        {"history": [None, ""]},
    ],
)
def test_of_a_user_of_whom_nothing_is_known(scorer: Scorer, user: Any) -> None:
    # Trending: 20 four times, 30 and 10 once, of which 30 is more popular, 40 never.
    found = scorer.recommend(user, {"hour": 21}, k=3, candidates=1)
    assert [(r.item, r.retrieval_score, r.title, r.source) for r in found] == [
        ("20", 4.0, "Zwölf", "trending"),
        ("30", 1.0, None, "trending"),
        ("10", 1.0, "Ten", "trending"),
    ]
    scores = scorer.score(user, ["20", "30", "10"], {"hour": 21})
    assert [r.score for r in found] == scores.tolist()
    assert items(scorer.recommend(user)) == ["20", "30", "10", "40"]


@pytest.mark.parametrize(
    ("user", "source"),
    [
        ("1", "stored"),
        ({"user_id": "1"}, "features"),
        ({"age": 0}, "features"),
        ({"history": [None, "10"]}, "features"),
        ({"user_id": "no such user", "history": ["no such film"]}, "features"),
    ],
)
def test_of_a_user_of_whom_something_is_known(scorer: Scorer, user: Any, source: str) -> None:
    found = scorer.recommend(user)
    assert {r.source for r in found} == {source}
    assert [r.score for r in found] == sorted((r.score for r in found), reverse=True)


def test_a_key_that_is_no_feature_tells_nothing_but_what_was_seen(tmp_path: Path) -> None:
    scorer = Scorer.load(write_bundle(tmp_path / "b"))
    tower = scorer._users
    tower.key_name, tower._known = "account", (*tower._known, "account")
    tower._key_is_feature = False
    found = scorer.recommend({"account": "1"}, skip_seen=True)
    assert [(r.item, r.source) for r in found] == [("20", "trending"), ("40", "trending")]


def test_what_trends_where_the_bundle_does_not_tell(bare: Scorer) -> None:
    found = bare.recommend(None, k=3)
    assert [(r.item, r.retrieval_score) for r in found] == [("30", 7.0), ("10", 5.0), ("20", 2.0)]


def test_popular_candidates_of_a_large_catalogue(tmp_path: Path) -> None:
    # Counts that float32 does not tell apart; a prefix of the order that has to be lengthened.
    path = write_bundle(tmp_path / "b", retrieval_width=0)
    counts = np.array([2**24, 2**24 + 1, 3, 2**24 + 1])
    rewritten(path, "items/popularity.npy", counts)
    scorer = Scorer.load(path)
    found = scorer.recommend("1", k=3, candidates=3)
    assert {(r.item, r.retrieval_score) for r in found} == {
        ("20", 2.0**24 + 1),
        ("40", 2.0**24 + 1),
        ("10", 2.0**24),
    }
    assert [r.score for r in found] == sorted((r.score for r in found), reverse=True)
    assert items(scorer.recommend("1", k=1, candidates=1)) == ["20"]
    assert items(scorer.recommend("1", k=1, candidates=1, allowed={"year": [2000]})) == ["10"]


@given(
    counts=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=4, max_size=4),
    count=st.integers(1, 5),
    excluded=st.lists(st.integers(0, 3), max_size=4),
    allowed=st.none() | st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_the_order_of_what_trends(
    scorer: Scorer,
    counts: list[tuple[int, int]],
    count: int,
    excluded: list[int],
    allowed: list[bool] | None,
) -> None:
    catalogue = scorer._retrieval.catalogue
    trending, popularity = np.array(counts).T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "_counts", {"trending": trending, "popularity": popularity})
        patch.setattr(catalogue, "_orders", {})
        rows = catalogue.first(
            "trending",
            count,
            np.array(excluded, dtype=np.int64),
            None if allowed is None else np.array(allowed),
        )
    left = [row for row in range(4) if row not in excluded and (allowed is None or allowed[row])]
    order = sorted(left, key=lambda row: (-counts[row][0], -counts[row][1], row))
    assert rows.tolist() == order[:count]


# ---------------------------------------------------------------------------------- filters


@pytest.mark.parametrize(
    ("allowed", "found"),
    [
        ({"genres": ["Drama"]}, ["20", "10"]),
        ({"genres": ["War"]}, ["20", "40"]),
        ({"genres": ("War", "Drama", "War")}, ["20", "10", "40"]),
        ({"genres": {"War"}, "year": np.array([1990, 1991])}, ["40"]),
        ({"genres": np.array(["War"]), "year": [2000]}, []),
        ({"year": [2010, np.int32(2000)]}, ["20", "10"]),
        ({"genres": ["no such genre", "War\0", "Wa", "Warlike"]}, []),
        ({"year": [2**70, 5]}, []),
        ({"genres": []}, []),
        ({}, ["30", "20", "10", "40"]),
        (None, ["30", "20", "10", "40"]),
    ],
)
def test_allowed_values(scorer: Scorer, integers: Scorer, allowed: Any, found: list[str]) -> None:
    assert items(scorer.recommend("1", allowed=allowed)) == found
    assert items(integers.recommend(1, allowed=allowed)) == [int(item) for item in found]


def test_filters_hold_for_what_trends_too(scorer: Scorer) -> None:
    assert items(scorer.recommend(None, allowed={"genres": ["War"]})) == ["20", "40"]
    assert items(scorer.recommend(None, allowed={"genres": ["War"]}, exclude=["20"])) == ["40"]


def test_filters_come_before_the_candidates_are_counted(scorer: Scorer) -> None:
    found = scorer.recommend("1", k=1, candidates=1, allowed={"genres": ["War"]}, exclude=["20"])
    assert items(found) == ["40"]


@pytest.mark.parametrize(
    ("allowed", "text"),
    [
        ({"genre": ["War"]}, "allowed.genre: unknown field; known: [genres, year]"),
        (
            {"item_id": ["10"]},
            "allowed.item_id: unknown field; known: [genres, year]; "
            "name 'item_id' in export.filters and export again",
        ),
        ({"genres": "War"}, "allowed.genres = 'War': must be a list, not str"),
        (
            {"genres": [7]},
            "allowed.genres = 7: must be a string, not int; known: [Drama, War]",
        ),
        (
            {"genres": ["War", None]},
            "allowed.genres = None: must be a string, not NoneType; known: [Drama, War]",
        ),
        (
            {"year": ["2000"]},
            "allowed.year = '2000': must be an integer, not str; known: [1990, 2000, 2010]",
        ),
        (
            {"year": [True]},
            "allowed.year = True: must be an integer, not bool; known: [1990, 2000, 2010]",
        ),
        ({"genres": ["\ud800"]}, None),
        (
            ["War"],
            "allowed = ['War']: must be a mapping of fields to values, not list",
        ),
    ],
)
def test_filters_that_do_not_fit(scorer: Scorer, allowed: Any, text: str | None) -> None:
    if text is None:
        assert scorer.recommend("1", allowed=allowed) == []
    else:
        assert refusal(scorer.recommend, "1", allowed=allowed) == text


def test_a_long_list_of_values_is_cut_in_the_error(tmp_path: Path) -> None:
    rows = {str(i): {"genres": [], "year": 1900 + i} for i in range(30)}
    scorer = Scorer.load(write_bundle(tmp_path / "b", items=rows))
    text = refusal(scorer.recommend, "1", allowed={"year": [None]})
    assert text.endswith("1918, 1919, ...]") and "1900, 1901" in text


def test_a_bundle_without_filters(bare: Scorer) -> None:
    assert refusal(bare.recommend, "1", allowed={"genres": ["War"]}) == (
        "allowed.genres: unknown field; known: []; name 'genres' in export.filters and export again"
    )
    assert len(bare.recommend("1", allowed={})) == 4


# ----------------------------------------------------------------------------- what was seen


@pytest.mark.parametrize(
    ("user", "found"),
    [
        ("1", ["20", "40"]),
        ("2", ["20", "30", "40", "10"]),
        ({"user_id": "1", "age": 20.0}, ["20", "40"]),
        ({"age": 20.0}, ["20", "40", "10", "30"]),
        (None, ["20", "30", "10", "40"]),
        ("no such user", ["20", "30", "10", "40"]),
    ],
)
def test_skipping_what_was_seen(scorer: Scorer, user: Any, found: list[str]) -> None:
    answer = scorer.recommend(user, skip_seen=True)
    assert sorted(items(answer)) == sorted(found)
    kept = [r for r in scorer.recommend(user) if r.item in found]
    assert answer == kept, "the rest is as it was"


def test_all_that_may_be_left_out_at_once(scorer: Scorer) -> None:
    options: dict[str, Any] = {"skip_seen": True, "exclude": ["20"], "allowed": {"genres": ["War"]}}
    assert items(scorer.recommend("1", **options)) == ["40"]


def test_a_bundle_that_does_not_hold_what_was_seen(bare: Scorer) -> None:
    text = (
        "skip_seen = True: the bundle does not hold the items that users have seen; "
        "export it with export.seen = true"
    )
    assert refusal(bare.recommend, "1", skip_seen=True) == text
    assert refusal(bare.recommend, None, skip_seen=True) == text
    assert len(bare.recommend("1", skip_seen=False)) == 4


def test_options_that_are_none(scorer: Scorer) -> None:
    assert refusal(scorer.recommend, "1", skip_seen=1) == "skip_seen = 1: must be True or False"
    for wrong in (-0.1, 1, 1.5, math.nan, "0.5", True, None):
        assert refusal(scorer.recommend, "1", diversity=wrong) == (
            f"diversity = {wrong!r}: must be a number in [0, 1)"
        )


# --------------------------------------------------------------------------------- diversity


def test_diversity_by_hand(scorer: Scorer) -> None:
    # Scores: 30 0.989, 20 0.985, 10 0.971, 40 0.909. 30 comes first; likeness to it: 10 0.707,
    # 20 0.919, 40 0.894. Half and half: 10 0.132, 20 0.033, 40 0.007; then 20, then 40.
    assert items(scorer.recommend("1")) == ["30", "20", "10", "40"]
    found = scorer.recommend("1", diversity=0.5)
    assert items(found) == ["30", "10", "20", "40"]
    assert [r.score for r in found] == scorer.score("1", ["30", "10", "20", "40"]).tolist()
    assert items(scorer.recommend("1", k=2, diversity=0.5)) == ["30", "10"]
    # A trace of it changes nothing here: 20 leads 10 by 0.0145 and is more alike by 0.212.
    assert items(scorer.recommend("1", diversity=0.06)) == ["30", "20", "10", "40"]
    assert items(scorer.recommend("1", diversity=0.07)) == ["30", "10", "20", "40"]


def test_diversity_of_what_trends(scorer: Scorer) -> None:
    # Shares of the most: 20 1, 30 and 10 0.25, 40 0. Likeness to 20: 30 0.919, 10 0.371, 40 0.998.
    assert items(scorer.recommend(None, k=2, diversity=0.5)) == ["20", "10"]


def test_diversity_reaches_as_far_as_the_candidates(scorer: Scorer) -> None:
    assert items(scorer.recommend("1", k=2, candidates=2, diversity=0.9)) == ["30", "20"]
    assert items(scorer.recommend("1", k=2, candidates=3, diversity=0.9)) == ["30", "10"]


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(-2, 2), st.integers(-2, 2)),
        max_size=7,
    ),
    st.integers(1, 8),
    st.sampled_from([0.0, 0.25, 0.5, 0.9]),
)
def test_diversified_against_its_definition(
    rows: list[tuple[float, int, int]], k: int, diversity: float
) -> None:
    def likeness(a: int, b: int) -> float:
        x, y = np.array(rows[a][1:], float), np.array(rows[b][1:], float)
        lengths = np.linalg.norm(x) * np.linalg.norm(y)
        return float(x @ y / lengths) if lengths else 0.0

    def gain(i: int, chosen: list[int]) -> float:
        if not chosen:
            return rows[i][0]
        return (1 - diversity) * rows[i][0] - diversity * max(likeness(i, j) for j in chosen)

    relevance = np.array([row[0] for row in rows], dtype=np.float32)
    vectors = np.array([row[1:] for row in rows], dtype=np.float32).reshape(-1, 2)
    chosen = diversified(relevance, vectors, k, diversity).tolist()
    assert len(chosen) == len(set(chosen)) == min(k, len(rows))
    for place, i in enumerate(chosen):
        left = set(range(len(rows))) - set(chosen[:place])
        # float32 cosines of equal directions may differ in the last bit.
        assert gain(i, chosen[:place]) >= max(gain(j, chosen[:place]) for j in left) - 1e-6


def test_of_equals_the_first_key_is_chosen() -> None:
    vectors = np.array([[1, 0], [0, 1], [0, 1], [1, 0]], dtype=np.float32)
    assert diversified(np.ones(4, np.float32), vectors, 4, 0.5).tolist() == [0, 1, 2, 3]
    assert diversified(np.zeros(0, np.float32), vectors[:0], 4, 0.5).tolist() == []


# ------------------------------------------------------------------------- damaged bundles


def rewritten(path: Path, name: str, array: Any) -> Path:
    """Replace an array of a bundle, with a manifest that says so."""
    meta = Scorer.load(path).manifest["meta"]
    np.save(path / name, array)
    write_manifest(path, "bundle", meta)
    return path


@pytest.mark.parametrize(
    ("name", "array", "text"),
    [
        ("items/popularity.npy", np.zeros(4), "is float64 of shape (4,), expected int64 of (4,)"),
        ("items/trending.npy", np.arange(3), "is int64 of shape (3,), expected int64 of (4,)"),
        ("users/seen_offsets.npy", np.array([0, 1]), "does not cut 2 rows into 2 lists"),
        ("users/seen_offsets.npy", np.array([0, 1, 1]), "does not cut 2 rows into 2 lists"),
        ("users/seen_offsets.npy", np.array([1, 2, 2]), "does not cut 2 rows into 2 lists"),
        ("users/seen_rows.npy", np.array([0, 2]), "is int64 of shape (2,), not int32"),
        ("items/filters/year/offsets.npy", np.arange(3), "does not cut 3 rows into 3 lists"),
        ("items/filters/year/rows.npy", np.zeros((3, 1), "i4"), "is int32 of shape (3, 1), not"),
        (
            "items/filters/year/values.npy",
            np.array([b"a", b"b", b"c"]),
            "is |S1 of shape (3,), feature 'year' is of type int",
        ),
        ("items/titles_offsets.npy", np.arange(1, 6), "does not fit 4 items and their titles"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_at_once(
    tmp_path: Path, name: str, array: Any, text: str
) -> None:
    path = rewritten(write_bundle(tmp_path / "b"), name, array)
    with pytest.raises(BundleError) as caught:
        Scorer.load(path)
    assert str(caught.value).startswith(f"{path / name}: {text}")
    assert str(caught.value).endswith("; export the bundle again")


@pytest.mark.parametrize(
    ("name", "array", "text"),
    [
        ("users/seen_rows.npy", np.array([0, 4], "i4"), "holds rows that are not among 4 items"),
        ("users/seen_rows.npy", np.array([-1, 2], "i4"), "holds rows that are not among 4 items"),
        ("users/seen_offsets.npy", np.array([0, 9, 2]), "does not ascend"),
        ("users/seen_offsets.npy", np.array([0, -1, 2]), "does not ascend"),
        (
            "items/filters/genres/rows.npy",
            np.array([0, 7, 1, 3], "i4"),
            "holds rows that are not among 4 items",
        ),
        ("items/titles_offsets.npy", np.array([0, 9, 4, 4, 14]), "does not fit 4 items"),
        ("items/titles_offsets.npy", np.array([0, 3, 99, 4, 14]), "does not fit 4 items"),
        ("items/titles.npy", np.full(14, 0xFF, np.uint8), "does not fit 4 items"),
    ],
)
def test_arrays_that_are_damaged_within_are_found_when_they_are_read(
    tmp_path: Path, name: str, array: Any, text: str
) -> None:
    path = rewritten(write_bundle(tmp_path / "b"), name, array)
    scorer = Scorer.load(path)
    with pytest.raises(BundleError, match=text):
        scorer.recommend("1", skip_seen=True, allowed={"genres": ["Drama", "War"]})


@pytest.mark.parametrize(
    "name", ["users/seen_rows.npy", "items/filters/year/rows.npy", "items/filters/year/offsets.npy"]
)
def test_half_of_what_belongs_together(tmp_path: Path, name: str) -> None:
    path = write_bundle(tmp_path / "b")
    meta = Scorer.load(path).manifest["meta"]
    (path / name).unlink()
    write_manifest(path, "bundle", meta)
    with pytest.raises(BundleError, match=f"'{name}' is missing from the bundle; export it again"):
        Scorer.load(path)


def test_titles_of_no_rows(scorer: Scorer) -> None:
    titles: Titles = scorer._retrieval.catalogue.titles
    assert titles.of(np.empty(0, dtype=np.int64)) == []
    assert titles.of(np.array([2, 1, 0, 3])) == [None, "Zwölf", "Ten", "Forty"]
