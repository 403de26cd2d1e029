"""Record a run for TensorBoard, in the directory ``tensorboard`` of the run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from hvdrec.config import Config
from hvdrec.config.structure import to_dict
from hvdrec.training.run_history import Event
from hvdrec.training.trackers.tracker import Trained, parameters, scalars

FOLDER = "tensorboard"
HPARAM_SECTIONS = ("train", "model", "loader", "parallel", "seed")
"""Parts of the configuration that are hyperparameters; the rest describes the data."""


class TensorBoardTracker:
    """Writes scalars, histograms, item vectors with titles, and hyperparameters."""

    def __init__(self, config: Config, run: Path) -> None:
        """Open the files of a run."""
        self._config, self._last = config, dict[str, float]()
        self._writer = SummaryWriter(str(run / FOLDER))

    def log(self, event: Event) -> None:
        """Write the numbers of an event."""
        numbers = scalars(event)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, event["step"])
        if event["event"] == "validation":
            self._last = {f"hparam/{name}": value for name, value in numbers.items()}
        if event["event"] == "note":
            self._writer.add_text("notes", str(event["text"]))

    def finish(self, trained: Trained) -> None:
        """Write histograms of the weights, the item vectors, and the hyperparameters."""
        for name, values in trained.weights.items():
            self._writer.add_histogram(name, values, trained.step)
        if trained.item_vectors is not None:
            self._writer.add_embedding(
                torch.from_numpy(trained.item_vectors),
                metadata=[title.replace("\t", " ") or "-" for title in trained.item_titles],
                tag="items",
                global_step=trained.step,
            )
        fields = to_dict(self._config)
        chosen = {name: fields[name] for name in HPARAM_SECTIONS if name in fields}
        self._writer.add_hparams(
            parameters(chosen), self._last or {"hparam/steps": float(trained.step)}, run_name="."
        )

    def close(self, *, failed: bool) -> None:
        """Write pending data and close the files."""
        self._writer.close()
