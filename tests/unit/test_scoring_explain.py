"""`Scorer.explain`: exact Shapley values, compared with a mean over all orders of the groups."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdrec.scoring import RequestError, Scorer
from hvdrec.scoring.explanation import shapley_values
from tests.bundles import write_bundle

USER = {"user_id": "1", "age": 30.0, "history": ["10", "20"]}
ITEM = {"item_id": "20", "genres": ["War"], "year": 2010}
SCENE = {"hour": 21, "place": "home"}
GROUPS = {
    "user.id": ("user", ["user_id"]),
    "user.profile": ("user", ["age"]),
    "user.history": ("user", ["history"]),
    "item.id": ("item", ["item_id"]),
    "item.content": ("item", ["genres", "year"]),
    "scene.hour": ("scene", ["hour"]),
    "scene.place": ("scene", ["place"]),
}


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return Scorer.load(write_bundle(tmp_path_factory.mktemp("explain") / "bundle"))


def score_of(scorer: Scorer, groups: frozenset[str]) -> float:
    """The score with only some groups of the request."""
    parts: dict[str, dict[str, Any]] = {"user": {}, "item": {}, "scene": {}}
    sources: dict[str, dict[str, Any]] = {"user": USER, "item": ITEM, "scene": SCENE}
    for group in groups:
        side, names = GROUPS[group]
        parts[side] |= {name: sources[side][name] for name in names}
    return float(scorer.score(parts["user"], [parts["item"]], parts["scene"])[0])


def test_contributions_are_the_mean_gain_over_all_orders(scorer: Scorer) -> None:
    scores: dict[frozenset[str], float] = {}
    for order in permutations(GROUPS):
        for count in range(len(order) + 1):
            groups = frozenset(order[:count])
            if groups not in scores:
                scores[groups] = score_of(scorer, groups)
    gains: dict[str, list[float]] = {name: [] for name in GROUPS}
    for order in permutations(GROUPS):
        for count, name in enumerate(order):
            before = frozenset(order[:count])
            gains[name].append(scores[before | {name}] - scores[before])
    found = scorer.explain(USER, [ITEM], SCENE)[0]
    assert found.contributions.keys() == GROUPS.keys()
    for name, values in gains.items():
        assert found.contributions[name] == pytest.approx(np.mean(values), abs=1e-6), name
    assert found.reference == pytest.approx(scores[frozenset()])


@pytest.mark.parametrize("user", ["1", "nobody", None, USER, {"age": 20.0}, {"history": []}])
@pytest.mark.parametrize("scene", [None, SCENE, {**SCENE, "temperature": 12.0}, {"hour": 12}])
def test_contributions_add_up_to_the_score(scorer: Scorer, user: Any, scene: Any) -> None:
    items = ["10", ITEM, "unknown", None, {"year": 1990}]
    found = scorer.explain(user, items, scene)
    scores = scorer.score(user, items, scene)
    plain = scorer.score(user, items)
    for each, item, score, default in zip(found, items, scores, plain, strict=True):
        assert each.item == item
        assert each.score == pytest.approx(score, abs=1e-6)
        assert sum(each.contributions.values()) == pytest.approx(each.score - each.reference)
        assert each.scene_change == pytest.approx(score - default, abs=1e-6)


def test_a_stored_user_and_many_scene_fields_are_one_group_each(scorer: Scorer) -> None:
    scene = {**SCENE, "temperature": 12.0}
    assert scorer.explain("1", ["10"], scene)[0].contributions.keys() == {"user", "scene", "item"}
    # A default is no change, so it contributes nothing.
    assert "scene.hour" not in scorer.explain("1", ["10"], {"hour": 12})[0].contributions


def test_history_entries_are_removed_one_at_a_time(scorer: Scorer) -> None:
    user = {**USER, "history": ["30", "10", "20", "30"]}  # the model reads the last three
    found = scorer.explain(user, [ITEM], SCENE, history=2)[0].history
    whole = scorer.score(user, [ITEM], SCENE)[0]
    used, effects = ["10", "20", "30"], []
    for place, entry in enumerate(used):
        shorter = {**user, "history": [e for p, e in enumerate(user["history"]) if p != place + 1]}
        effects.append((entry, whole - scorer.score(shorter, [ITEM], SCENE)[0]))
    effects.sort(key=lambda each: -abs(each[1]))
    assert [(each.feature, each.entry) for each in found] == [
        ("history", entry) for entry, _ in effects[:2]
    ]
    assert [each.effect for each in found] == pytest.approx([e for _, e in effects[:2]], abs=1e-6)
    assert scorer.explain(user, [ITEM], SCENE, history=0)[0].history == ()
    assert scorer.explain("1", [ITEM])[0].history == ()


def test_invalid_requests_name_the_field(scorer: Scorer) -> None:
    for arguments, field in (
        ((USER, [ITEM], {"hours": 1}), "scene.hours"),
        (({"shoe": 1}, [ITEM]), "user.shoe"),
        ((USER, [{"colour": 1}]), "items.colour"),
        ((USER, [ITEM], {"hour": "x"}), "scene.hour"),
    ):
        with pytest.raises(RequestError) as error:
            scorer.explain(*arguments)
        assert error.value.field == field
    with pytest.raises(RequestError) as error:
        scorer.explain(USER, [ITEM], history=-1)
    assert error.value.field == "history"


def test_a_watched_scorer_explains(tmp_path: Path) -> None:
    with Scorer.watch(write_bundle(tmp_path / "bundle")) as watched:
        assert watched.explain("1", ["10"])[0].contributions.keys() == {"user", "item"}


def test_shapley_values_of_a_game_worked_out_by_hand() -> None:
    # Players 0 and 1 only earn together; player 2 earns 3 alone.
    values = np.zeros((2, 2, 2))
    values[1, 1, :] = 4
    values[:, :, 1] += 3
    assert shapley_values(values) == pytest.approx([2, 2, 3])
    assert shapley_values(np.array(5.0)) == []
