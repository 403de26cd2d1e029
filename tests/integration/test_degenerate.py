"""Labels, metrics and models that prove nothing are refused, or named in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hvdrec
from hvdrec.config import Config, with_fields
from hvdrec.errors import UserError
from hvdrec.reporting.report import report
from hvdrec.storage.artifacts import read_manifest, write_manifest
from hvdrec.training.checkpoint import read_config
from tests.integration.conftest import SmallRun


def relabelled(small_run: SmallRun, to: Path, **labels: float | None) -> Config:
    """Copy the features with one label in all rows of the named splits; return a run on them."""
    config = read_config(small_run.work / "run")
    shutil.copytree(config.paths.of("features"), to / "features")
    for split, label in labels.items():
        for file in (to / "features" / split).glob("*.parquet"):
            table = pq.read_table(file)
            column = pa.array([label] * table.num_rows, table.schema.field("label").type)
            index = table.schema.get_field_index("label")
            pq.write_table(table.set_column(index, table.schema.field("label"), column), file)
        (to / "features" / split / "_checksums.json").unlink(missing_ok=True)
    meta = read_manifest(small_run.work / "features", "features").meta
    write_manifest(to / "features", "features", meta)
    paths = replace(config.paths, work=str(to), features=str(to / "features"), run=str(to / "run"))
    train = replace(config.train, metric="auto", epochs=1)
    return replace(config, paths=paths, train=train)


def lines(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log, which must be strict JSON."""

    def refuse(text: str) -> float:
        raise AssertionError(text)

    log = (run / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in log]


def test_a_validation_split_of_one_class_is_measured_by_the_log_loss(
    small_run: SmallRun, tmp_path: Path
) -> None:
    config = relabelled(small_run, tmp_path, validation=1.0)
    result = hvdrec.train(config, progress=False)
    assert result.metric == "log_loss" and result.best is not None
    notes = [line["text"] for line in lines(tmp_path / "run") if line["event"] == "note"]
    assert any("auc is not defined" in note and "all labels are 1" in note for note in notes)
    written = report(tmp_path / "run", split="validation", progress=False)
    page = Path(written.path).read_text()
    assert "not defined for these rows" in page and "<h2>Slices</h2>" in page
    with pytest.raises(UserError, match="auto") as error:
        hvdrec.train(with_fields(config, {"train.metric": "auc"}), overwrite=True, progress=False)
    assert error.value.field == "train.metric"


def test_a_split_without_any_metric_trains_all_epochs(small_run: SmallRun, tmp_path: Path) -> None:
    config = relabelled(small_run, tmp_path, validation=0.0)
    config = with_fields(config, {"train.objective": "retrieval", "train.epochs": 2})
    result = hvdrec.train(config, progress=False)
    assert (result.metric, result.best, result.epochs) == ("none", None, 2)


def test_training_compares_retrieval_with_popularity_by_event(
    small_run: SmallRun, tmp_path: Path
) -> None:
    config = relabelled(small_run, tmp_path)
    samples = str(small_run.work / "samples")
    config = with_fields(config, {"train.objective": "retrieval", "paths.samples": samples})
    result = hvdrec.train(config, progress=False)
    name = f"hit_rate@{config.evaluate.k[0]}"
    [validation] = [line for line in lines(tmp_path / "run") if line["event"] == "validation"]
    evaluated = hvdrec.evaluate(tmp_path / "run", split="validation")
    assert evaluated.events is not None and evaluated.baselines is not None
    own, popular = evaluated.events[name], evaluated.baselines["popularity"]["events"][name]
    assert validation["events"][name] == own
    metrics = [(each["metric"], each["model"], each["value"]) for each in result.worse_than]
    assert metrics == ([(f"events.{name}", own, popular)] if own < popular else [])
    assert validation["worse_than"] == result.worse_than == evaluated.worse_than


def test_export_refuses_a_model_that_is_worse_than_a_baseline(
    small_run: SmallRun, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run.work / "run", run)
    best = run / "checkpoints" / (run / "best").read_text().split()[0]
    meta = dict(read_manifest(best, "checkpoint").meta)
    worse = {"baseline": "base_rate", "metric": "log_loss", "value": 0.1, "task": "", "model": 0.7}
    meta["metrics"] = {**meta["metrics"], "worse_than": [worse]}
    write_manifest(best, "checkpoint", meta)
    to = tmp_path / "bundle"
    with pytest.raises(UserError, match=r"base_rate \(log_loss 0.7 against 0.1\).*--allow-worse"):
        hvdrec.export(run, to=to, workers=1, progress=False)
    assert not to.exists()
    bundle = hvdrec.export(run, to=to, allow_worse=True, workers=1, progress=False)
    assert bundle.metrics["worse_than"][0]["baseline"] == "base_rate"
