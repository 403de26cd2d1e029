"""Evaluation protocols against plain loops over the raw log."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch

from hvdrec.config import Config, Evaluate, Feature, History, Model, Paths, Samples, Split, Train
from hvdrec.config.sections import Tower
from hvdrec.data.collate import table_arrays
from hvdrec.evaluation.evaluate import evaluate_model
from hvdrec.features.encoder import Encoder
from hvdrec.features.fit import Fitted
from hvdrec.features.prepare import prepare
from hvdrec.models.recommender import Recommender
from hvdrec.samples.make import make_samples
from hvdrec.training.build import build_model

USERS, ITEMS, LENGTH, KS = 25, 20, 4, (1, 3, 8)
SPLITS = ("train", "validation", "test")
METHODS = ("leave-last-out", "temporal", "random", "random-per-user")
Row = dict[str, Any]
Scores = Callable[[str], Sequence[float]]
"""User -> score of each item."""


@dataclass(frozen=True)
class Run:
    """A prepared log with a model of random weights; `rows` holds each split's raw rows."""

    config: Config
    model: Recommender
    rows: dict[str, list[Row]]

    def report(self, split: str = "test", **evaluate: Any) -> dict[str, Any]:
        options = replace(self.config.evaluate, **evaluate)
        return evaluate_model(self.model, replace(self.config, evaluate=options), split)


def random_log(seed: int = 1) -> list[Row]:
    """Rows of distinct users, items and times; a user meets an item once."""
    random = np.random.default_rng(seed)
    rows = [
        {"user": f"u{u}", "item": f"i{i:02}", "city": f"c{i % 3}", "t": int(t), "liked": int(like)}
        for u in range(USERS)
        for i, t, like in zip(
            random.permutation(ITEMS)[: random.integers(3, 12)],
            random.permutation(10_000)[:ITEMS] * USERS + u,
            random.random(ITEMS) < 0.7,
            strict=False,
        )
    ]
    return rows


def prepared(folder: Path, rows: Sequence[Row], method: str, **samples: Any) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / "log.parquet")
    options: dict[str, Any] = {"time": "t", "history": (History("history", length=LENGTH),)}
    options |= samples
    features = [Feature("user"), Feature("city"), Feature("item", side="item")]
    if options["history"]:
        features.append(Feature("history", kind="sequence", max_length=LENGTH, shares="item"))
    config = Config(
        "protocols",
        tuple(features),
        paths=Paths(raw=str(folder), work=str(folder / "work")),
        samples=Samples(
            interactions="log.parquet",
            user="user",
            item="item",
            label="liked",
            split=Split(method=method),  # type: ignore[arg-type]
            **options,
        ),
        model=Model(dimension=6, tower=Tower(hidden=(), output=6)),
        train=Train(objective="joint"),
        evaluate=Evaluate(k=KS),
    )
    make_samples(config, overwrite=True, progress=False)
    sizes = prepare(config, overwrite=True, workers=1, progress=False).sizes
    model = build_model(config, sizes, with_tables=True)
    random = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=random)
    split_rows = {
        split: ds.dataset(folder / "work" / "samples" / split).to_table().to_pylist()
        for split in SPLITS
    }
    raw = {(row["user"], row["item"], row.get("t")): row for row in rows}
    return Run(
        config,
        model.eval(),
        {
            split: [raw[row["user"], row["item"], row.get("time")] for row in part]
            for split, part in split_rows.items()
        },
    )


def users_with(rows: Iterable[Row], users: Iterable[str]) -> pa.Table:
    """Return each user's state after some rows: the city of the latest, the last liked items."""
    history: dict[str, list[str]] = {user: [] for user in users}
    city: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: row["t"]):
        city[row["user"]] = row["city"]
        if row["liked"]:
            history[row["user"]].append(row["item"])
    return pa.table(
        {
            "user": [*history],
            "city": [city.get(user) for user in history],
            "history": pa.array([h[-LENGTH:] for h in history.values()], pa.list_(pa.string())),
        }
    )


def model_scores(run: Run, known: Iterable[Row]) -> Scores:
    """Return the model's scores of all items for users who have done some rows."""
    everyone = sorted({row["user"] for part in run.rows.values() for row in part})
    encoder = Encoder(Fitted.load(run.config.paths.of("features")))
    schema = run.config.schema

    def codes(side: Any, table: pa.Table) -> dict[str, torch.Tensor]:
        encoded = pa.table(encoder.encode(schema.side(side), table))
        arrays = table_arrays(encoded, schema.side(side))
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    items = pa.table({"item": [f"i{i:02}" for i in range(ITEMS)]})
    with torch.inference_mode():
        user = run.model.represent_users(codes("user", users_with(known, everyone)))
        item = run.model.represent_items(codes("item", items))
    width = run.model.output_width
    products = user[:, :width].double() @ item[:, :width].double().T
    return dict(zip(everyone, products.float().tolist(), strict=True)).__getitem__


def reference(run: Run, split: str, score: Scores, seen_label: int) -> dict[str, float]:
    """Return the retrieval metrics by their definitions, one user at a time."""
    earlier = [row for part in SPLITS[: SPLITS.index(split)] for row in run.rows[part]]
    seen, relevant = defaultdict(set), defaultdict(set)
    for row in earlier:
        if row["liked"] >= seen_label:
            seen[row["user"]].add(int(row["item"][1:]))
    for row in run.rows[split]:
        number = int(row["item"][1:])
        if row["liked"] and number not in seen[row["user"]]:
            relevant[row["user"]].add(number)
    sums: dict[str, float] = defaultdict(float)
    for user, wanted in relevant.items():
        scores = score(user)
        order = sorted(set(range(ITEMS)) - seen[user], key=lambda i: (-scores[i], i))
        for k in KS:
            hits = [item in wanted for item in order[:k]]
            ranks = [rank for rank, hit in enumerate(hits, 1) if hit]
            best = min(k, len(wanted))
            gain = sum(1 / math.log2(rank + 1) for rank in ranks)
            sums[f"recall@{k}"] += len(ranks) / len(wanted)
            sums[f"precision@{k}"] += len(ranks) / k
            sums[f"hit_rate@{k}"] += bool(ranks)
            sums[f"ndcg@{k}"] += gain / sum(1 / math.log2(r + 1) for r in range(1, best + 1))
            sums[f"mrr@{k}"] += 1 / ranks[0] if ranks else 0
            sums[f"map@{k}"] += sum(n / rank for n, rank in enumerate(ranks, 1)) / best
    return {name: total / len(relevant) for name, total in sums.items()} | {"users": len(relevant)}


def known_before(run: Run, split: str) -> list[Row]:
    """Return the rows that users have behind them when a split is evaluated."""
    is_later = split == "test" and not run.config.samples.split.method.startswith("random")
    return [*run.rows["train"], *(run.rows["validation"] if is_later else [])]


def popularity_scores(run: Run) -> Scores:
    counts = [0] * ITEMS
    for row in run.rows["train"]:
        counts[int(row["item"][1:])] += row["liked"]
    return lambda user: counts


def item_item_scores(run: Run, known: Iterable[Row], l2: float | None) -> Scores:
    """Return the scores of co-occurrence, or of EASE for a penalty."""
    taken, profile = defaultdict(set), defaultdict(set)
    for rows, of in ((run.rows["train"], taken), (known, profile)):
        for row in rows:
            if row["liked"]:
                of[row["user"]].add(int(row["item"][1:]))
    both = np.zeros((ITEMS, ITEMS))
    for items in taken.values():
        for i in items:
            for j in items:
                both[i, j] += 1
    if l2 is None:
        count = np.maximum(np.diag(both), 1)
        weights = both / np.sqrt(np.outer(count, count))
    else:
        inverse = np.linalg.inv(both + l2 * np.eye(ITEMS))
        weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    weights = weights.astype(np.float32)
    return lambda user: sum((weights[j] for j in sorted(profile[user])), np.zeros(ITEMS)).tolist()


@pytest.mark.parametrize("method", METHODS)
def test_retrieval_metrics_of_the_model_and_baselines_equal_plain_loops(
    tmp_path: Path, method: str
) -> None:
    run = prepared(tmp_path, random_log(), method)
    for split, seen, seen_label in (
        ("validation", "taken", 1),
        ("test", "taken", 1),
        ("test", "shown", 0),
    ):
        report, known = run.report(split, seen=seen), known_before(run, split)
        baselines = report["baselines"]
        l2 = baselines["ease"]["chosen"]["retrieval"]["l2"]
        for metrics, scores in (
            (report["retrieval"], model_scores(run, known)),
            (baselines["popularity"]["retrieval"], popularity_scores(run)),
            (baselines["cooccurrence"]["retrieval"], item_item_scores(run, known, None)),
            (baselines["ease"]["retrieval"], item_item_scores(run, known, l2)),
        ):
            expected = reference(run, split, scores, seen_label)
            assert expected["users"] > 5
            found = {name: metrics[name] for name in expected}
            assert found == pytest.approx(expected, rel=1e-12)


def test_leave_last_out_tests_the_last_row_with_the_validation_item_in_the_history(
    tmp_path: Path,
) -> None:
    run = prepared(tmp_path, [{**row, "liked": 1} for row in random_log()], "leave-last-out")
    by_user: dict[str, list[str]] = defaultdict(list)
    for row in sorted(random_log(), key=lambda row: row["t"]):
        by_user[row["user"]].append(row["item"])
    last = {row["user"]: row["item"] for row in run.rows["test"]}
    assert last == {user: items[-1] for user, items in by_user.items()}
    users = pq.read_table(tmp_path / "work/samples/users_validation.parquet").to_pylist()
    assert {row["user"]: row["history"] for row in users} == {
        user: items[:-1][-LENGTH:] for user, items in by_user.items()
    }
    # The state matters: with the one of training the figures differ.
    with_validation = run.report()["retrieval"]
    assert with_validation["users"] == USERS
    stale = reference(run, "test", model_scores(run, run.rows["train"]), 1)
    assert with_validation["mrr@8"] != pytest.approx(stale["mrr@8"])
