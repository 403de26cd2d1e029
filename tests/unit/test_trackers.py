"""Trackers record the events of the training log and the model at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hvdrec.config import Config, with_fields
from hvdrec.errors import UserError
from hvdrec.training.display import Silent
from hvdrec.training.log import TrainingLog
from hvdrec.training.trackers import (
    Tracker,
    Trained,
    check_trackers,
    open_trackers,
    register_tracker,
)
from hvdrec.training.trackers.tracker import parameters, scalars
from tests.small_data import small_config

TRAINED = Trained(
    20,
    {"head.weight": np.arange(6.0).reshape(2, 3)},
    np.eye(3, dtype=np.float32),
    ["One", "Zwölf", ""],
)


def config(tmp_path: Path, *trackers: str) -> Config:
    small = small_config(str(tmp_path / "raw"), str(tmp_path / "work"))
    return with_fields(small, {"train.trackers": list(trackers)})


def record(tmp_path: Path, tracker: str) -> Path:
    """Log a step, a validation and the end of a small run."""
    run = tmp_path / "work/run"
    run.mkdir(parents=True)
    trackers = open_trackers(config(tmp_path, tracker), run)
    with TrainingLog(run, is_first=True, display=Silent(), trackers=trackers) as log:
        log.write("step", step=10, loss=0.5, time_shares={"reading": 0.25}, retrieval_loss=None)
        log.write("validation", step=20, epoch=1, better=True, auc=0.75, **{"recall@10": 0.5})
        log.note("a note")
        log.finish(TRAINED)
        log.write("end", step=20)
    return run


def test_numbers_have_names_and_missing_ones_are_left_out() -> None:
    event = {
        "event": "validation",
        "step": 3,
        "auc": 0.5,
        "better": True,
        "tasks": {"a": {"auc": 1}},
    }
    assert scalars(event) == {"validation/auc": 0.5, "validation/tasks/a/auc": 1.0}
    assert scalars({"event": "end", "best": 1.0}) == {}
    assert parameters({"a": {"b": [1, 2], "c": 3}}) == {"a.b": "[1, 2]", "a.c": 3}


def test_tensorboard_shows_scalars_histograms_and_items(tmp_path: Path) -> None:
    folder = record(tmp_path, "tensorboard") / "tensorboard"
    found = EventAccumulator(str(folder))
    found.Reload()
    tags = found.Tags()
    assert {"train/loss", "train/time_shares/reading", "validation/auc"} <= {*tags["scalars"]}
    assert [(e.step, e.value) for e in found.Scalars("validation/auc")] == [(20, 0.75)]
    assert tags["histograms"] == ["head.weight"]
    titles = next(folder.rglob("metadata.tsv")).read_text().splitlines()
    assert titles == ["One", "Zwölf", "-"]
    assert "hparam/validation/auc" in tags["scalars"]


def test_mlflow_holds_parameters_metrics_and_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = record(tmp_path, "mlflow")
    client = MlflowClient((tmp_path / "work/mlruns").as_uri())
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["train.batch_size"] == "512"
    assert found.data.metrics["train/loss"] == 0.5
    (recall,) = client.get_metric_history(found.info.run_id, "validation/recall_at_10")
    assert (recall.step, recall.value) == (20, 0.5)
    stored = Path(client.download_artifacts(found.info.run_id, "log.jsonl"))
    kinds = [json.loads(line)["event"] for line in stored.read_text().splitlines()]
    assert kinds == ["step", "validation", "note"]
    assert (run / "log.jsonl").is_file()


def test_an_unknown_tracker_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="tensorboard") as error:
        check_trackers(["tensorbord"])
    assert (error.value.field, error.value.value) == ("train.trackers", "tensorbord")


def test_a_missing_package_is_named_with_its_extra() -> None:
    register_tracker("missing", lambda config, run: pytest.fail("opened"), "no_such_package_here")
    with pytest.raises(UserError, match=r"no_such_package_here; pip install 'hvdrec\[missing\]'"):
        check_trackers(["missing"])


def test_a_registered_tracker_gets_the_events_and_how_the_run_ended(tmp_path: Path) -> None:
    calls: list[Any] = []

    class Recorder:
        def log(self, event: Any) -> None:
            calls.append(event["event"])

        def finish(self, trained: Trained) -> None:
            calls.append(trained.step)

        def close(self, *, failed: bool) -> None:
            calls.append(failed)

    def opened(config: Config, run: Path) -> Tracker:
        return Recorder()

    register_tracker("recorder", opened)
    record(tmp_path, "recorder")
    assert calls == ["step", "validation", "note", 20, "end", False]
    trackers = open_trackers(config(tmp_path, "recorder"), tmp_path)
    with (
        pytest.raises(KeyError),
        TrainingLog(tmp_path, is_first=True, display=Silent(), trackers=trackers),
    ):
        raise KeyError
    assert calls[-1] is True
