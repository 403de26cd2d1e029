"""The baselines' report: all of them measured as the model is, on the same rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import psutil

from hvdrec.config import Config
from hvdrec.evaluation.baselines import fit_baselines
from hvdrec.evaluation.held_out import (
    Interactions,
    Retrieval,
    Scores,
    ranking_report,
    read_interactions,
)
from hvdrec.evaluation.item_item import Measure, choose, cooccurrence, ease, ease_bytes, taken_items
from hvdrec.evaluation.ranking import order_metrics
from hvdrec.evaluation.tasks import task_baselines
from hvdrec.parallel import ranks
from hvdrec.storage.urls import read_metadata

CHOICE_USERS, CHOICE_ROWS = 10_000, 500_000
"""Most users and rows of the validation split on which a baseline's setting is chosen."""


def compare(
    config: Config, split: str, scores: Scores | None, top: Retrieval | None, ease_items: int
) -> dict[str, Any]:
    """Return ``baselines``, the report of each, and ``notes``, lines on them, on every rank.

    scores: the split's rows, for ranking metrics; top: the users to retrieve for; either may be
    absent. All baselines are fitted on the training rows alone. ease_items: the largest catalogue
    for which EASE is fitted.
    """
    train = read_interactions(config.paths.of("features"), ["train"])
    item_item, notes = ranks.broadcast_object(
        ranks.run_on_all(
            lambda: (
                _item_item_baselines(config, split, train, scores, ease_items)
                if ranks.current().is_first
                else None
            )
        )
    )
    return {"baselines": {**_baselines(config, train, scores, top), **item_item}, "notes": notes}


def _baselines(
    config: Config, train: Interactions, scores: Scores | None, top: Retrieval | None
) -> dict[str, Any]:
    """Return the report of popularity and means, from the training rows alone."""
    users, items = _counts(config)
    fitted = fit_baselines(train.user, train.item, train.label, train.weight, users, items)
    found: dict[str, dict[str, Any]] = {}
    if scores is not None:
        for name, score in fitted.scores(scores.user, scores.item).items():
            found.setdefault(name, {})["ranking"] = ranking_report(score, scores, config)
    if top is not None:
        for name, vectors in fitted.item_vectors().items():
            everyone = np.ones((users, 1))
            found.setdefault(name, {})["retrieval"] = top.metrics(everyone, vectors, config)
    if scores is not None and config.tasks:
        for name, report in task_baselines(config, train, scores, users, items).items():
            found[name]["tasks"] = report
    return found


def _item_item_baselines(
    config: Config, split: str, train: Interactions, scores: Scores | None, ease_items: int
) -> tuple[dict[str, Any], list[str]]:
    """Return the report of co-occurrence and EASE, from the training rows alone, and notes.

    Their settings are chosen on the validation split, for ranking and for retrieval apart. One rank
    does it all: whole [items, items] matrices are too much to have on each.
    """
    users, items = _counts(config)
    positive = train.where((train.label > 0) & (train.weight > 0))
    taken = taken_items(positive.user, positive.item, users, items)
    by = _choice_metrics(config)
    rows: Interactions | None = None
    validation: Interactions | None = None
    if scores is not None:
        rows = Interactions(scores.user, scores.item, scores.label, scores.weight)
        validation = read_interactions(config.paths.of("features"), ["validation"])
        step = math.ceil(len(validation.user) / CHOICE_ROWS)
        validation = validation.where(np.arange(len(validation.user)) % max(step, 1) == 0)
    found: dict[str, Any] = {}
    lacking = _lacks_for_ease(items, ease_items)
    notes = [lacking] if lacking else []
    with ranks.single_rank():
        to_choose = _measures(config, "validation", validation, most_users=CHOICE_USERS)
        to_report = _measures(config, split, rows)
        for make in (cooccurrence,) if lacking else (cooccurrence, ease):
            family = make(taken)
            chosen = choose(family, by, to_choose)
            report: dict[str, Any] = {"chosen": chosen}
            for value in sorted({choice[family.setting] for choice in chosen.values()}):
                model = family.fit(value)
                for kind, choice in chosen.items():
                    if choice[family.setting] == value:
                        report[kind] = to_report[kind](model)
            found[family.name] = report
            told = [
                f"{choice[family.setting]:g} for {kind} (validation {by[kind]} "
                f"{choice[by[kind]]:.4f})"
                for kind, choice in chosen.items()
            ]
            notes.append(f"{family.name}: {family.setting} = {', '.join(told)}")
    names = " and ".join(found)
    if split == "validation":
        notes.append(f"{names}: chosen on the very rows that they are measured on")
    if scores is not None:
        notes.append(f"{names}: scores are no probabilities, what needs these is n/a")
    return found, notes


def _choice_metrics(config: Config) -> dict[str, str]:
    """Return by which metrics baselines are chosen: that of early stopping where it applies."""
    name, objective = config.train.metric, config.train.objective
    by: dict[str, str] = {}
    if objective != "retrieval":
        by["ranking"] = "gauc" if name == "gauc" else "auc"
    if objective != "ranking":
        by["retrieval"] = f"{'ndcg' if name == 'ndcg' else 'recall'}@{config.evaluate.k[0]}"
    return by


def _measures(
    config: Config, split: str, rows: Interactions | None, most_users: int | None = None
) -> dict[str, Measure]:
    """Return what measures item-item models on a split: rows are those of ranking metrics."""
    found: dict[str, Measure] = {}
    if rows is not None:
        found["ranking"] = lambda model: order_metrics(
            model.scores(rows.user, rows.item), rows.label, rows.weight, rows.user
        )
    if config.train.objective != "ranking":
        top = Retrieval.of(config, split, most_users)
        found["retrieval"] = lambda model: top.item_item_metrics(model, config)
    return found


def _lacks_for_ease(items: int, most: int) -> str:
    """Return why EASE is left out, in one line; empty where it is not."""
    need, free = ease_bytes(items), psutil.virtual_memory().available
    takes = f"fitting takes {need / 1e9:.1f} GB for {items} items"
    if items > most:
        return f"ease: left out, {takes}; --ease-items {items} would allow it"
    if need > free:
        return f"ease: left out, {takes}, {free / 1e9:.1f} GB are free"
    return ""


def _counts(config: Config) -> tuple[int, int]:
    """Return the numbers of users and items."""
    features = config.paths.of("features")
    users, items = (
        read_metadata(features / f"{side}s.parquet").num_rows for side in ("user", "item")
    )
    return users, items
