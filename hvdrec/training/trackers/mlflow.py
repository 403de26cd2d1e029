"""Record a run in MLflow: parameters, metrics, and the log."""

from __future__ import annotations

import os
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from hvdrec.config import Config
from hvdrec.config.structure import to_dict
from hvdrec.storage.json_text import json_text
from hvdrec.training.run_history import LOG_FILE, Event
from hvdrec.training.trackers.tracker import Trained, parameters, scalars

URI_VARIABLE = "MLFLOW_TRACKING_URI"
MOST_PARAMETERS = 100
"""Limits of MLflow: parameters in a request and, in LONGEST, characters of a parameter's value."""
LONGEST = 500


class MlflowTracker:
    """Writes to the server in MLFLOW_TRACKING_URI, or else to ``WORK/mlruns``.

    The experiment has the name of the configuration. Every start of training, even to resume a run,
    creates a new run in MLflow.
    """

    def __init__(self, config: Config, run: Path) -> None:
        """Create the run in MLflow, and record the configuration."""
        local = (run.parent / "mlruns").absolute().as_uri()
        # Without this, MLflow refuses to store runs in plain files, which need no database.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = MlflowClient(os.environ.get(URI_VARIABLE) or local)
        self._log_file = run / LOG_FILE
        experiment = self._client.get_experiment_by_name(config.name)
        number = experiment.experiment_id if experiment else None
        if number is None:
            number = self._client.create_experiment(config.name)
        self._run: str = self._client.create_run(number, run_name=str(run)).info.run_id
        fields = to_dict(config)
        self._client.log_text(self._run, json_text(fields, indent=1), "config.json")
        values = parameters({name: v for name, v in fields.items() if name != "features"})
        entries = [Param(name, str(value)[:LONGEST]) for name, value in values.items()]
        for start in range(0, len(entries), MOST_PARAMETERS):
            self._client.log_batch(self._run, params=entries[start : start + MOST_PARAMETERS])

    def log(self, event: Event) -> None:
        """Record the numbers of an event."""
        now = int(1000 * event.get("seconds", 0))
        numbers = scalars(event).items()
        metrics = [Metric(_plain(name), value, now, event["step"]) for name, value in numbers]
        if metrics:
            self._client.log_batch(self._run, metrics=metrics)

    def finish(self, trained: Trained) -> None:
        """Store the training log."""
        self._client.log_artifact(self._run, str(self._log_file))

    def close(self, *, failed: bool) -> None:
        """End the run in MLflow."""
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


def _plain(name: str) -> str:
    """Replace the character @, which MLflow does not allow in names."""
    return name.replace("@", "_at_")
