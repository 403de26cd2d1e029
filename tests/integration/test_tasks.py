"""The command line with several labels, from raw tables to served scores, on small data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvdrec.scoring import Scorer
from tests.integration.conftest import SmallRun, hvdrec, succeed
from tests.small_data import write_small_data

TASKS = """
[[tasks]]
name = "click"
label = "clicked"

[[tasks]]
name = "late"                # for clicked rows only: was it in the afternoon?
label = "CASE WHEN clicked = 1 THEN hour >= 12 END"
weight = 0.5
share = 0.25

[model]
"""


@pytest.fixture(scope="module")
def task_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    folder = tmp_path_factory.mktemp("tasks")
    config = write_small_data(folder)
    text = config.read_text().replace("[model]\n", TASKS)
    text = text.replace("cross_layers = 1", 'sharing = "mmoe"\nexperts = 2')
    config.write_text(text)
    work = folder / "work"
    samples = succeed("samples", config)
    prepare = succeed("prepare", config)
    train = succeed("train", config)
    report = succeed("evaluate", work / "run")
    export = succeed("export", work / "run")
    return SmallRun(config, work, samples, prepare, train, report, export)


def test_the_report_has_the_metrics_of_every_task(task_run: SmallRun) -> None:
    report = task_run.report
    test = pq.read_table(task_run.work / "samples/test").to_pylist()
    clicked = sum(row["label"] for row in test)
    assert report["tasks"]["click"]["rows"] == len(test)
    assert report["tasks"]["late"]["rows"] == clicked
    # The hour decides this task. The model sees it in the scene; the baselines do not.
    assert report["tasks"]["late"]["auc"] > 0.95
    for name in ("popularity", "item_mean", "user_item_mean"):
        tasks = report["baselines"][name]["tasks"]
        assert abs(tasks["late"]["auc"] - 0.5) < 0.1
        # The main label is the label of the first task.
        assert tasks["click"] == pytest.approx(report["baselines"][name]["ranking"])
    assert report["tasks"]["click"]["auc"] > report["baselines"]["item_mean"]["ranking"]["auc"]
    text = hvdrec("evaluate", task_run.work / "run").stdout
    assert "Tasks, test split\ntask " in text and "auc of user_item_mean" in text


def test_training_logs_losses_and_metrics_of_every_task(task_run: SmallRun) -> None:
    lines = (task_run.work / "run/log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    step = next(e for e in events if e["event"] == "step")
    losses = step["task_losses"]
    assert step["ranking_loss"] == pytest.approx(losses["click"] + 0.5 * losses["late"], rel=1e-5)
    validation = next(e for e in events if e["event"] == "validation")
    click, late = (validation["tasks"][name] for name in ("click", "late"))
    assert late["rows"] < click["rows"]
    mean = (click["auc"] + 0.25 * late["auc"]) / 1.25
    assert validation["task_auc"] == pytest.approx(mean)
    assert "task_auc" in task_run.train["validation"]


def test_the_bundle_scores_every_task(task_run: SmallRun, tmp_path: Path) -> None:
    bundle = task_run.work / "bundle"
    assert task_run.export["parity"]["largest_difference"] <= 1e-5
    meta = json.loads((bundle / "manifest.json").read_text())["meta"]
    tasks = [{"name": "click", "share": 1.0}, {"name": "late", "share": 0.25}]
    assert (meta["tasks"], meta["combine"]) == (tasks, "product")
    scorer = Scorer.load(bundle, verify=True)
    items = list(range(100, 140))
    scores = scorer.score_tasks("u1", [str(item) for item in items], {"hour": 15})
    np.testing.assert_allclose(scores["score"], scores["click"] * scores["late"] ** 0.25, rtol=1e-5)
    at_night = scorer.score_tasks("u1", [str(item) for item in items], {"hour": 3})
    assert (scores["late"] > at_night["late"]).all()

    source = next((task_run.work / "samples/test").glob("*.parquet"))
    succeed("score", bundle, source, tmp_path / "scored.parquet")
    scored = pq.read_table(tmp_path / "scored.parquet")
    assert scored.column_names[-3:] == ["score", "score_click", "score_late"]
    parts = [scored[name].to_numpy() for name in scored.column_names[-3:]]
    np.testing.assert_allclose(parts[0], parts[1] * parts[2] ** 0.25, rtol=1e-5)

    answer = succeed("recommend", bundle, "--user", "u1", "--scene", "hour=15", "-k", "3")
    for item in answer["items"]:
        click, late = item["tasks"]["click"], item["tasks"]["late"]
        assert item["score"] == pytest.approx(click * late**0.25, rel=1e-5)
    text = hvdrec("recommend", bundle, "--user", "u1", "-k", "2").stdout
    assert text.splitlines()[0].split() == ["item", "title", "score", "click", "late"]


@pytest.mark.slow
def test_the_cost_of_int8_is_measured_for_every_task(task_run: SmallRun, tmp_path: Path) -> None:
    to = tmp_path / "bundle"
    smaller = ("--export.ranker", "int8", "--export.embeddings", "int8")
    refused = hvdrec("export", task_run.work / "run", "--to", to, *smaller)
    # Experts of one inner layer and linear heads leave nothing to store as int8.
    assert refused.returncode == 2 and "the ranker has no inner layer" in refused.stderr
    assert not to.exists()
    export = succeed("export", task_run.work / "run", "--to", to, *smaller[2:])
    for name in ("click", "late"):
        cost = export["precision"]["tasks"][name]
        assert cost["auc_loss"] == cost["auc_float32"] - cost["auc"]
        assert abs(cost["auc_loss"]) < 0.01


@pytest.mark.slow
def test_shares_and_combination_can_change_at_export(task_run: SmallRun, tmp_path: Path) -> None:
    to = tmp_path / "bundle"
    fields = ("--tasks.1.share", "1", "--model.ranker.combine", "sum")
    succeed("export", task_run.work / "run", "--to", to, *fields)
    scores = Scorer.load(to).score_tasks("u1", ["100", "101"])
    np.testing.assert_allclose(scores["score"], (scores["click"] + scores["late"]) / 2, rtol=1e-5)
    done = hvdrec("export", task_run.work / "run", "--to", to, "--tasks.1.weight", "2")
    assert done.returncode == 2 and "--tasks.1.weight" in done.stderr


@pytest.mark.slow
def test_a_run_with_fewer_tasks_reuses_the_shards(task_run: SmallRun, tmp_path: Path) -> None:
    text = task_run.config.read_text()
    config = tmp_path / "click.toml"
    config.write_text(text.replace(TASKS[TASKS.index('[[tasks]]\nname = "late"') :], "\n[model]\n"))
    run = ("--paths.run", str(tmp_path / "run"), "--train.epochs", "1")
    succeed("train", config, *run)
    done = hvdrec("train", config, "--resume")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "was trained with tasks = ['click', 'late'], the configuration says" in done.stderr
    config.write_text(text.replace("hour >= 12", "hour >= 13"))
    done = hvdrec("train", config, "--paths.run", str(tmp_path / "other"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    for part in ("task 'late'", "hour >= 12", "hour >= 13", "hvdrec samples and hvdrec prepare"):
        assert part in done.stderr


def test_shards_have_nan_for_unknown_labels(task_run: SmallRun) -> None:
    raw = pa.concat_tables([pq.read_table(task_run.work / "samples/train")])
    encoded = pq.read_table(task_run.work / "features/train")
    late = raw["label_late"].to_numpy()
    np.testing.assert_array_equal(encoded["label_late"].to_numpy(), late)
    np.testing.assert_array_equal(np.isnan(late), raw["label"].to_numpy() == 0)
