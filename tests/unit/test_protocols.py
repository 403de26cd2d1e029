"""Evaluation protocols against plain loops over the raw log."""

from __future__ import annotations

import json
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
from hvdrec.config.data_sections import Negatives
from hvdrec.config.sections import Export, Tower
from hvdrec.data.collate import table_arrays
from hvdrec.errors import UserError
from hvdrec.evaluation.evaluate import measure_model
from hvdrec.exporting import writer
from hvdrec.exporting.score_file import score_table
from hvdrec.features.encoder import Encoder
from hvdrec.features.fit import Fitted
from hvdrec.features.prepare import prepare
from hvdrec.models.recommender import Recommender
from hvdrec.samples.make import make_samples
from hvdrec.scoring import Scorer
from hvdrec.storage.artifacts import read_manifest, write_manifest
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
        return measure_model(self.model, replace(self.config, evaluate=options), split).report


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
    timed = bool(options["time"])
    raw = {(row["user"], row["item"], row["t"] if timed else row["liked"]): row for row in rows}
    key = "time" if timed else "label"
    return Run(
        config,
        model.eval(),
        {
            split: [raw[row["user"], row["item"], row[key]] for row in part]
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


def hit_rate(scorer: Scorer, rows: Iterable[Row], k: int) -> float:
    """Return the share of users whose held-out items are among their k candidates."""
    wanted: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row["liked"]:
            wanted[row["user"]].add(row["item"])
    hits = [
        bool(items & {r.item for r in scorer.recommend(user, k=k, candidates=k, skip_seen=True)})
        for user, items in wanted.items()
    ]
    return sum(hits) / len(hits)


def test_users_as_of_a_split_make_scores_by_key_honest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(tmp_path, random_log(), "leave-last-out")
    # The three bundles have the same graphs, which take seconds to compile.
    graphs: dict[str, Any] = {}

    def once(compile_graph: Callable[..., Any]) -> Callable[..., Any]:
        def compiled(model: Recommender, fitted: Fitted, *side: str) -> Any:
            name = " ".join([compile_graph.__name__, *side])
            if name not in graphs:
                graphs[name] = compile_graph(model, fitted, *side)
            return graphs[name]

        return compiled

    monkeypatch.setattr(writer, "tower", once(writer.tower))
    monkeypatch.setattr(writer, "ranker", once(writer.ranker))
    rows = {
        split: pa.Table.from_pylist(part).select(["user", "item", "t"])
        for split, part in run.rows.items()
    }
    tables = {
        **rows,
        "untimed": rows["test"].drop(["t"]),
        "with raw features": rows["test"]
        .append_column("city", pa.array(["c1"] * USERS))
        .append_column("history", pa.array([["i01"]] * USERS)),
        "text for times": rows["test"].set_column(2, "t", rows["test"]["t"].cast(pa.string())),
    }
    for name, table in tables.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")

    def warnings(bundle: Path, name: str) -> str:
        facts = score_table(bundle, tmp_path / f"{name}.parquet", tmp_path / "scored.parquet")
        assert facts["rows"] == tables[name].num_rows
        return " ".join(facts["warnings"])

    for state, split in (("train", "validation"), ("validation", "test"), ("all", "")):
        bundle = tmp_path / state
        config = replace(
            run.config,
            export=Export(users_as_of=state),  # type: ignore[arg-type]
            paths=replace(run.config.paths, bundle=str(bundle)),
        )
        known = writer.write_bundle(config, run.model, checkpoint="c", metrics={})["known"]
        splits = SPLITS[: 1 + ["train", "validation", "all"].index(state)]
        until = max(row["t"] for part in splits for row in run.rows[part])
        assert known["users"] == {"splits": splits, "until": until}
        assert known["items"]["splits"] == ("train",)
        scorer = Scorer.load(bundle)
        if split:
            expected = run.report(split)["retrieval"]
            assert hit_rate(scorer, run.rows[split], 3) == expected["hit_rate@3"]
            assert not warnings(bundle, split)
        for name in splits:
            count = tables[name].num_rows
            warning = warnings(bundle, name)
            assert f"{count} of {count} rows are not later" in warning
            assert ("--export.users-as-of" in warning) == (state != "train")
        assert "has no column 't'" in warnings(bundle, "untimed")
        assert "'t' is not a number in 25 of 25" in warnings(bundle, "text for times")
        assert not warnings(bundle, "with raw features")


def test_an_impression_log_has_a_result_because_only_taken_items_are_seen(tmp_path: Path) -> None:
    # Every user is shown the same items again and takes one of them, later another one.
    rows = [
        {
            "user": f"u{u}",
            "item": f"i{i:02}",
            "city": "c",
            "t": day,
            "liked": int(i == (u + day) % 6),
        }
        for day in range(3)
        for u in range(USERS)
        for i in range(6)
    ]
    run = prepared(tmp_path, rows, "temporal")
    assert run.report()["retrieval"]["users"] == USERS
    report = run.report(seen="shown")
    assert report["retrieval"]["users"] == 0
    assert math.isnan(report["retrieval"]["recall@1"])
    [note] = [line for line in report["notes"] if line.startswith("retrieval")]
    assert "n/a, all 25 of 25 positive pairs" in note
    assert "--evaluate.seen taken" in note


def test_an_evaluation_without_positives_says_so(tmp_path: Path) -> None:
    log = random_log()
    last = sorted(row["t"] for row in log)[-len(log) // 10 :]
    rows = [{**row, "liked": int(row["t"] < last[0] - 1 and row["liked"])} for row in log]
    notes = prepared(tmp_path, rows, "temporal").report()["notes"]
    assert any("auc" in line and "no row" in line and "positive" in line for line in notes)
    assert any(line.startswith("retrieval: n/a, no row of the test split") for line in notes)


@pytest.mark.parametrize(
    ("method", "time", "copies"),
    [
        ("leave-last-out", "t", {"validation": 1, "test": 2}),
        ("random", "", None),
    ],
)
def test_copies_in_two_splits_are_counted_and_reported(
    tmp_path: Path, method: str, time: str, copies: dict[str, int] | None
) -> None:
    log = [{**row, "t": row["t"] if time else 0} for row in random_log()]
    # u0's last row comes three times, u1's twice, and u2's twice with another label.
    extra = []
    for user, times in (("u0", 2), ("u1", 1), ("u2", 1)):
        last = max((row for row in log if row["user"] == user), key=lambda row: row["t"])
        extra += [{**last, "liked": last["liked"] if user != "u2" else 1 - last["liked"]}] * times
    if not time:
        extra += log[:40]
    options = {"time": time} if time else {"time": "", "history": ()}
    run = prepared(tmp_path, [*log, *extra], method, **options)
    if copies is None:
        split_of = [(split, tuple(r.values())) for split in SPLITS for r in run.rows[split]]
        copies = {
            split: sum(
                row in [other for part, other in split_of if SPLITS.index(part) < i]
                for part, row in split_of
                if part == split
            )
            for i, split in enumerate(SPLITS)
            if i
        }
        assert sum(copies.values())
    assert read_manifest(tmp_path / "work/samples", "samples").meta["copies"] == copies
    notes = run.report(split="test").get("notes", [])
    expected = f"{copies['test']} of {len(run.rows['test'])} test rows are exact copies"
    assert any(expected in line for line in notes) == bool(copies["test"])


def test_features_of_an_earlier_version_are_evaluated_as_they_were_and_say_so(
    tmp_path: Path,
) -> None:
    run = prepared(tmp_path, random_log(), "leave-last-out")
    for stage in ("samples", "features"):
        path = tmp_path / "work" / stage
        (path / "users_validation.parquet").unlink()
        meta = dict(read_manifest_text(path)["meta"])
        for key in ("user_states", "copies", "made_from"):
            meta.pop(key, None)
        write_manifest(path, stage, meta)
    report = run.report()
    stale = reference(run, "test", model_scores(run, run.rows["train"]), 1)
    assert report["retrieval"]["mrr@8"] == pytest.approx(stale["mrr@8"], rel=1e-12)
    assert any("earlier version" in line for line in report["notes"])
    config = replace(run.config, export=Export(users_as_of="validation"))
    with pytest.raises(UserError, match="earlier version") as caught:
        writer.write_bundle(config, run.model, checkpoint="c", metrics={})
    assert (caught.value.field, caught.value.value) == ("export.users_as_of", "validation")


def read_manifest_text(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    return found


def test_sampled_negatives_were_not_shown() -> None:
    with pytest.raises(UserError, match=r"samples\.negatives") as caught:
        Config(
            "c",
            (Feature("user"), Feature("item", side="item")),
            samples=Samples(user="user", item="item", negatives=Negatives(per_positive=1)),
            evaluate=Evaluate(seen="shown"),
        )
    assert (caught.value.field, caught.value.value) == ("evaluate.seen", "shown")
