"""Fit baselines on the training rows; measure them on the same rows as the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from hvdrec.config import Config
from hvdrec.evaluation.baselines import Baselines, fit_baselines
from hvdrec.evaluation.events import Events, RankedEvents, read_events
from hvdrec.evaluation.held_out import (
    Interactions,
    RetrievalQueries,
    ScoredRows,
    read_interactions,
    user_state,
)
from hvdrec.evaluation.item_item import (
    Family,
    Measure,
    choose,
    cooccurrence,
    ease,
    ease_bytes,
)
from hvdrec.evaluation.ranking_metrics import order_metrics
from hvdrec.evaluation.retrieval import user_item_matrix
from hvdrec.parallel import ranks
from hvdrec.samples.split import SPLITS, STATES
from hvdrec.storage.artifacts import read_manifest
from hvdrec.storage.parquet import read_metadata, read_tables

Array = NDArray[Any]
CHOICE_USERS, CHOICE_ROWS, CHOICE_EVENTS = 10_000, 500_000, 2_000
"""Largest numbers of validation users, rows and events that are used to choose a baseline's
setting."""
RECENT_DAYS = (1, 3, 7, 30, 90)
"""Numbers of days that are tried for recent popularity."""


def compare(
    config: Config,
    split: str,
    rows: ScoredRows | None,
    queries: RetrievalQueries | None,
    ease_items: int,
    events: RankedEvents | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Fit the baselines on the training rows and measure them; all ranks return the same report.

    Item-item models score items by the items that a user took before. As in the model's history of
    the user, these are the items of training rows, or of training and validation rows; see
    `held_out.user_state`.

    Args:
        config: Configuration of the run.
        split: The split to measure on.
        rows: Rows of the split, for ranking metrics; None to leave these metrics out.
        queries: Queries of the split, for retrieval metrics; None to leave these metrics out.
        ease_items: Largest number of items for which EASE is fitted.
        events: Events of the split, for metrics by event; the first rank adds the ranks of the
            baselines. None to leave these metrics out.

    Returns:
        Name of each baseline -> its metrics; and lines of text about the baselines.
    """
    train = read_interactions(config.paths.of("features"), ["train"])
    # Only one rank fits the item-item models, since each needs a matrix [items, items].
    others, notes = ranks.broadcast_object(
        ranks.run_on_all(
            lambda: (
                _first_rank_baselines(config, split, train, rows, ease_items, events)
                if ranks.current().is_first
                else None
            )
        )
    )
    reports = _mean_baselines(config, train, rows, queries)
    for name, report in others.items():
        reports[name] = reports.get(name, {}) | report
    return reports, notes


def _mean_baselines(
    config: Config,
    train: Interactions,
    rows: ScoredRows | None,
    queries: RetrievalQueries | None,
) -> dict[str, Any]:
    """Return the metrics of the baselines popularity and means."""
    fitted = _fit(config, train)
    reports: dict[str, dict[str, Any]] = {}
    if rows is not None:
        for name, score in fitted.scores(rows.user, rows.item).items():
            reports.setdefault(name, {})["ranking"] = rows.metrics(score, config.evaluate)
    if queries is not None:
        everyone = np.ones((len(fitted.user_mean), 1))
        for name, vectors in fitted.item_vectors().items():
            metrics = queries.metrics(everyone, vectors, config.evaluate.k)
            reports.setdefault(name, {})["retrieval"] = metrics
    if rows is not None and config.tasks:
        for name, report in _task_baselines(config, train, rows).items():
            reports[name]["tasks"] = report
    return reports


def _task_baselines(config: Config, train: Interactions, rows: ScoredRows) -> dict[str, Any]:
    """Return the metrics of popularity and means for each task, fitted on the task's label."""
    table = read_tables(config.paths.of("features") / "train", list(config.task_columns))
    by_name: dict[str, list[Any]] = {}
    for column in config.task_columns:
        label = table[column].to_numpy()
        known = train.where(~np.isnan(label))
        labelled = Interactions(known.user, known.item, label[~np.isnan(label)], known.weight)
        for name, score in _fit(config, labelled).scores(rows.user, rows.item).items():
            by_name.setdefault(name, []).append(score)
    tasks = [task.name for task in config.tasks]
    return {
        name: rows.task_metrics(np.stack(columns, axis=1), tasks, config.evaluate)
        for name, columns in by_name.items()
    }


def _first_rank_baselines(
    config: Config,
    split: str,
    train: Interactions,
    rows: ScoredRows | None,
    ease_items: int,
    events: RankedEvents | None,
) -> tuple[dict[str, Any], list[str]]:
    """Return the metrics of popularity by event, co-occurrence and EASE, and lines about them.

    Settings are chosen on the validation split, separately for ranking, retrieval and events.
    """
    items = _counts(config)[1]
    taken = _taken(config, train)
    validation: Interactions | None = None
    if rows is not None:
        validation = read_interactions(config.paths.of("features"), ["validation"])
        step = math.ceil(len(validation.user) / CHOICE_ROWS)
        validation = validation.where(np.arange(len(validation.user)) % max(step, 1) == 0)
    obstacle = _ease_obstacle(items, ease_items)
    notes = [obstacle] if obstacle else []
    reports: dict[str, Any] = {}
    with ranks.single_rank():
        tried: Events | None = None
        if events is not None:
            most = min(CHOICE_EVENTS, config.evaluate.events)
            tried = read_events(config, "validation", most)
            reports, note = _popularity_by_event(config, train, tried, events)
            notes += note
        to_choose = _measures(config, "validation", validation, most_users=CHOICE_USERS)
        to_report = _measures(config, split, rows)
        if tried is not None and events is not None:
            to_choose["events"] = lambda model: tried.report(tried.item_item_ranks(model), config)
        for make in (cooccurrence,) if obstacle else (cooccurrence, ease):
            family = make(taken)
            reports[family.name], line = _chosen_report(
                config, family, to_choose, to_report, events
            )
            notes.append(line)
    names = " and ".join(name for name in ("cooccurrence", "ease") if name in reports)
    if split == "validation":
        notes.append(f"{names}: settings were chosen on the rows that are measured here")
    if rows is not None:
        notes.append(f"{names}: scores are not probabilities; metrics that need them are n/a")
    return reports, notes


def _chosen_report(
    config: Config,
    family: Family,
    to_choose: Mapping[str, Measure],
    to_report: Mapping[str, Measure],
    events: RankedEvents | None,
) -> tuple[dict[str, Any], str]:
    """Choose the setting of a family of models; return its metrics and a line about the choice."""
    by = {group: name for group, name in _choice_metrics(config).items() if group in to_choose}
    chosen = choose(family, by, to_choose)
    report: dict[str, Any] = {"chosen": chosen}
    for value in sorted({choice[family.setting] for choice in chosen.values()}):
        model = family.fit(value)
        for group, choice in chosen.items():
            if choice[family.setting] != value:
                continue
            if group == "events" and events is not None:
                rank = events.events.item_item_ranks(model)
                report[group] = events.add(family.name, rank, config)
            else:
                report[group] = to_report[group](model)
    choices = [
        f"{choice[family.setting]:g} for {group} (validation {by[group]} {choice[by[group]]:.4f})"
        for group, choice in chosen.items()
    ]
    return report, f"{family.name}: {family.setting} = {', '.join(choices)}"


def _choice_metrics(config: Config) -> dict[str, str]:
    """Return ``ranking``, ``retrieval`` and ``events`` -> the metric by which a setting is chosen.

    For ranking and retrieval, this is the metric of early stopping if it is GAUC or NDCG, else AUC
    and recall.
    """
    name, objective = config.train.metric, config.train.objective
    by: dict[str, str] = {}
    if objective != "retrieval":
        by["ranking"] = "gauc" if name == "gauc" else "auc"
    if objective != "ranking":
        by["retrieval"] = f"{'ndcg' if name == 'ndcg' else 'recall'}@{config.evaluate.k[0]}"
        by["events"] = f"ndcg@{config.evaluate.k[0]}"
    return by


def _measures(
    config: Config,
    split: str,
    rows: Interactions | None,
    most_users: int | None = None,
) -> dict[str, Measure]:
    """Return ``ranking`` and ``retrieval`` -> a function that measures a model."""
    measures: dict[str, Measure] = {}
    features = config.paths.of("features")
    state = user_state(read_manifest(features, "features"), split)
    known = read_interactions(features, SPLITS[: STATES.index(state) + 1])
    taken = _taken(config, known)
    if rows is not None:
        measures["ranking"] = lambda model: order_metrics(
            replace(model, taken=taken).scores(rows.user, rows.item),
            rows.label,
            rows.weight,
            rows.user,
        )
    if config.train.objective != "ranking":
        queries = RetrievalQueries.read(features, split, config.evaluate.seen, most_users)
        measures["retrieval"] = lambda model: queries.item_item_metrics(
            replace(model, taken=taken), config.evaluate.k
        )
    return measures


def _popularity_by_event(
    config: Config, train: Interactions, to_choose: Events, to_report: RankedEvents
) -> tuple[dict[str, Any], list[str]]:
    """Return the metrics by event of popularity and of recent popularity, and lines about them.

    The number of days of recent popularity is chosen on validation events.
    """
    popularity = _fit(config, train).popularity
    events = to_report.events
    report = to_report.add("popularity", events.popularity_ranks(popularity), config)
    reports: dict[str, Any] = {"popularity": {"events": report}}
    if events.day is None:
        return reports, ["recent_popularity: left out, the samples have no times in days"]
    name = _choice_metrics(config)["events"]
    measured = {
        days: to_choose.report(to_choose.recent_ranks(days), config)[name] for days in RECENT_DAYS
    }
    days = max(measured, key=lambda each: measured[each])
    chosen = {"events": {"days": days, name: measured[days]}}
    reports["recent_popularity"] = {
        "chosen": chosen,
        "events": to_report.add("recent_popularity", events.recent_ranks(days), config),
    }
    note = f"recent_popularity: days = {days} for events (validation {name} {measured[days]:.4f})"
    return reports, [note]


def _taken(config: Config, rows: Interactions) -> Any:
    """Return a sparse matrix [users, items] with 1 for each item that a user took.

    Rows with weight 0 are ignored.
    """
    positive = rows.where((rows.label > 0) & (rows.weight > 0))
    return user_item_matrix(positive.user, positive.item, *_counts(config))


def _ease_obstacle(items: int, most: int) -> str:
    """Return a line that says why EASE is left out; "" if it is not left out."""
    need, free = ease_bytes(items), psutil.virtual_memory().available
    text = f"ease: left out, fitting takes {need / 1e9:.1f} GB for {items} items"
    if items > most:
        return f"{text}; --ease-items {items} includes it"
    return f"{text}, {free / 1e9:.1f} GB are free" if need > free else ""


def _fit(config: Config, train: Interactions) -> Baselines:
    return fit_baselines(train.user, train.item, train.label, train.weight, *_counts(config))


def _counts(config: Config) -> tuple[int, int]:
    """Return the numbers of users and items."""
    features = config.paths.of("features")
    users, items = (
        read_metadata(features / f"{side}s.parquet").num_rows for side in ("user", "item")
    )
    return users, items
