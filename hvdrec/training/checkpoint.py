"""Checkpoints: safetensors and JSON, whole or absent, found by `latest` and `best`.

A run directory holds ``checkpoints/step-NNNNNNNN/`` (model.safetensors, optimizer.safetensors and
the position in manifest.json), the text files ``latest`` and ``best``, ``config.json`` and
``log.jsonl``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hvdrec.artifacts import read_manifest, write_artifact, write_text
from hvdrec.config import Config
from hvdrec.errors import UserError
from hvdrec.features.fit import Fitted
from hvdrec.models.recommender import Recommender
from hvdrec.order import Progress
from hvdrec.structure import from_dict, to_dict
from hvdrec.training.optimizer import optimizer_tensors, restore_optimizer

CONFIG_FILE = "config.json"
Which = Literal["latest", "best"]


@dataclass(frozen=True)
class Position:
    """How far training has come.

    epoch: the one under way; past: what was read of it, by which number of ranks; step: optimizer
    steps so far; best: the best validation metric and best_step when it was reached; stale:
    validations since; finished: whether training came to its end.
    """

    epoch: int = 0
    past: tuple[Progress, ...] = ()
    step: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    finished: bool = False


def save(
    run: Path,
    position: Position,
    model: Recommender,
    optimizer: torch.optim.Optimizer,
    config: Config,
    metrics: dict[str, Any],
    keep: int,
) -> None:
    """Write a checkpoint, then name it `latest` (and `best`, if it is), then drop old ones.

    To be called by the first rank alone.
    """
    name = f"step-{position.step:08d}"
    meta = {"position": asdict(position), "metrics": metrics, "config": to_dict(config)}
    with write_artifact(run / "checkpoints" / name, "checkpoint", meta, overwrite=True) as draft:
        save_file(_contiguous(model.state_dict()), draft / "model.safetensors")
        save_file(_contiguous(optimizer_tensors(model, optimizer)), draft / "optimizer.safetensors")
    if position.best is not None and position.best_step == position.step:
        write_text(run / "best", name)
    write_text(run / "latest", name)
    _drop_old(run, keep)


def restore(run: Path, model: Recommender, optimizer: torch.optim.Optimizer) -> Position:
    """Load the latest checkpoint into model and optimizer and return its position."""
    directory = _find(run, "latest")
    meta = read_manifest(directory, "checkpoint").meta
    model.load_state_dict(_load(directory / "model.safetensors"))
    restore_optimizer(model, optimizer, _load(directory / "optimizer.safetensors"))
    raw = dict(meta["position"])
    raw["past"] = tuple(Progress(**past) for past in raw["past"])
    return Position(**raw)


def read_config(run: Path) -> Config:
    """Return the configuration that a run was trained with."""
    file = Path(run) / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{run}: no run here ({CONFIG_FILE} is missing); train first: hvdrec train")
    try:
        return from_dict(Config, json.loads(file.read_text()))
    except (json.JSONDecodeError, UserError) as error:
        raise UserError(f"{file}: {error}; train again") from None


def load_model(run: Path, config: Config, which: Which = "best") -> tuple[Recommender, str]:
    """Return the model of a run's best (or latest) checkpoint, on the CPU, and its name."""
    directory = _find(Path(run), which)
    read_manifest(directory, "checkpoint")
    fitted = Fitted.load(config.paths.of("features"))
    model = Recommender(config, fitted.sizes)
    try:
        model.load_state_dict(_load(directory / "model.safetensors"))
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{directory}: does not fit {config.paths.of('features')} ({first}); "
            "train again after hvdrec prepare"
        ) from None
    return model.eval(), directory.name


def checkpoint_metrics(run: Path, which: Which = "best") -> dict[str, Any]:
    """Return the validation metrics that were taken when a checkpoint was written."""
    manifest = read_manifest(_find(Path(run), which), "checkpoint")
    metrics: dict[str, Any] = manifest.meta["metrics"]
    return metrics


def has_checkpoint(run: Path) -> bool:
    """Return whether a run can be resumed."""
    return (run / "latest").is_file()


def _find(run: Path, which: Which) -> Path:
    pointers: Sequence[str] = ("best", "latest") if which == "best" else ("latest",)
    for pointer in pointers:
        if (run / pointer).is_file():
            return run / "checkpoints" / Path((run / pointer).read_text().strip()).name
    raise UserError(f"{run}: holds no checkpoint; train first: hvdrec train")


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({error}); use another checkpoint") from None


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _drop_old(run: Path, keep: int) -> None:
    named = {
        (run / pointer).read_text().strip()
        for pointer in ("latest", "best")
        if (run / pointer).is_file()
    }
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    for name in names[:-keep]:
        if name not in named:
            shutil.rmtree(run / "checkpoints" / name, ignore_errors=True)
