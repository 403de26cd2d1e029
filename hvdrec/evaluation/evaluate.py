"""Evaluation of a model on a split, over all ranks, beside its baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdrec.artifacts import read_manifest
from hvdrec.config import Config
from hvdrec.evaluation.baselines import fit_baselines
from hvdrec.evaluation.ranking import ranking_metrics
from hvdrec.evaluation.retrieval import (
    Csr,
    csr,
    rank_catalogue,
    retrieval_metrics,
    retrieval_sums,
)
from hvdrec.loader import ShardLoader, table_arrays
from hvdrec.models.recommender import Recommender
from hvdrec.models.tables import Rows
from hvdrec.parallel import ranks
from hvdrec.storage import Place, read_metadata, read_table, read_tables

Array = NDArray[Any]
RowsOf = Callable[[Mapping[str, Tensor]], Rows]
BLOCK = 8192


@dataclass(frozen=True)
class Scores:
    """A split's rows with their scores, in the order of the shards, whole on every rank.

    score: float32 [n] probabilities; label, weight: float32 [n]; user, item: int64 [n] indices.
    """

    score: Array
    label: Array
    weight: Array
    user: Array
    item: Array


@dataclass(frozen=True)
class Interactions:
    """Rows of one or more splits: indices int64 [n], labels and weights float32 [n]."""

    user: Array
    item: Array
    label: Array
    weight: Array

    def where(self, chosen: Array) -> Interactions:
        """Return the rows that a mask bool [n] chooses."""
        return Interactions(
            self.user[chosen], self.item[chosen], self.label[chosen], self.weight[chosen]
        )

    def pairs(self, items: int) -> Array:
        """Return one int64 per row for its user and item, of `items` in all."""
        return np.asarray(self.user * items + self.item)


def evaluate(
    model: Recommender,
    config: Config,
    split: str = "test",
    *,
    with_baselines: bool = True,
    rows_of: RowsOf | None = None,
) -> dict[str, Any]:
    """Return the report of a model on a split: metrics, and the same ones of each baseline.

    Ranking metrics where the model has a ranker, retrieval metrics over the whole catalogue where
    its towers were trained to retrieve. Every rank calls this and gets the same report. rows_of
    gives the table rows of a batch, where the model does not hold its tables itself.
    """
    device = next(model.parameters()).device
    features = config.paths.of("features")
    ranks.together(lambda: read_manifest(features, "features"))
    model.eval()
    scores: Scores | None = None
    report: dict[str, Any] = {"split": split}
    if config.train.objective != "retrieval":
        scores = score_split(model, config, split, device, rows_of)
        report["ranking"] = _ranking(scores.score, scores, config)
    top: _Retrieval | None = None
    if config.train.objective != "ranking":
        top = _Retrieval.of(config, split)
        users, items = (
            embed_side(model, config, "user", device, rows_of),
            embed_side(model, config, "item", device, rows_of),
        )
        report["retrieval"] = top.metrics(users, items, config)
    if with_baselines:
        report["baselines"] = _baselines(config, scores, top)
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
        metrics = _Retrieval.of(config, "validation").metrics(users, items, config)
    else:
        scores = score_split(model, config, "validation", device, rows_of)
        metrics = _ranking(scores.score, scores, config)
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
    loader = ShardLoader(
        config.paths.of("features") / split,
        config.schema,
        batch_size=config.evaluate.batch_size,
        rank=world.rank,
        world_size=world.size,
        shuffle=False,
        window_rows=config.evaluate.batch_size,
        workers=config.loader.workers,
        prefetch=config.loader.prefetch,
        pin_memory=device.type == "cuda",
        cache_dir=config.loader.cache_dir,
        cache_gb=config.loader.cache_gb,
    )
    parts: list[tuple[Array, ...]] = []
    with torch.inference_mode():
        for host_batch in loader.epoch(0):
            batch = host_batch.to(device)
            rows = rows_of(host_batch.features) if rows_of is not None else None
            logit = model(batch.features, rows).logit.float()
            columns = (
                logit.sigmoid(),
                batch.label,
                batch.weight,
                batch.user_index,
                batch.item_index,
            )
            parts.append(tuple(column[: batch.rows].cpu().numpy() for column in columns))
    return Scores(
        *(ranks.gather_arrays(np.concatenate(column)) for column in zip(*parts, strict=True))
    )


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
    start, stop = _part(table.num_rows, world.rank, world.size)
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


def read_interactions(features: Place, splits: list[str]) -> Interactions:
    """Read the key columns of splits."""
    columns = ["user_index", "item_index", "label", "weight"]
    table = pa.concat_tables([read_tables(features / split, columns) for split in splits])
    return Interactions(*(table[name].to_numpy() for name in columns))


def _part(rows: int, rank: int, size: int) -> tuple[int, int]:
    return rows * rank // size, rows * (rank + 1) // size


def _ranking(score: Array, scores: Scores, config: Config) -> dict[str, Any]:
    return ranking_metrics(
        score,
        scores.label,
        scores.weight,
        scores.user,
        threshold=config.evaluate.threshold,
        beta=config.evaluate.beta,
    )


@dataclass(frozen=True)
class _Retrieval:
    """The users to retrieve for: this rank's part of those with something relevant in a split."""

    users: Array
    seen: Csr
    relevant: Csr

    @staticmethod
    def of(config: Config, split: str) -> _Retrieval:
        features, world = config.paths.of("features"), ranks.current()
        earlier = ["train"] if split == "validation" else ["train", "validation"]
        seen = read_interactions(features, earlier)
        if config.samples.negatives.per_positive:
            # Drawn negatives were never shown: only what the user took is seen.
            seen = seen.where(seen.label > 0)
        held_out = read_interactions(features, [split])
        # What is excluded cannot be found: an item taken again is no target.
        count = read_metadata(features / "items.parquet").num_rows
        again = np.isin(held_out.pairs(count), seen.pairs(count))
        hit = (held_out.label > 0) & ~again
        everyone = np.unique(held_out.user[hit])
        start, stop = _part(len(everyone), world.rank, world.size)
        users = everyone[start:stop]
        return _Retrieval(
            users,
            _csr_of(users, seen.user, seen.item),
            _csr_of(users, held_out.user[hit], held_out.item[hit]),
        )

    def metrics(self, user_vectors: Array, item_vectors: Array, config: Config) -> dict[str, Any]:
        """Return the retrieval metrics over all ranks' users."""
        ks = config.evaluate.k
        top = rank_catalogue(user_vectors[self.users], item_vectors, self.seen, max(ks))
        sums = retrieval_sums(top, self.relevant, ks, len(item_vectors))
        return retrieval_metrics(sums.reduced(ranks.sum_arrays), ks)


def _csr_of(users: Array, rows: Array, columns: Array) -> Csr:
    """Return the items of the chosen users, which are sorted, as one row each."""
    position = np.searchsorted(users, rows)
    position[position == len(users)] = 0
    chosen = users[position] == rows if len(users) else np.zeros(len(rows), dtype=bool)
    return csr(position[chosen], columns[chosen], len(users))


def _baselines(config: Config, scores: Scores | None, top: _Retrieval | None) -> Mapping[str, Any]:
    """Return the report of every baseline, from the training rows alone."""
    features = config.paths.of("features")
    users, items = (
        read_metadata(features / f"{side}s.parquet").num_rows for side in ("user", "item")
    )
    train = read_interactions(features, ["train"])
    fitted = fit_baselines(train.user, train.item, train.label, train.weight, users, items)
    found: dict[str, dict[str, Any]] = {}
    if scores is not None:
        for name, score in fitted.scores(scores.user, scores.item).items():
            found.setdefault(name, {})["ranking"] = _ranking(score, scores, config)
    if top is not None:
        for name, vectors in fitted.item_vectors().items():
            everyone = np.ones((users, 1))
            found.setdefault(name, {})["retrieval"] = top.metrics(everyone, vectors, config)
    return found
