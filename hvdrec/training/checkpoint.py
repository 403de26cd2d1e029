"""Checkpoints: safetensors and JSON, complete or absent, named by `latest` and `best`.

A run directory holds ``checkpoints/step-NNNNNNNN/`` (model.safetensors, optimizer.safetensors, the
files of `embeddings.files`, and the position in manifest.json), the text files ``latest`` and
``best``, ``config.json`` and ``log.jsonl``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hvdrec.config import Config
from hvdrec.config.stored import from_stored
from hvdrec.config.structure import to_dict
from hvdrec.data.sampler import Progress
from hvdrec.embeddings.files import read_into_model, read_tables, table_meta, write_tables
from hvdrec.embeddings.setup import make_tables
from hvdrec.embeddings.sharded import DistributedTables
from hvdrec.errors import UserError, invalid_file
from hvdrec.features.fit import Fitted
from hvdrec.models.recommender import Recommender
from hvdrec.parallel import ranks
from hvdrec.storage.artifacts import read_manifest, write_artifact, write_text
from hvdrec.training.build import build_model
from hvdrec.training.optimizer import optimizer_tensors, restore_optimizer
from hvdrec.training.state import TrainState

CONFIG_FILE = "config.json"
MODEL_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.safetensors"
AVERAGES_FILE = "averages.safetensors"
Which = Literal["latest", "best"]


@dataclass(frozen=True)
class Position:
    """How far training is.

    Attributes:
        epoch: The current epoch, from 0.
        past: What was read of it, by jobs of which size.
        step: Optimizer steps so far.
        best: The best validation metric; None before the first validation.
        best_step: The step at which it was reached.
        stale: Validations since then.
        finished: True if training is over.
    """

    epoch: int = 0
    past: tuple[Progress, ...] = ()
    step: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    finished: bool = False


def save(run: Path, position: Position, state: TrainState, metrics: dict[str, Any]) -> None:
    """Write a checkpoint, name it `latest` (and `best`, if it is), and remove old ones.

    Every rank must call this together: each writes its part of sharded tables.

    Args:
        run: Directory of the run.
        position: How far training is.
        state: What is saved.
        metrics: The validation metrics of this position; empty within an epoch.

    Raises:
        UserError: A rank cannot write. It is raised on all ranks, and no checkpoint appears.
    """
    name = f"step-{position.step:08d}"
    meta = {
        "position": asdict(position),
        "metrics": metrics,
        "tables": table_meta(state.tables),
        "config": to_dict(state.config),
    }
    is_first = ranks.current().is_first
    with ExitStack() as stack:
        draft: Path | None = None
        if is_first:
            path = run / "checkpoints" / name
            draft = stack.enter_context(write_artifact(path, "checkpoint", meta, overwrite=True))
        folder = Path(ranks.broadcast_object(str(draft)))
        ranks.run_on_all(lambda: _write(folder, state, is_first=is_first))
    if is_first:
        if position.best is not None and position.best_step == position.step:
            write_text(run / "best", name)
        write_text(run / "latest", name)
        _remove_old(run, state.config.train.keep)
    ranks.barrier()


def _write(folder: Path, state: TrainState, *, is_first: bool) -> None:
    try:
        write_tables(folder, state.tables)
        if is_first:
            _save(state.model.state_dict(), folder / MODEL_FILE)
            _save(optimizer_tensors(state.model, state.optimizer), folder / OPTIMIZER_FILE)
            if state.averages is not None:
                _save(state.averages.dense, folder / AVERAGES_FILE)
    except (OSError, SafetensorError) as error:
        raise invalid_file(
            folder.parent,
            f"cannot write a checkpoint ({error})",
            "free space or fix permissions, then rerun with --resume: the checkpoint before is "
            "complete",
        ) from None


def restore(run: Path, state: TrainState) -> Position:
    """Load the latest checkpoint into a state, and return its position."""
    directory = _find(run, "latest")
    meta = read_manifest(directory, "checkpoint").meta
    state.model.load_state_dict(_load(directory / MODEL_FILE))
    restore_optimizer(state.model, state.optimizer, _load(directory / OPTIMIZER_FILE))
    read_tables(directory, meta["tables"], state.tables)
    if state.averages is not None:
        for name, value in _load(directory / AVERAGES_FILE).items():
            state.averages.dense[name].copy_(value)
    raw = dict(meta["position"])
    raw["past"] = tuple(Progress(**past) for past in raw["past"])
    return Position(**raw)


def has_checkpoint(run: Path) -> bool:
    """Return True if a run can be resumed."""
    return (run / "latest").is_file()


def latest_meta(run: Path) -> dict[str, Any]:
    """Return the metadata of the latest checkpoint's manifest."""
    return dict(read_manifest(_find(run, "latest"), "checkpoint").meta)


def checkpoint_metrics(run: Path, which: Which = "best") -> dict[str, Any]:
    """Return the validation metrics of a checkpoint."""
    manifest = read_manifest(_find(Path(run), which), "checkpoint")
    metrics: dict[str, Any] = manifest.meta["metrics"]
    return metrics


def read_config(run: Path) -> Config:
    """Return the configuration that a run was trained with.

    Raises:
        UserError: The directory is not a run, or its configuration cannot be read.
    """
    file = Path(run) / CONFIG_FILE
    if not file.is_file():
        raise invalid_file(
            run, f"no run here ({CONFIG_FILE} is missing)", "train first: hvdrec train"
        )
    try:
        return from_stored(json.loads(file.read_text()))
    except (json.JSONDecodeError, UserError) as error:
        raise invalid_file(file, str(error), "train again") from None


def load_model(run: Path, config: Config, which: Which = "best") -> tuple[Recommender, str]:
    """Load a run's model with its tables on the CPU.

    Returns:
        The model in evaluation mode and the name of the checkpoint.
    """
    directory = _find(Path(run), which)
    meta = read_manifest(directory, "checkpoint").meta
    model = build_model(config, Fitted.load(config.paths.of("features")).sizes, with_tables=True)
    read_into_model(directory, meta["tables"], model.tables)
    _load_dense(model, directory, config)
    return model.eval(), directory.name


def load_model_and_tables(
    run: Path, config: Config, which: Which, device: torch.device
) -> tuple[Recommender, DistributedTables, str]:
    """Load a run's model with its tables over the ranks: no rank needs memory for all of them.

    Every rank must call this together.

    Returns:
        The model in evaluation mode, its tables, and the name of the checkpoint.
    """
    directory = ranks.run_on_all(lambda: _find(Path(run), which))
    meta = ranks.run_on_all(lambda: read_manifest(directory, "checkpoint").meta)
    sizes = ranks.run_on_all(lambda: Fitted.load(config.paths.of("features")).sizes)
    model = build_model(config, sizes, with_tables=False)
    # SGD has no state next to the rows, which evaluation does not need.
    stateless = replace(config, train=replace(config.train, embedding_optimizer="sgd"))
    tables = ranks.run_on_all(
        lambda: make_tables(stateless, sizes, ranks.current(), device, kernels={}, is_new=False)
    )
    ranks.run_on_all(lambda: read_tables(directory, meta["tables"], tables, served=True))
    ranks.run_on_all(lambda: _load_dense(model, directory, config))
    return model.to(device).eval(), tables, directory.name


def _load_dense(model: Recommender, directory: Path, config: Config) -> None:
    """Load a model's dense weights: their averages, if there are any."""
    file = directory / AVERAGES_FILE
    file = file if file.is_file() else directory / MODEL_FILE
    tables = {n: v for n, v in model.state_dict().items() if n.startswith("tables.")}
    try:
        model.load_state_dict({**_load(file), **tables})
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise invalid_file(
            directory,
            f"does not fit {config.paths.of('features')} ({first})",
            "train again after hvdrec prepare",
        ) from None


def _find(run: Path, which: Which) -> Path:
    pointers: Sequence[str] = ("best", "latest") if which == "best" else ("latest",)
    for pointer in pointers:
        if (run / pointer).is_file():
            return run / "checkpoints" / Path((run / pointer).read_text().strip()).name
    raise invalid_file(run, "holds no checkpoint", "train first: hvdrec train")


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise invalid_file(file, f"cannot be read ({error})", "use another checkpoint") from None


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, file)


def _remove_old(run: Path, keep: int) -> None:
    """Remove all checkpoints but the last `keep`, the latest and the best."""
    named = {
        (run / pointer).read_text().strip()
        for pointer in ("latest", "best")
        if (run / pointer).is_file()
    }
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    for name in names[:-keep]:
        if name not in named:
            shutil.rmtree(run / "checkpoints" / name, ignore_errors=True)
