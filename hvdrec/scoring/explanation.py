"""Explain a score: what each group of features, each history entry and the scene contribute.

The contributions are Shapley values (Shapley, 1953; Lundberg and Lee, "A unified approach to
interpreting model predictions", NIPS 2017). The players are groups of features. If a group is left
out, its features are missing and its scene fields have their defaults. The bundle's own graphs
score every subset of the groups, so the values are exact, not estimates: they add up to the score
minus the score with all groups left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import factorial
from typing import Any

import numpy as np

from hvdrec.scoring.array_files import Array
from hvdrec.scoring.batching import Entries, Raw
from hvdrec.scoring.bundle import BundleInfo
from hvdrec.scoring.candidates import Key
from hvdrec.scoring.embedder import Embedder
from hvdrec.scoring.graph_inputs import as_list, check_count, check_names
from hvdrec.scoring.ranking import PairRanker

MOST_SCENE_GROUPS = 2
"""If more scene fields than this are set, they form one group, since each group doubles the number
of subsets."""
Groups = dict[str, list[str]]
"""Name of a group -> its fields. The list is empty for a user or item that is given by its key."""


@dataclass(frozen=True)
class HistoryEffect:
    """How much a score falls if an entry is removed from a history.

    Attributes:
        feature: The history, such as ``liked``.
        entry: The entry, such as the key of an item.
        effect: Score minus the score without the entry; below 0 if the entry lowers the score.
    """

    feature: str
    entry: Any
    effect: float


@dataclass(frozen=True)
class Explanation:
    """Why an item has its score.

    Attributes:
        item: The item as it was requested.
        score: The score, as `Scorer.score` returns it.
        reference: The score of an unknown item for an unknown user in the default scene.
        contributions: Group of features -> its part of ``score - reference``. A user or item given
            by features has the groups ``user.id``, ``user.history`` (sequences), ``user.profile``,
            ``item.id`` and ``item.content``; one given by key is a single group.
            Scene fields are ``scene.NAME``, or together ``scene`` if there are more than two.
        scene_change: Score minus the score of the same user and item in the default scene.
        history: The history entries with the largest absolute effects, the largest first.
    """

    item: Key | Raw | None
    score: float
    reference: float
    contributions: Mapping[str, float]
    scene_change: float
    history: tuple[HistoryEffect, ...]


class Explainer:
    """Explains scores by running the graphs of a bundle on subsets of a request's features."""

    def __init__(
        self, info: BundleInfo, users: Embedder, items: Embedder, ranker: PairRanker
    ) -> None:
        """Use the opened graphs of a scorer."""
        self._info, self._users, self._items, self._ranker = info, users, items, ranker

    def explain(
        self, user: Key | Raw | None, items: Entries, scene: Raw | None, history: int
    ) -> list[Explanation]:
        """Explain the scores of items; for the arguments see `Scorer.explain`."""
        if history:
            check_count("history", history)
        entries, scene = as_list(items, "items"), {} if scene is None else scene
        check_names(scene, {field.name: None for field in self._info.side("scene")}, "scene")
        user_groups = self._groups("user", user)
        scene_groups = self._scene_groups(scene)
        users = self._users.embed(_subsets(user, user_groups))
        scenes = _subsets(scene, scene_groups)
        requests = np.repeat(users, len(scenes), axis=0), scenes * len(users)
        removals = _removals(self._info, user) if history else []
        without = [entry for _, _, entry in removals]
        shorter = self._users.embed(without) if without else None
        explanations = []
        for item in entries:
            item_groups = self._groups("item", item)
            vectors = self._items.embed(_subsets(item, item_groups))
            grid = self._ranker.score_grid(*requests, vectors).astype(np.float64)
            names = [*user_groups, *scene_groups, *item_groups]
            values = grid.reshape((2,) * len(names))
            effects: list[HistoryEffect] = []
            if shorter is not None:
                left = self._ranker.score_grid(shorter, [scene] * len(shorter), vectors[-1:])[:, 0]
                drop = (grid[-1, -1] - left).tolist()
                effects = [
                    HistoryEffect(feature, entry, effect)
                    for (feature, entry, _), effect in zip(removals, drop, strict=True)
                ]
                effects.sort(key=lambda each: -abs(each.effect))
            explanations.append(
                Explanation(
                    item,
                    float(grid[-1, -1]),
                    float(values.flat[0]),
                    dict(zip(names, shapley_values(values), strict=True)),
                    float(grid[-1, -1] - grid[-len(scenes), -1]),
                    tuple(effects[:history]),
                )
            )
        return explanations

    def _groups(self, side: str, entry: Key | Raw | None) -> Groups:
        """Return the groups of a user's or item's features that are present."""
        if not isinstance(entry, Mapping):
            return {} if entry is None else {side: []}
        key = self._info.user_key if side == "user" else self._info.item_key
        sequences = [f.name for f in self._info.side(side) if f.is_list and f.pads_left]
        groups: Groups = {}
        for name, value in entry.items():
            kind = "id" if name == key else "history" if name in sequences else "other"
            label = {"other": "profile" if side == "user" else "content"}.get(kind, kind)
            if not _is_missing(value):
                groups.setdefault(f"{side}.{label}", []).append(name)
        return groups

    def _scene_groups(self, scene: Raw) -> Groups:
        """Return the groups of scene fields whose value is not the default."""
        defaults = {field.name: field.default for field in self._info.side("scene")}
        changed = [name for name, value in scene.items() if value != defaults[name]]
        if len(changed) > MOST_SCENE_GROUPS:
            return {"scene": changed}
        return {f"scene.{name}": [name] for name in changed}


def shapley_values(values: Array) -> list[float]:
    """Return the Shapley value of each of G players.

    Args:
        values: Value of each subset of the players, float64 [2, ..., 2] with G axes; index 1 on an
            axis means that the player is in the subset.

    Returns:
        One number for each player. They add up to the value of all players minus the value of none.
    """
    players = values.ndim
    if not players:
        return []
    sizes = np.indices((2,) * (players - 1)).sum(axis=0)
    weight = np.array(
        [
            factorial(size) * factorial(players - size - 1) / factorial(players)
            for size in range(players)
        ]
    )[sizes]
    gains = (values.take(1, axis) - values.take(0, axis) for axis in range(players))
    return [float((weight * gain).sum()) for gain in gains]


def _subsets(entry: Any, groups: Groups) -> list[Any]:
    """Return the entry with each subset of its groups; the first has no group, the last all."""
    found: list[Any] = []
    for chosen in product((False, True), repeat=len(groups)):
        left_out = [
            name
            for is_in, names in zip(chosen, groups.values(), strict=True)
            for name in names
            if not is_in
        ]
        if isinstance(entry, Mapping):
            found.append({name: value for name, value in entry.items() if name not in left_out})
        else:
            found.append(entry if all(chosen) else None)
    return found


def _removals(info: BundleInfo, user: Key | Raw | None) -> list[tuple[str, Any, Raw]]:
    """Return (feature, entry, user without the entry) for each history entry the model uses."""
    if not isinstance(user, Mapping):
        return []
    found: list[tuple[str, Any, Raw]] = []
    for field in info.side("user"):
        values = user.get(field.name)
        if not (field.is_list and field.pads_left) or _is_missing(values):
            continue
        entries = [*(values or ())]
        # If the list is longer than what the model reads, an older entry takes the free place.
        for place in range(max(0, len(entries) - field.max_length), len(entries)):
            shorter = {**user, field.name: [*entries[:place], *entries[place + 1 :]]}
            found.append((field.name, entries[place], shorter))
    return found


def _is_missing(value: Any) -> bool:
    is_empty = isinstance(value, Sequence) and not isinstance(value, str) and not len(value)
    return value is None or is_empty or (isinstance(value, float) and np.isnan(value))
