"""Scores, recommendations and embeddings of the bundle of tests/bundles.py, computed by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdrec.scoring import Recommendation, RequestError, Scorer, embedder
from hvdrec.scoring.batching import ALONE_ITEMS, shared_runs
from tests.bundles import write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def scorer(bundle: Path) -> Scorer:
    return Scorer.load(bundle)


@pytest.fixture(scope="module")
def integer_scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return Scorer.load(write_bundle(tmp_path_factory.mktemp("bundles") / "tiny", key_dtype="int"))


def logits(scores: np.ndarray) -> list[float]:
    assert scores.dtype == np.float32
    return [round(math.log(score / (1 - score)), 4) for score in scores.astype(np.float64)]


def test_stored_embeddings_equal_the_output_of_the_tower(scorer: Scorer) -> None:
    # 1: [1, 0] + 0.5 [1, 0] + 0.5 [1, 0] = [2, 0] -> [2, 2 + 0]; 2: [0, 1] -> [0, 0 + 1].
    np.testing.assert_allclose(scorer.embed_user("1"), [2.0, 2.0, 0.2])
    np.testing.assert_allclose(scorer.embed_user("2"), [0.0, 1.0, 0.4])
    # 10: [1, 0] + 0.5 [0.5, 0] + 0.5 [0.5, 0]; 20: [0, 1] + 0.5 [0.5, 0.5] + 0.5 [0.5, 0];
    # 40 is unknown to the vocabulary: [0.25, 0.25] + [0, 0.5].
    expected = [[1.5, 0.0, 0.0], [0.5, 1.25, 1.0], [1.0, 1.0, 0.0], [0.25, 0.75, -1.0]]
    found = scorer.embed_items(["10", "20", "30", "40"])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected)
    raw = [
        {"item_id": "10", "genres": ["Drama"], "year": 2000},
        {"item_id": "20", "genres": ["Drama", "War"], "year": 2010},
        {"item_id": "30"},
        {"item_id": "40", "genres": ["War"], "year": 1990},
    ]
    np.testing.assert_array_equal(scorer.embed_items(raw), found)


def test_changing_a_returned_embedding_does_not_change_the_store(scorer: Scorer) -> None:
    for embedding in (scorer.embed_user("1"), scorer.embed_items(["10"])):
        embedding[:] = 9.0
    np.testing.assert_allclose(scorer.embed_user("1"), [2.0, 2.0, 0.2])
    np.testing.assert_allclose(scorer.embed_items(["10"])[0], [1.5, 0.0, 0.0])


def test_scores_depend_on_the_scene(scorer: Scorer) -> None:
    scene = {"hour": 21, "place": "home", "temperature": 20.0}
    # Inner products: 10 has 2 * 1.5; 20 has 2 * 0.5 + 2 * 1.25 + 0.2 * 1. The scene adds
    # 1 + 0.25 + 2.
    assert logits(scorer.score("1", ["10", "20", "10"], scene)) == [6.25, 6.95, 6.25]
    # 20: 1 * 1.25 + 0.4; 40: 0.75 - 0.4.
    assert logits(scorer.score("2", ["20", "40"], scene)) == [4.9, 3.6]


def test_an_omitted_scene_field_takes_its_default_and_none_is_missing(scorer: Scorer) -> None:
    # The default of hour is 12, which adds 0.5; place and temperature have no default. The inner
    # product is 2 * 0 + 1 * 1 = 1.
    assert logits(scorer.score("2", ["30"])) == [1.5]
    assert logits(scorer.score("2", ["30"], {})) == [1.5]
    assert logits(scorer.score("2", ["30"], {"place": "home"})) == [1.75]
    for missing in (None, math.nan, np.float32("nan")):
        assert logits(scorer.score("2", ["30"], {"hour": missing})) == [1.0]
        everything = dict.fromkeys(["hour", "place", "temperature"], missing)
        assert logits(scorer.score("2", ["30"], everything)) == [1.0]


def test_an_unknown_scene_value_differs_from_a_missing_one(scorer: Scorer) -> None:
    assert logits(scorer.score("2", ["30"], {"hour": 3})) == [0.0]
    assert logits(scorer.score("2", ["30"], {"hour": None, "place": "moon"})) == [0.5]


def test_keys_that_are_not_stored_are_embedded_as_unknown(scorer: Scorer) -> None:
    # User [0.5, 0.5] -> [0.5, 1, 0], item [0.25, 0.25, 0]: 0.125 + 0.25, and 0.5 for the hour.
    np.testing.assert_allclose(scorer.embed_user("99"), [0.5, 1.0, 0.0])
    assert logits(scorer.score("99", ["no such film"])) == [0.875]
    # Together with stored items: 10 gives 0.5 * 1.5, 30 gives 0.5 + 1.
    assert logits(scorer.score("99", ["10", "no such film", "30"])) == [1.25, 0.875, 2.0]


@pytest.mark.parametrize("user", [{}, None, math.nan, {"user_id": None, "age": math.nan}])
def test_a_user_without_any_value_has_a_zero_embedding(scorer: Scorer, user: Any) -> None:
    np.testing.assert_array_equal(scorer.embed_user(user), [0.0, 0.0, 0.0])
    assert logits(scorer.score(user, ["10", "20"])) == [0.5, 0.5]


def test_raw_features_of_a_user_go_through_the_tower(scorer: Scorer) -> None:
    # Half of the newest three entries, [0, 1] + [1, 1] + [0, 1], and half of the newest:
    # [0.5, 2] -> [0.5, 2.5]; age 0.3.
    user = {"age": 30, "history": ["10", "10", "20", "30", "20"]}
    np.testing.assert_allclose(scorer.embed_user(user), [0.5, 2.5, 0.3], rtol=1e-6)
    # Raw features replace the stored embedding of a stored key.
    np.testing.assert_allclose(scorer.embed_user({"user_id": "2"}), [0.0, 1.0, 0.0])
    # An unknown entry of the history adds [0.25, 0.25]: half in the sum, half as the newest.
    np.testing.assert_allclose(scorer.embed_user({"history": ["x"]}), [0.25, 0.5, 0.0])


def test_a_batch_of_lists_of_unequal_length_gives_the_embeddings_of_each_alone(
    scorer: Scorer,
) -> None:
    histories = [["10", "20"], [], ["30"], None, ["10", "20", "30", "10"], math.nan]
    alone = [scorer.embed_user({"history": history}) for history in histories]
    together = scorer._users.embed([{"history": history} for history in histories])
    np.testing.assert_array_equal(together, alone)
    genres = [["War", "Drama", "Drama"], [], ["Drama"], None, ["x", "War"]]
    alone = [scorer.embed_items([{"genres": entry}])[0] for entry in genres]
    together = scorer.embed_items([{"genres": entry} for entry in genres])
    np.testing.assert_array_equal(together, alone)
    # War, the first, counts twice; the second Drama is beyond max_length.
    np.testing.assert_allclose(alone[0], [0.25, 0.5, 0.0])


def test_raw_items_and_keys_can_be_mixed(scorer: Scorer) -> None:
    items = ["30", {"item_id": "10", "genres": ["War"], "year": None}, "unseen", {"year": 2010}]
    # The embedding of user 2 is [0, 1, 0.4]; the inner products are 1; 0.5; 0.25; 0.4.
    assert logits(scorer.score("2", items)) == [1.5, 1.0, 0.75, 0.9]


def test_numpy_values_equal_python_values(scorer: Scorer) -> None:
    user = {
        "user_id": np.str_("1"),
        "age": np.float32(20),
        "history": np.array(["10"]),
    }
    scene = {"hour": np.int8(21), "place": np.str_("home"), "temperature": np.array(20)}
    items = np.array(["10", "20"])
    assert logits(scorer.score(user, items, scene)) == [6.25, 6.95]
    assert logits(scorer.score(np.str_("1"), items.astype(object), scene)) == [6.25, 6.95]
    raw = [{"item_id": "10", "genres": np.array(["Drama"], dtype=object), "year": np.int64(2000)}]
    assert logits(scorer.score("1", raw, scene)) == [6.25]


def test_integer_keys_are_integers_in_requests_and_answers(integer_scorer: Scorer) -> None:
    scorer = integer_scorer
    assert (scorer.key_dtype("user"), scorer.key_dtype("item")) == ("int", "int")
    assert logits(scorer.score(1, [10, 20], {"hour": 21})) == [4.0, 4.7]
    assert logits(scorer.score(np.int64(1), np.array([10, 20]), {"hour": 21})) == [4.0, 4.7]
    assert logits(scorer.score(99, [77, 10])) == [0.875, 1.25]
    np.testing.assert_allclose(scorer.embed_user({"history": [10, 20, None]}), [0.5, 1.0, 0.0])
    assert [r.item for r in scorer.recommend(1)] == [30, 20, 10, 40]
    assert type(scorer.recommend(1)[0].item) is int
    assert [r.item for r in scorer.recommend(1, exclude=np.array([20, 30, 5]))] == [10, 40]


def test_score_tasks_returns_the_probability_of_each_task(scorer: Scorer, tmp_path: Path) -> None:
    several = Scorer.load(write_bundle(tmp_path / "tasks", tasks=True))
    assert (several.tasks, scorer.tasks) == (("click", "love"), ())
    items = ["20", {"item_id": "10", "genres": ["War"]}, "no such film"]
    found = several.score_tasks("2", items, {"hour": 21})
    assert list(found) == ["score", "click", "love"]
    # The logit of click is that of the bundle without tasks: 1.65 + 1; 0.5 + 1; 0.25 + 1.
    np.testing.assert_array_equal(found["click"], scorer.score("2", items, {"hour": 21}))
    assert logits(found["click"]) == [2.65, 1.5, 1.25]
    assert logits(found["love"]) == [1.65, 0.5, 0.25]
    np.testing.assert_allclose(found["score"], found["click"] * found["love"], rtol=1e-6)
    np.testing.assert_array_equal(several.score("2", items, {"hour": 21}), found["score"])
    assert [r.score for r in several.recommend("2", k=1)] == [several.score("2", ["20"])[0]]
    rows = several.score_tasks_rows(["2", "2"], ["20", "no such film"], {"hour": [21, 21]})
    for name, column in rows.items():
        assert column.dtype == np.float32
        np.testing.assert_allclose(column, found[name][[0, 2]], rtol=1e-6)
    for empty in (several.score_tasks("2", []), several.score_tasks_rows([], [])):
        assert [(name, scores.shape) for name, scores in empty.items()] == [
            ("score", (0,)),
            ("click", (0,)),
            ("love", (0,)),
        ]


def test_score_tasks_is_refused_for_a_bundle_without_tasks(scorer: Scorer) -> None:
    for ask in (lambda: scorer.score_tasks("1", ["10"]), lambda: scorer.score_tasks_rows([], [])):
        with pytest.raises(RequestError, match=r"^tasks: this bundle's ranker has a single label"):
            ask()


def test_blocks_do_not_change_the_scores_of_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer.load(write_bundle(tmp_path / "tasks", tasks=True))
    whole = scorer.score_tasks("1", ["10", "20", "30", "40", "x"])
    monkeypatch.setattr("hvdrec.scoring.ranking.BLOCK_ROWS", 2)
    for name, scores in scorer.score_tasks("1", ["10", "20", "30", "40", "x"]).items():
        np.testing.assert_allclose(scores, whole[name], rtol=1e-6)


def test_an_empty_list_of_items_has_no_scores(scorer: Scorer) -> None:
    for items in ([], (), np.array([], dtype=str)):
        scores = scorer.score("1", items)
        assert scores.shape == (0,)
        assert scores.dtype == np.float32
    assert scorer.embed_items([]).shape == (0, 3)
    assert scorer.score_rows([], []).shape == (0,)


def test_score_rows_scores_each_row_in_its_own_scene(scorer: Scorer) -> None:
    users: list[Any] = ["1", "2", {"age": 10.0}, "99", None]
    items: list[Any] = ["10", {"item_id": "10", "genres": ["War"]}, "20", "30", {}]
    scenes = {"hour": [21, None, 12, 3, 21], "place": np.array(["home", "", "x", "home", "home"])}
    expected = [
        scorer.score(user, [item], {"hour": hour, "place": str(place)})[0]
        for user, item, hour, place in zip(users, items, *scenes.values(), strict=True)
    ]
    np.testing.assert_array_equal(scorer.score_rows(users, items, scenes), expected)
    # 3 + 1 + 0.25; 0.5; 0.1 + 0.5 - 0.5; 1.5 - 1 + 0.25; 1 + 0.25.
    assert logits(np.array(expected)) == [4.25, 0.5, 0.1, 0.75, 1.25]
    # hour is left out: its default in every row.
    assert logits(scorer.score_rows(["2", "2"], ["30", "30"], {"place": [None, "x"]})) == [1.5, 1.0]
    assert logits(scorer.score_rows(np.array(["2"]), np.array(["30"]))) == [1.5]


def test_blocks_do_not_change_the_scores_of_rows(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = ["1", "2", "99"] * 4
    items: list[Any] = ["10", {"genres": ["War"]}, "40", "unseen"] * 3
    hours = [21, 12, None, 3, 21, 21] * 2
    rows = scorer.score_rows(users, items, {"hour": hours})
    one_scene = scorer.score("1", items, {"hour": 21})
    for block in (1, 5, 12):
        monkeypatch.setattr(embedder, "BLOCK_ROWS", block)
        monkeypatch.setattr("hvdrec.scoring.ranking.BLOCK_ROWS", block)
        np.testing.assert_allclose(
            scorer.score_rows(users, items, {"hour": hours}), rows, rtol=1e-6
        )
        np.testing.assert_allclose(scorer.score("1", items, {"hour": 21}), one_scene, rtol=1e-6)


def test_score_many_returns_the_scores_of_each_request(scorer: Scorer) -> None:
    requests: list[Any] = [
        ("1", ["10", "20"], {"hour": 21, "place": "home"}),
        ({"user_id": "2", "age": 40.0}, ["30"], None),
        ("nobody", [], {"hour": 12}),
        (None, np.array(["20", "nowhere", "10"]), {"place": None}),
        ("2", ["10", {"item_id": "20", "genres": ["War"]}] * 50, {"temperature": -3.5}),
    ]
    found = scorer.score_many(requests)
    assert [len(scores) for scores in found] == [2, 1, 0, 3, 100]
    for scores, request in zip(found, requests, strict=True):
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, scorer.score(*request), rtol=1e-6)
    assert scorer.score_many([]) == []
    assert [len(scores) for scores in scorer.score_many([("1", [], None)] * 2)] == [0, 0]
    # The ranker runs twice instead of four times.
    assert [list(run) for run in shared_runs([2, 1, 0, 3, 100])] == [[4], [0, 1, 2, 3]]


@pytest.mark.parametrize("counts", [[], [0, 0], [63] * 200, [64, 1, 4096, 2], [1] * 9000])
def test_each_request_is_in_one_shared_run(counts: list[int]) -> None:
    runs = list(shared_runs(counts))
    assert sorted(index for run in runs for index in run) == list(range(len(counts)))
    for run in runs:
        assert len(run) == 1 or sum(counts[index] for index in run) <= embedder.BLOCK_ROWS
        assert len(run) == 1 or max(counts[index] for index in run) < ALONE_ITEMS


def test_recommend_ranks_the_retrieved_items(scorer: Scorer) -> None:
    # Retrieval of user 1 by [2, 2]: 30 has 4, 20 has 3.5, 10 has 3, 40 has 2.
    found = scorer.recommend("1", {"hour": 21}, k=2)
    assert [(r.item, r.title, r.retrieval_score) for r in found] == [
        ("30", None, 4.0),
        ("20", "Zwölf", 3.5),
    ]
    assert logits(np.array([r.score for r in found], dtype=np.float32)) == [5.0, 4.7]
    # User 2: 20 has 1.25, 30 has 1, 40 has 0.75, 10 has 0; the years decide the ranking:
    # 20 gets 1.25 + 0.4, 40 gets 0.75 - 0.4.
    ranked = scorer.recommend("2")
    assert [r.item for r in ranked] == ["20", "30", "40", "10"]
    assert ranked[0] == Recommendation("20", float(scorer.score("2", ["20"])[0]), 1.25, "Zwölf")


def test_only_the_nearest_candidates_are_ranked(scorer: Scorer) -> None:
    # For an age of 400, the ranker puts 20 (year 2010) first; the towers put 30 first.
    user = {"user_id": "1", "age": 400.0}
    assert [r.item for r in scorer.recommend(user, k=1)] == ["20"]
    assert [r.item for r in scorer.recommend(user, k=1, candidates=1)] == ["30"]
    assert [r.item for r in scorer.recommend(user, k=3, candidates=1)] == ["20", "30", "10"]


@pytest.mark.parametrize("exclude", [["30", "nowhere", "30"], {"30"}, {"30": 1}.keys(), ("30",)])
def test_excluded_items_are_left_out(scorer: Scorer, exclude: Any) -> None:
    found = scorer.recommend("1", k=2, candidates=2, exclude=exclude)
    assert [r.item for r in found] == ["20", "10"]


def test_a_k_larger_than_the_number_of_items_returns_all_items(scorer: Scorer) -> None:
    assert len(scorer.recommend("1", k=1000)) == 4
    assert [r.item for r in scorer.recommend("1", k=4, exclude=["10", "20", "40"])] == ["30"]
    assert scorer.recommend("1", exclude=["10", "20", "30", "40"]) == []


def test_equal_scores_are_returned_in_the_order_of_keys(scorer: Scorer) -> None:
    # The embedding of a user with age 0 and no other feature is zero.
    user = {"age": 0.0}
    assert [r.item for r in scorer.recommend(user)] == ["10", "20", "30", "40"]
    assert [r.item for r in scorer.recommend(user, k=2, candidates=2)] == ["10", "20"]
    assert [r.item for r in scorer.recommend(user, k=2, candidates=2, exclude=["10"])] == [
        "20",
        "30",
    ]


def test_a_model_without_retrieval_ranks_the_most_popular_items(tmp_path: Path) -> None:
    scorer = Scorer.load(write_bundle(tmp_path / "b", retrieval_width=0))
    # Popularity: 30 has 7, 10 has 5, 20 has 2.
    found = scorer.recommend("2", k=2, candidates=2)
    assert [(r.item, r.retrieval_score) for r in found] == [("30", 7.0), ("10", 5.0)]


def test_a_bundle_without_users_and_titles_recommends_trending_items(tmp_path: Path) -> None:
    scorer = Scorer.load(write_bundle(tmp_path / "b", users={}, titles=None))
    assert scorer.users == 0
    np.testing.assert_allclose(scorer.embed_user("1"), [1.0, 1.0, 0.0])
    found = scorer.recommend("1", k=1)  # a key that is not stored gets trending items
    assert [(r.item, r.title, r.source) for r in found] == [("20", None, "trending")]


def test_a_bundle_without_items_recommends_nothing(tmp_path: Path) -> None:
    scorer = Scorer.load(write_bundle(tmp_path / "b", items={}, titles={}))
    assert scorer.recommend("1") == []
    assert logits(scorer.score("2", ["30"])) == [1.5]


def test_a_scorer_describes_its_bundle(scorer: Scorer) -> None:
    assert (scorer.users, scorer.items) == (2, 4)
    assert [scorer.title(item) for item in ("10", "20", "30", "nowhere")] == [
        "Ten",
        "Zwölf",
        None,
        None,
    ]
    assert scorer.manifest["kind"] == "bundle"
    fields = {field.name: field for field in scorer.schema}
    assert len(fields) == 9
    assert (fields["hour"].side, fields["hour"].dtype, fields["hour"].default) == (
        "scene",
        "int",
        12,
    )
    assert fields["history"].pads_left and not fields["genres"].pads_left


def test_many_threads_get_the_results_of_one(bundle: Path) -> None:
    users: list[Any] = ["1", "2", "99", {"age": 31.0, "history": ["20", "10"]}, {"user_id": "2"}]
    items: list[Any] = ["10", "20", {"item_id": "30", "genres": ["War"]}, "40", "unseen"]

    def request(scorer: Scorer, number: int) -> tuple[bytes, list[Recommendation]]:
        user, scene = users[number % 5], {"hour": [12, 21, 3][number % 3], "temperature": number}
        requested = items[number % 4 :]
        exclude = items[:1] if number % 2 else []
        found = scorer.recommend(user, scene, k=3, exclude=exclude)
        return scorer.score(user, requested, scene).tobytes(), found

    serial = [request(Scorer.load(bundle), number) for number in range(200)]
    shared = Scorer.load(bundle)
    with ThreadPoolExecutor(16) as pool:
        runs = pool.map(lambda _: [request(shared, number) for number in range(200)], range(16))
        assert all(run == serial for run in runs)


def test_importing_scoring_imports_no_training_package() -> None:
    program = (
        "import sys, hvdrec.scoring, hvdrec.scoring.watch\n"
        "tops = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(tops & {'torch', 'horovod', 'pyarrow', 'pandas', 'onnx', 'duckdb'}))\n"
        "loaded = {n for n in sys.modules if n.startswith('hvdrec.')}\n"
        "print(sorted(n for n in loaded if not n.startswith('hvdrec.scoring')))\n"
    )
    command = [sys.executable, "-W", "error::DeprecationWarning", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]"]
