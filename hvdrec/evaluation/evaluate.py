"""Evaluation of a model on a split, over all ranks, beside its baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdrec.config import Config
from hvdrec.data.collate import table_arrays
from hvdrec.data.loader import ShardLoader
from hvdrec.evaluation.compare import compare
from hvdrec.evaluation.held_out import Retrieval, Scores, part_of, ranking_report
from hvdrec.evaluation.item_item import LARGEST_CATALOGUE
from hvdrec.evaluation.tasks import task_auc, task_report
from hvdrec.features.fit import check_task_labels
from hvdrec.models.embedding import Rows
from hvdrec.models.recommender import Recommender
from hvdrec.parallel import ranks
from hvdrec.storage.artifacts import read_manifest
from hvdrec.storage.urls import read_table

Array = NDArray[Any]
RowsOf = Callable[[Mapping[str, Tensor]], Rows]
BLOCK = 8192


def evaluate_model(
    model: Recommender,
    config: Config,
    split: str = "test",
    *,
    with_baselines: bool = True,
    ease_items: int = LARGEST_CATALOGUE,
    rows_of: RowsOf | None = None,
) -> dict[str, Any]:
    """Return the report of a model on a split: metrics, and the same ones of each baseline.

    Ranking metrics where the model has a ranker, and under ``tasks`` those of each task; retrieval
    metrics over the whole catalogue where its towers were trained to retrieve. Every rank calls
    this and gets the same report. rows_of gives the table rows of a batch, where the model does not
    hold its tables itself; ease_items is the largest catalogue for which EASE is fitted. ``notes``
    tells what people should know of the baselines.
    """
    device = next(model.parameters()).device
    features = config.paths.of("features")
    manifest = ranks.run_on_all(lambda: read_manifest(features, "features"))
    ranks.run_on_all(lambda: check_task_labels(features, manifest, config, "hvdrec prepare"))
    model.eval()
    scores: Scores | None = None
    report: dict[str, Any] = {"split": split}
    if config.train.objective != "retrieval":
        scores = score_split(model, config, split, device, rows_of)
        report["ranking"] = ranking_report(scores.score, scores, config)
        if config.tasks:
            report["tasks"] = task_report(scores.task_scores, scores, config)
    top: Retrieval | None = None
    if config.train.objective != "ranking":
        top = Retrieval.of(config, split)
        users, items = (
            embed_side(model, config, "user", device, rows_of),
            embed_side(model, config, "item", device, rows_of),
        )
        report["retrieval"] = top.metrics(users, items, config)
    if with_baselines:
        report |= compare(config, split, scores, top, ease_items)
    return report


def validation_metric(
    model: Recommender,
    config: Config,
    name: str,
    device: torch.device,
    rows_of: RowsOf | None = None,
) -> tuple[float, dict[str, Any]]:
    """Return the named metric on the validation split, and all those that were computed with it."""
    if "@" in name:
        users, items = (
            embed_side(model, config, "user", device, rows_of),
            embed_side(model, config, "item", device, rows_of),
        )
        metrics = Retrieval.of(config, "validation").metrics(users, items, config)
    else:
        scores = score_split(model, config, "validation", device, rows_of)
        metrics = ranking_report(scores.score, scores, config)
        if config.tasks:
            metrics["tasks"] = task_report(scores.task_scores, scores, config)
            metrics["task_auc"] = task_auc(metrics["tasks"], config)
    return float(metrics[name]), metrics


def score_split(
    model: Recommender,
    config: Config,
    split: str,
    device: torch.device,
    rows_of: RowsOf | None = None,
) -> Scores:
    """Score every row of a split; each rank scores its part and gets everybody's."""
    world = ranks.current()
    loader = ShardLoader.from_config(
        config, split, config.evaluate.batch_size, world.rank, world.size, shuffle=False
    )
    parts: list[tuple[Array, ...]] = []
    with torch.inference_mode():
        for host_batch in loader.epoch(0):
            batch = host_batch.to(device)
            rows = rows_of(host_batch.features) if rows_of is not None else None
            logit = model(batch.features, rows).logit.float()
            columns = [
                model.score(logit),
                batch.label,
                batch.weight,
                batch.user_index,
                batch.item_index,
            ]
            if batch.tasks is not None:
                columns += [logit.sigmoid(), batch.tasks]
            parts.append(tuple(column[: batch.rows].cpu().numpy() for column in columns))
    gathered = [ranks.gather_arrays(np.concatenate(column)) for column in zip(*parts, strict=True)]
    if not config.tasks:
        gathered += [np.empty((len(gathered[0]), 0), np.float32)] * 2
    return Scores(*gathered)


def embed_side(
    model: Recommender,
    config: Config,
    side: str,
    device: torch.device,
    rows_of: RowsOf | None = None,
) -> Array:
    """Return tower embeddings float32 [n, D] of all users (items); ranks share the work."""
    world = ranks.current()
    table = read_table(config.paths.of("features") / f"{side}s.parquet")
    start, stop = part_of(table.num_rows, world.rank, world.size)
    features = config.schema.side("user" if side == "user" else "item")
    represent = model.represent_users if side == "user" else model.represent_items
    found: list[Array] = [np.empty((0, model.output_width), np.float32)]
    # All ranks take as many turns: some may look up rows that others hold.
    turns = math.ceil(math.ceil(table.num_rows / world.size) / BLOCK)
    with torch.inference_mode():
        for turn in range(turns):
            first = min(start + turn * BLOCK, stop)
            arrays = table_arrays(table.slice(first, min(BLOCK, stop - first)), features)
            codes = {name: torch.from_numpy(array) for name, array in arrays.items()}
            rows = rows_of(codes) if rows_of is not None else None
            codes = {name: code.to(device) for name, code in codes.items()}
            found.append(represent(codes, rows)[:, : model.output_width].float().cpu().numpy())
    return ranks.gather_arrays(np.concatenate(found))
