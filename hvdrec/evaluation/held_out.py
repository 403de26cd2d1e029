"""The rows of a split, on which a model and its baselines are measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hvdrec.config.names import PREFIX
from hvdrec.config.schema import KEY_COLUMNS
from hvdrec.config.sections import Evaluate, SeenItems
from hvdrec.evaluation.item_item import ItemItemModel
from hvdrec.evaluation.ranking_metrics import ranking_metrics
from hvdrec.evaluation.retrieval import (
    rank_catalogue,
    rank_scores,
    retrieval_metrics,
    retrieval_sums,
    user_item_matrix,
)
from hvdrec.parallel import ranks
from hvdrec.storage.artifacts import Manifest
from hvdrec.storage.parquet import parquet_files, read_metadata, read_tables
from hvdrec.storage.urls import Location

Array = NDArray[Any]


@dataclass(frozen=True)
class Interactions:
    """n rows of one or more splits.

    Attributes:
        user: Index of each row's user, int64 [n].
        item: Index of each row's item, int64 [n].
        label: Label of each row, float32 [n].
        weight: Weight of each row, float32 [n].
    """

    user: Array
    item: Array
    label: Array
    weight: Array

    def where(self, mask: Array) -> Interactions:
        """Return the rows for which `mask`, bool [n], is True."""
        return Interactions(self.user[mask], self.item[mask], self.label[mask], self.weight[mask])


@dataclass(frozen=True)
class ScoredRows(Interactions):
    """All n rows of a split with a model's scores, in the order of the shards.

    Every rank has all rows.

    Attributes:
        score: Probability of a positive label, float32 [n].
        task_scores: Probability of each task's label, float32 [n, tasks].
        task_labels: Label for each task, float32 [n, tasks]; NaN if a row has none.
    """

    score: Array
    task_scores: Array
    task_labels: Array

    def metrics(self, score: Array, options: Evaluate) -> dict[str, Any]:
        """Return the ranking metrics of given probabilities for these rows.

        `score` has one probability for each row [n]. All ranks return the same metrics.
        """
        return ranks.run_on_all(
            lambda: ranking_metrics(
                score,
                self.label,
                self.weight,
                self.user,
                threshold=options.threshold,
                beta=options.beta,
            )
        )

    def notes(self, split: str) -> list[str]:
        """Return a line about the ranking metrics that are not defined for these rows."""
        label = self.label[self.weight > 0]
        where = f"row of the {split} split"
        if not len(label):
            return [f"ranking: n/a, no {where} has a weight above 0"]
        for kind, is_missing in (("positive", not label.any()), ("negative", label.all())):
            if is_missing:
                return [f"ranking: auc and gauc are n/a, no {where} is {kind}"]
        return []

    def task_metrics(
        self, scores: Array, tasks: Sequence[str], options: Evaluate
    ) -> dict[str, dict[str, Any]]:
        """Return name of a task -> metrics of its scores, over the rows that have its label.

        `scores` is [n, tasks].
        """

        def measure(task: int) -> dict[str, float]:
            known = ~np.isnan(self.task_labels[:, task])
            return ranking_metrics(
                scores[known, task],
                self.task_labels[known, task],
                self.weight[known],
                self.user[known],
                threshold=options.threshold,
                beta=options.beta,
            )

        return ranks.run_on_all(lambda: {name: measure(i) for i, name in enumerate(tasks)})


@dataclass(frozen=True)
class RetrievalQueries:
    """The users for whom items are retrieved, to measure retrieval on a split.

    These are the users with a relevant item: an item of a positive row in the split that the user
    has not seen before. Each rank has a part of them, u users.

    Attributes:
        users: Index of each user, int64 [u].
        seen: Items to exclude for each user, sparse matrix [u, items].
        relevant: Items to find for each user, sparse matrix [u, items].
        items: Number of items in the catalogue.
        positives: Number of pairs of user and item with a positive row in the split, on all ranks.
        repeats: Number of these pairs that are left out because the user had seen the item before.
    """

    users: Array
    seen: Any
    relevant: Any
    items: int
    positives: int
    repeats: int

    @staticmethod
    def read(
        features: Location, split: str, seen_items: SeenItems, most_users: int | None = None
    ) -> RetrievalQueries:
        """Read the queries of a split.

        If there are more than `most_users`, about every n-th user is taken.
        """
        seen = read_interactions(features, earlier_splits(split))
        if seen_items == "taken":
            seen = seen.where(seen.label > 0)
        held_out = read_interactions(features, [split])
        # Seen items are excluded from retrieval, so they cannot be relevant.
        count = read_metadata(features / "items.parquet").num_rows
        pairs = [rows.user * count + rows.item for rows in (held_out, seen)]
        again = np.isin(*pairs)
        positive = held_out.label > 0
        hit = positive & ~again
        users = np.unique(held_out.user[hit])
        users = users[:: max(1, math.ceil(len(users) / (most_users or math.inf)))]
        world = ranks.current()
        users = users[slice(*part_of(len(users), world.rank, world.size))]
        return RetrievalQueries(
            users,
            _pairs_of(users, seen.user, seen.item, count),
            _pairs_of(users, held_out.user[hit], held_out.item[hit], count),
            count,
            len(np.unique(pairs[0][positive])),
            len(np.unique(pairs[0][positive & again])),
        )

    def notes(self, split: str, seen_items: SeenItems) -> list[str]:
        """Return a line if some positive rows do not count, or with the reason if none count."""
        if not self.positives:
            return [f"retrieval: n/a, no row of the {split} split is positive"]
        if not self.repeats:
            return []
        before = " and ".join(earlier_splits(split))
        had = "had taken" if seen_items == "taken" else "were shown"
        text = f"{self.repeats} of {self.positives} positive pairs of the {split} split"
        if self.repeats < self.positives:
            return [f"retrieval: {text} are items that users {had} in {before}; they do not count"]
        remedy = "; --evaluate.seen taken leaves out positives only"
        return [
            f"retrieval: n/a, all {text} are items that users {had} in {before}"
            + (remedy if seen_items == "shown" else "")
        ]

    def metrics(self, users: Array, items: Array, ks: Sequence[int]) -> dict[str, Any]:
        """Return the retrieval metrics of embeddings over the queries of all ranks.

        `users` and `items` are the embeddings of all users and items [n, width].
        """
        vectors = users[self.users]
        top = ranks.run_on_all(lambda: rank_catalogue(vectors, items, self.seen, max(ks)))
        return self._metrics_of(top, ks)

    def item_item_metrics(self, model: ItemItemModel, ks: Sequence[int]) -> dict[str, Any]:
        """Return the retrieval metrics of an item-item model over the queries of all ranks."""
        score_items = model.score_items(self.users)
        top = rank_scores(score_items, len(self.users), self.items, self.seen, max(ks))
        return self._metrics_of(top, ks)

    def _metrics_of(self, top: Array, ks: Sequence[int]) -> dict[str, Any]:
        sums = retrieval_sums(top, self.relevant, ks, self.items)
        return retrieval_metrics(ranks.sum_arrays(sums), ks)


def earlier_splits(split: str) -> tuple[str, ...]:
    """Return the splits before validation or test. Their items count as seen."""
    return ("train",) if split == "validation" else ("train", "validation")


def user_state(manifest: Manifest, split: str) -> str:
    """Return the state, of `samples.split.STATES`, of the users with which a split is evaluated.

    Features that an earlier version wrote have users only as of the end of training.
    """
    return str(manifest.meta.get("user_states", {}).get(split, "train"))


def read_interactions(features: Location, splits: Sequence[str]) -> Interactions:
    """Read the user and item indices, labels and weights of all rows of some splits."""
    shard = read_metadata(parquet_files(features / splits[0])[0])
    names = shard.schema.to_arrow_schema().names
    # A column has the prefixed name only if a feature has the plain name.
    columns = [PREFIX + name if PREFIX + name in names else name for name in KEY_COLUMNS]
    table = pa.concat_tables([read_tables(features / split, columns) for split in splits])
    return Interactions(*(table[name].to_numpy() for name in columns))


def part_of(rows: int, rank: int, size: int) -> tuple[int, int]:
    """Return the number of the first row of a rank's part, and the number after its last row."""
    return rows * rank // size, rows * (rank + 1) // size


def _pairs_of(users: Array, user: Array, item: Array, items: int) -> Any:
    """Return a sparse matrix [u, items] with 1 for each pair of user and item.

    Only the u users in `users`, which is sorted, get a row.
    """
    position = np.searchsorted(users, user)
    position[position == len(users)] = 0
    mask = users[position] == user if len(users) else np.zeros(len(user), dtype=bool)
    return user_item_matrix(position[mask], item[mask], len(users), items)
