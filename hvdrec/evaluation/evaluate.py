"""Evaluation of a model on a split, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdrec.config import Config
from hvdrec.data.collate import table_arrays
from hvdrec.data.loader import ShardLoader
from hvdrec.evaluation.compare import compare
from hvdrec.evaluation.held_out import RetrievalQueries, ScoredRows, part_of
from hvdrec.evaluation.item_item import LARGEST_CATALOGUE
from hvdrec.features.sample_checks import check_task_labels
from hvdrec.models.embedding import BatchRows
from hvdrec.models.recommender import Recommender
from hvdrec.parallel import ranks
from hvdrec.storage.artifacts import read_manifest
from hvdrec.storage.urls import read_table

Array = NDArray[Any]
FetchRows = Callable[[Mapping[str, Tensor]], BatchRows]
"""Looks up the table rows of a batch, for a model that does not hold its tables."""
BLOCK = 8192
"""Users or items embedded at a time."""


def evaluate_model(
    model: Recommender,
    config: Config,
    split: str = "test",
    *,
    with_baselines: bool = True,
    ease_items: int = LARGEST_CATALOGUE,
    fetch_rows: FetchRows | None = None,
) -> dict[str, Any]:
    """Measure a model on a split, beside its baselines; every rank gets the same report.

    Args:
        model: The model.
        config: Its run.
        split: The split to measure on.
        with_baselines: Measure the baselines on the same rows and users.
        ease_items: Largest catalogue for which EASE is fitted, in items.
        fetch_rows: Looks up table rows; None if the model holds its tables.

    Returns:
        The fields of `EvaluationResult` from ``split`` on; those that do not apply are absent.
    """
    features = config.paths.of("features")
    manifest = ranks.run_on_all(lambda: read_manifest(features, "features"))
    ranks.run_on_all(lambda: check_task_labels(features, manifest, config.tasks, "hvdrec prepare"))
    model.eval()
    report: dict[str, Any] = {"split": split}
    rows: ScoredRows | None = None
    if config.train.objective != "retrieval":
        rows, metrics, tasks = _ranking(model, config, split, fetch_rows)
        report |= {"ranking": metrics} | ({"tasks": tasks} if tasks else {})
    queries: RetrievalQueries | None = None
    if config.train.objective != "ranking":
        queries, report["retrieval"] = _retrieval(model, config, split, fetch_rows)
    if with_baselines:
        report |= compare(config, split, rows, queries, ease_items)
    return report


def validation_metric(
    model: Recommender, config: Config, name: str, fetch_rows: FetchRows | None = None
) -> tuple[float, dict[str, Any]]:
    """Return the named metric on the validation split, and all metrics computed with it."""
    if "@" in name:
        _, metrics = _retrieval(model, config, "validation", fetch_rows)
    else:
        _, metrics, tasks = _ranking(model, config, "validation", fetch_rows)
        if tasks:
            metrics |= {"tasks": tasks, "task_auc": task_auc(tasks, config)}
    return float(metrics[name]), metrics


def task_auc(tasks: Mapping[str, Any], config: Config) -> float:
    """Return the mean of the tasks' AUCs, weighted by share; NaN if none is defined."""
    pairs = [(tasks[task.name]["auc"], task.share) for task in config.tasks]
    defined = [(auc, share) for auc, share in pairs if not math.isnan(auc)]
    total = sum(share for _, share in defined)
    return sum(auc * share for auc, share in defined) / total if total else math.nan


def score_split(
    model: Recommender, config: Config, split: str, fetch_rows: FetchRows | None = None
) -> ScoredRows:
    """Score every row of a split; each rank scores its part, then all gather all rows."""
    world, device = ranks.current(), next(model.parameters()).device
    loader = ShardLoader.from_config(
        config, split, config.evaluate.batch_size, world.rank, world.size, shuffle=False
    )
    parts: list[tuple[Array, ...]] = []
    with torch.inference_mode():
        for host_batch in loader.epoch(0):
            batch = host_batch.to(device)
            rows = fetch_rows(host_batch.features) if fetch_rows is not None else None
            logit = model(batch.features, rows).logit.float()
            columns = [batch.user_index, batch.item_index, batch.label, batch.weight]
            columns.append(model.score(logit))
            if batch.tasks is not None:
                columns += [logit.sigmoid(), batch.tasks]
            parts.append(tuple(column[: batch.rows].cpu().numpy() for column in columns))
    gathered = [ranks.gather_arrays(np.concatenate(column)) for column in zip(*parts, strict=True)]
    if not config.tasks:
        gathered += [np.empty((len(gathered[0]), 0), np.float32)] * 2
    return ScoredRows(*gathered)


def embed_side(
    model: Recommender,
    config: Config,
    side: Literal["user", "item"],
    fetch_rows: FetchRows | None = None,
) -> Array:
    """Return the tower embeddings of all users (items), float32 [n, D]; ranks share the work."""
    world, device = ranks.current(), next(model.parameters()).device
    table = read_table(config.paths.of("features") / f"{side}s.parquet")
    start, stop = part_of(table.num_rows, world.rank, world.size)
    features = config.schema.side(side)
    represent = model.represent_users if side == "user" else model.represent_items
    blocks: list[Array] = [np.empty((0, model.output_width), np.float32)]
    # All ranks run the same number of steps, because a lookup may be a collective.
    steps = math.ceil(math.ceil(table.num_rows / world.size) / BLOCK)
    with torch.inference_mode():
        for step in range(steps):
            first = min(start + step * BLOCK, stop)
            arrays = table_arrays(table.slice(first, min(BLOCK, stop - first)), features)
            codes = {name: torch.from_numpy(array) for name, array in arrays.items()}
            rows = fetch_rows(codes) if fetch_rows is not None else None
            codes = {name: code.to(device) for name, code in codes.items()}
            vectors = represent(codes, rows)[:, : model.output_width]
            blocks.append(vectors.float().cpu().numpy())
    return ranks.gather_arrays(np.concatenate(blocks))


def _ranking(
    model: Recommender, config: Config, split: str, fetch_rows: FetchRows | None
) -> tuple[ScoredRows, dict[str, Any], dict[str, Any]]:
    """Return the scored rows of a split, their metrics and those of each task."""
    rows = score_split(model, config, split, fetch_rows)
    names = [task.name for task in config.tasks]
    metrics = rows.metrics(rows.score, config.evaluate)
    tasks = rows.task_metrics(rows.task_scores, names, config.evaluate) if names else {}
    return rows, metrics, tasks


def _retrieval(
    model: Recommender, config: Config, split: str, fetch_rows: FetchRows | None
) -> tuple[RetrievalQueries, dict[str, Any]]:
    """Return the queries of a split and the model's metrics on them."""
    queries = RetrievalQueries.read(config.paths.of("features"), split, config.samples)
    users = embed_side(model, config, "user", fetch_rows)
    items = embed_side(model, config, "item", fetch_rows)
    return queries, queries.metrics(users, items, config.evaluate.k)
