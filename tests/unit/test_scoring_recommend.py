"""Recommendations from the bundle of tests/bundles.py: filters, seen items, trends, diversity.

The embedding of user 1 is [2, 2, 0.2]; its inner products with the items are 30: 4, 20: 3.5, 10: 3,
40: 2.
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
    """The scorer of a bundle whose only optional data are the titles."""
    path = tmp_path_factory.mktemp("bundles") / "b"
    return Scorer.load(write_bundle(path, trending=None, seen=None, filters=()))


def items(found: list[Recommendation]) -> list[Any]:
    return [r.item for r in found]


def check(
    call: Callable[..., Any], field: str, *words: str, user: Any = "1", **options: Any
) -> None:
    """Check the field of a refused request and that the error contains all words."""
    with pytest.raises(RequestError) as caught:
        call(user, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.field == field
    assert [word for word in words if word not in text] == [], text


# ------------------------------------------------------------------- known and unknown users


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
def test_a_user_of_whom_nothing_is_known_gets_trending_items(scorer: Scorer, user: Any) -> None:
    # Trending counts: 20 has 4, 30 and 10 have 1 (30 is more popular), 40 has 0.
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
def test_a_user_of_whom_something_is_known_gets_ranked_items(
    scorer: Scorer, user: Any, source: str
) -> None:
    found = scorer.recommend(user)
    assert {r.source for r in found} == {source}
    assert [r.score for r in found] == sorted((r.score for r in found), reverse=True)


def test_a_key_that_is_not_a_feature_only_selects_the_seen_items(tmp_path: Path) -> None:
    scorer = Scorer.load(write_bundle(tmp_path / "b"))
    users = scorer._users
    users.key_name, users._known = "account", (*users._known, "account")
    users._key_is_feature = False
    found = scorer.recommend({"account": "1"}, skip_seen=True)
    assert [(r.item, r.source) for r in found] == [("20", "trending"), ("40", "trending")]


def test_popular_items_replace_trending_ones_in_a_bundle_without_trending_counts(
    bare: Scorer,
) -> None:
    found = bare.recommend(None, k=3)
    assert [(r.item, r.retrieval_score) for r in found] == [("30", 7.0), ("10", 5.0), ("20", 2.0)]


def test_popularity_beyond_the_precision_of_float32_orders_the_candidates(tmp_path: Path) -> None:
    # float32 cannot represent 2**24 + 1. The filter makes `first` extend its prefix of the order.
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
def test_trending_items_are_ordered_by_trending_count_popularity_and_row(
    scorer: Scorer,
    counts: list[tuple[int, int]],
    count: int,
    excluded: list[int],
    allowed: list[bool] | None,
) -> None:
    item_data = scorer._retriever.item_data
    trending, popularity = np.array(counts).T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(item_data, "_counts", {"trending": trending, "popularity": popularity})
        patch.setattr(item_data, "_orders", {})
        rows = item_data.first(
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
def test_allowed_values_filter_the_items(
    scorer: Scorer, integers: Scorer, allowed: Any, found: list[str]
) -> None:
    assert items(scorer.recommend("1", allowed=allowed)) == found
    assert items(integers.recommend(1, allowed=allowed)) == [int(item) for item in found]


def test_filters_apply_to_trending_items(scorer: Scorer) -> None:
    assert items(scorer.recommend(None, allowed={"genres": ["War"]})) == ["20", "40"]
    assert items(scorer.recommend(None, allowed={"genres": ["War"]}, exclude=["20"])) == ["40"]


def test_filtered_items_do_not_count_as_candidates(scorer: Scorer) -> None:
    found = scorer.recommend("1", k=1, candidates=1, allowed={"genres": ["War"]}, exclude=["20"])
    assert items(found) == ["40"]


@pytest.mark.parametrize(
    ("allowed", "field", "words"),
    [
        ({"genre": ["War"]}, "allowed.genre", ["unknown", "[genres, year]"]),
        ({"item_id": ["10"]}, "allowed.item_id", ["unknown", "[genres, year]", "export.filters"]),
        ({"genres": "War"}, "allowed.genres", ["= 'War':", "must be a list, not a string"]),
        ({"genres": [7]}, "allowed.genres", ["= 7:", "a string, not an integer", "[Drama, War]"]),
        ({"genres": ["War", None]}, "allowed.genres", ["= None:", "a string", "[Drama, War]"]),
        ({"year": ["2000"]}, "allowed.year", ["= '2000':", "an integer", "[1990, 2000, 2010]"]),
        ({"year": [True]}, "allowed.year", ["= True:", "an integer", "[1990, 2000, 2010]"]),
        (["War"], "allowed", ["= ['War']:", "must be a mapping", "not a list"]),
    ],
)
def test_invalid_filters_are_refused(
    scorer: Scorer, allowed: Any, field: str, words: list[str]
) -> None:
    check(scorer.recommend, field, *words, allowed=allowed)


def test_a_value_that_is_not_unicode_matches_nothing(scorer: Scorer) -> None:
    assert scorer.recommend("1", allowed={"genres": ["\ud800"]}) == []


def test_an_error_lists_at_most_twenty_values(tmp_path: Path) -> None:
    rows = {str(i): {"genres": [], "year": 1900 + i} for i in range(30)}
    scorer = Scorer.load(write_bundle(tmp_path / "b", items=rows))
    shown = ", ".join(str(1900 + i) for i in range(20))
    check(scorer.recommend, "allowed.year", f"[{shown}, ...]", allowed={"year": [None]})


def test_a_bundle_without_filters_refuses_them(bare: Scorer) -> None:
    words = ["unknown", "known: []", "name 'genres' in export.filters and export again"]
    check(bare.recommend, "allowed.genres", *words, allowed={"genres": ["War"]})
    assert len(bare.recommend("1", allowed={})) == 4


# -------------------------------------------------------------------------------- seen items


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
def test_seen_items_are_skipped(scorer: Scorer, user: Any, found: list[str]) -> None:
    answer = scorer.recommend(user, skip_seen=True)
    assert sorted(items(answer)) == sorted(found)
    kept = [r for r in scorer.recommend(user) if r.item in found]
    assert answer == kept, "the other items are unchanged"


def test_seen_excluded_and_filtered_items_are_all_left_out(scorer: Scorer) -> None:
    options: dict[str, Any] = {"skip_seen": True, "exclude": ["20"], "allowed": {"genres": ["War"]}}
    assert items(scorer.recommend("1", **options)) == ["40"]


def test_a_bundle_without_seen_items_refuses_to_skip_them(bare: Scorer) -> None:
    for user in ("1", None):
        words = ["= True:", "does not hold", "export.seen = true"]
        check(bare.recommend, "skip_seen", *words, user=user, skip_seen=True)
    assert len(bare.recommend("1", skip_seen=False)) == 4


def test_invalid_options_are_refused(scorer: Scorer) -> None:
    check(scorer.recommend, "skip_seen", "= 1:", "True or False", skip_seen=1)
    for value in (-0.1, 1, 1.5, math.nan, "0.5", True, None):
        check(scorer.recommend, "diversity", f"= {value!r}:", "in [0, 1)", diversity=value)


# --------------------------------------------------------------------------------- diversity


def test_diversity_gives_the_order_computed_by_hand(scorer: Scorer) -> None:
    # Scores: 30 0.989, 20 0.985, 10 0.971, 40 0.909. 30 is first. Similarity to it: 10 0.707,
    # 20 0.919, 40 0.894. Marginal relevance at 0.5: 10 0.132, 20 0.033, 40 0.007.
    assert items(scorer.recommend("1")) == ["30", "20", "10", "40"]
    found = scorer.recommend("1", diversity=0.5)
    assert items(found) == ["30", "10", "20", "40"]
    assert [r.score for r in found] == scorer.score("1", ["30", "10", "20", "40"]).tolist()
    assert items(scorer.recommend("1", k=2, diversity=0.5)) == ["30", "10"]
    # The score of 20 is larger than that of 10 by 0.0145, its similarity by 0.212.
    assert items(scorer.recommend("1", diversity=0.06)) == ["30", "20", "10", "40"]
    assert items(scorer.recommend("1", diversity=0.07)) == ["30", "10", "20", "40"]


def test_diversity_reorders_trending_items(scorer: Scorer) -> None:
    # Relevance: 20 1, 30 and 10 0.25, 40 0. Similarity to 20: 30 0.919, 10 0.371, 40 0.998.
    assert items(scorer.recommend(None, k=2, diversity=0.5)) == ["20", "10"]


def test_diversity_chooses_only_among_the_candidates(scorer: Scorer) -> None:
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
def test_diversified_agrees_with_its_definition(
    rows: list[tuple[float, int, int]], k: int, diversity: float
) -> None:
    def similarity(a: int, b: int) -> float:
        x, y = np.array(rows[a][1:], float), np.array(rows[b][1:], float)
        lengths = np.linalg.norm(x) * np.linalg.norm(y)
        return float(x @ y / lengths) if lengths else 0.0

    def marginal(i: int, chosen: list[int]) -> float:
        if not chosen:
            return rows[i][0]
        return (1 - diversity) * rows[i][0] - diversity * max(similarity(i, j) for j in chosen)

    relevance = np.array([row[0] for row in rows], dtype=np.float32)
    vectors = np.array([row[1:] for row in rows], dtype=np.float32).reshape(-1, 2)
    chosen = diversified(relevance, vectors, k, diversity).tolist()
    assert len(chosen) == len(set(chosen)) == min(k, len(rows))
    for step, i in enumerate(chosen):
        left = set(range(len(rows))) - set(chosen[:step])
        # float32 cosines of equal directions may differ in the last bit.
        assert marginal(i, chosen[:step]) >= max(marginal(j, chosen[:step]) for j in left) - 1e-6


def test_ties_go_to_the_first_candidate() -> None:
    vectors = np.array([[1, 0], [0, 1], [0, 1], [1, 0]], dtype=np.float32)
    assert diversified(np.ones(4, np.float32), vectors, 4, 0.5).tolist() == [0, 1, 2, 3]
    assert diversified(np.zeros(0, np.float32), vectors[:0], 4, 0.5).tolist() == []


# ------------------------------------------------------------------------- damaged bundles


def rewritten(path: Path, name: str, array: Any) -> Path:
    """Replace an array of a bundle and update the manifest."""
    meta = Scorer.load(path).manifest["meta"]
    np.save(path / name, array)
    write_manifest(path, "bundle", meta)
    return path


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("items/popularity.npy", np.zeros(4), "float64"),
        ("items/trending.npy", np.arange(3), "(3,)"),
        ("users/seen_offsets.npy", np.array([0, 1]), "2 values into 2 parts"),
        ("users/seen_offsets.npy", np.array([0, 1, 1]), "2 values into 2 parts"),
        ("users/seen_offsets.npy", np.array([1, 2, 2]), "2 values into 2 parts"),
        ("users/seen_rows.npy", np.array([0, 2]), "int64"),
        ("items/filters/year/offsets.npy", np.arange(3), "3 values into 3 parts"),
        ("items/filters/year/rows.npy", np.zeros((3, 1), "i4"), "(3, 1)"),
        ("items/filters/year/values.npy", np.array([b"a", b"b", b"c"]), "'year' of type int"),
        ("items/titles_offsets.npy", np.arange(1, 6), "14 values into 4 parts"),
    ],
)
def test_an_array_of_another_type_or_shape_is_refused_at_loading(
    tmp_path: Path, name: str, array: Any, words: str
) -> None:
    path = rewritten(write_bundle(tmp_path / "b"), name, array)
    with pytest.raises(BundleError) as caught:
        Scorer.load(path)
    assert caught.value.field == str(path / name)
    assert words in str(caught.value)
    assert str(caught.value).endswith("; export the bundle again")


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("users/seen_rows.npy", np.array([0, 4], "i4"), "outside of 4 items"),
        ("users/seen_rows.npy", np.array([-1, 2], "i4"), "outside of 4 items"),
        ("users/seen_offsets.npy", np.array([0, 9, 2]), "does not ascend"),
        ("users/seen_offsets.npy", np.array([0, -1, 2]), "does not ascend"),
        ("items/filters/genres/rows.npy", np.array([0, 7, 1, 3], "i4"), "outside of 4 items"),
        ("items/titles_offsets.npy", np.array([0, 9, 4, 4, 14]), "into titles"),
        ("items/titles_offsets.npy", np.array([0, 3, 99, 4, 14]), "into titles"),
        ("items/titles.npy", np.full(14, 0xFF, np.uint8), "into titles"),
    ],
)
def test_inconsistent_contents_are_refused_when_they_are_read(
    tmp_path: Path, name: str, array: Any, words: str
) -> None:
    path = rewritten(write_bundle(tmp_path / "b"), name, array)
    scorer = Scorer.load(path, verify=False)  # verification would refuse it at once
    with pytest.raises(BundleError, match=words):
        scorer.recommend("1", skip_seen=True, allowed={"genres": ["Drama", "War"]})


@pytest.mark.parametrize(
    "name", ["users/seen_rows.npy", "items/filters/year/rows.npy", "items/filters/year/offsets.npy"]
)
def test_a_missing_array_is_refused(tmp_path: Path, name: str) -> None:
    path = write_bundle(tmp_path / "b")
    meta = Scorer.load(path).manifest["meta"]
    (path / name).unlink()
    write_manifest(path, "bundle", meta)
    with pytest.raises(BundleError, match=f"'{name}' is missing from the bundle; export it again"):
        Scorer.load(path)


def test_titles_are_read_for_any_number_of_rows(scorer: Scorer) -> None:
    titles: Titles = scorer._retriever.item_data.titles
    assert titles[np.empty(0, dtype=np.int64)] == []
    assert titles[np.array([2, 1, 0, 3])] == [None, "Zwölf", "Ten", "Forty"]
