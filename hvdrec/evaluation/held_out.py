"""A split's rows, and the protocols by which a model and its baselines are measured on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hvdrec.config import Config
from hvdrec.evaluation.item_item import ItemItem
from hvdrec.evaluation.ranking import ranking_metrics
from hvdrec.evaluation.retrieval import (
    Csr,
    csr,
    rank_catalogue,
    rank_scores,
    retrieval_metrics,
    retrieval_sums,
)
from hvdrec.parallel import ranks
from hvdrec.storage.urls import Location, read_metadata, read_tables

Array = NDArray[Any]


@dataclass(frozen=True)
class Scores:
    """A split's rows with their scores, in the order of the shards, whole on every rank.

    score: float32 [n] probabilities; label, weight: float32 [n]; user, item: int64 [n] indices;
    task_scores, task_labels: float32 [n, T], labels are NaN where a row tells nothing of a task.
    """

    score: Array
    label: Array
    weight: Array
    user: Array
    item: Array
    task_scores: Array
    task_labels: Array


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


def read_interactions(features: Location, splits: list[str]) -> Interactions:
    """Read the key columns of splits."""
    columns = ["user_index", "item_index", "label", "weight"]
    table = pa.concat_tables([read_tables(features / split, columns) for split in splits])
    return Interactions(*(table[name].to_numpy() for name in columns))


def part_of(rows: int, rank: int, size: int) -> tuple[int, int]:
    """Return the first of a rank's rows and the one after its last."""
    return rows * rank // size, rows * (rank + 1) // size


def ranking_report(score: Array, scores: Scores, config: Config) -> dict[str, Any]:
    """Return the ranking metrics of any probabilities [n] for a split's rows, on every rank."""
    return ranks.run_on_all(
        lambda: ranking_metrics(
            score,
            scores.label,
            scores.weight,
            scores.user,
            threshold=config.evaluate.threshold,
            beta=config.evaluate.beta,
        )
    )


@dataclass(frozen=True)
class Retrieval:
    """The users to retrieve for: this rank's part of those with something relevant in a split.

    users: int64 [u]; seen: what is left out; relevant: what is to be found; items: in all.
    """

    users: Array
    seen: Csr
    relevant: Csr
    items: int

    @staticmethod
    def of(config: Config, split: str, most: int | None = None) -> Retrieval:
        """Return the users of a split; of more than `most`, evenly spaced ones."""
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
        everyone = everyone[:: max(1, math.ceil(len(everyone) / (most or math.inf)))]
        start, stop = part_of(len(everyone), world.rank, world.size)
        users = everyone[start:stop]
        return Retrieval(
            users,
            _csr_of(users, seen.user, seen.item),
            _csr_of(users, held_out.user[hit], held_out.item[hit]),
            count,
        )

    def metrics(self, user_vectors: Array, item_vectors: Array, config: Config) -> dict[str, Any]:
        """Return the retrieval metrics of vectors over all ranks' users."""
        k = max(config.evaluate.k)
        vectors = user_vectors[self.users]
        top = ranks.run_on_all(lambda: rank_catalogue(vectors, item_vectors, self.seen, k))
        return self._metrics_of(top, config)

    def item_item_metrics(self, model: ItemItem, config: Config) -> dict[str, Any]:
        """Return the retrieval metrics of an item-item model over all ranks' users."""
        scores, k = model.scores_of(self.users), max(config.evaluate.k)
        top = rank_scores(scores, len(self.users), self.items, self.seen, k)
        return self._metrics_of(top, config)

    def _metrics_of(self, top: Array, config: Config) -> dict[str, Any]:
        ks = config.evaluate.k
        sums = retrieval_sums(top, self.relevant, ks, self.items)
        return retrieval_metrics(sums.reduced(ranks.sum_arrays), ks)


def _csr_of(users: Array, rows: Array, columns: Array) -> Csr:
    """Return the items of the chosen users, which are sorted, as one row each."""
    position = np.searchsorted(users, rows)
    position[position == len(users)] = 0
    chosen = users[position] == rows if len(users) else np.zeros(len(rows), dtype=bool)
    return csr(position[chosen], columns[chosen], len(users))
