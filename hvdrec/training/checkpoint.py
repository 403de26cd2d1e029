"""Checkpoints: safetensors and JSON, whole or absent, found by `latest` and `best`.

A run directory holds ``checkpoints/step-NNNNNNNN/`` (model.safetensors, optimizer.safetensors, the
files of `table_files`, and the position in manifest.json), the text files ``latest`` and ``best``,
``config.json`` and ``log.jsonl``.
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
from hvdrec.errors import UserError
from hvdrec.features.fit import Fitted
from hvdrec.models.recommender import Recommender
from hvdrec.parallel import ranks
from hvdrec.storage.artifacts import read_manifest, write_artifact, write_text
from hvdrec.training.average import Averages
from hvdrec.training.build import build_model
from hvdrec.training.optimizer import optimizer_tensors, restore_optimizer

CONFIG_FILE = "config.json"
AVERAGES_FILE = "averages.safetensors"
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
    tables: DistributedTables,
    config: Config,
    metrics: dict[str, Any],
    averages: Averages | None = None,
) -> None:
    """Write a checkpoint, then name it `latest` (and `best`, if it is), then drop old ones.

    To be called by every rank: each writes its part of sharded tables. Raises UserError on all of
    them if one cannot write; no checkpoint appears then.
    """
    name = f"step-{position.step:08d}"
    meta = {
        "position": asdict(position),
        "metrics": metrics,
        "tables": table_meta(tables),
        "config": to_dict(config),
    }
    is_first = ranks.current().is_first
    with ExitStack() as stack:
        draft: Path | None = None
        if is_first:
            path = run / "checkpoints" / name
            draft = stack.enter_context(write_artifact(path, "checkpoint", meta, overwrite=True))
        folder = Path(ranks.broadcast_object(str(draft)))
        ranks.run_on_all(
            lambda: _write(folder, model, optimizer, tables, averages, is_first=is_first)
        )
    if is_first:
        if position.best is not None and position.best_step == position.step:
            write_text(run / "best", name)
        write_text(run / "latest", name)
        _drop_old(run, config.train.keep)
    ranks.barrier()


def _write(
    folder: Path,
    model: Recommender,
    optimizer: torch.optim.Optimizer,
    tables: DistributedTables,
    averages: Averages | None,
    *,
    is_first: bool,
) -> None:
    try:
        write_tables(folder, tables)
        if is_first:
            save_file(_contiguous(model.state_dict()), folder / "model.safetensors")
            state = optimizer_tensors(model, optimizer)
            save_file(_contiguous(state), folder / "optimizer.safetensors")
            if averages is not None:
                save_file(_contiguous(averages.dense), folder / AVERAGES_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder.parent}: no checkpoint can be written ({error}); the one before is whole"
        ) from None


def latest_meta(run: Path) -> dict[str, Any]:
    """Return what the latest checkpoint's manifest says."""
    return dict(read_manifest(_find(run, "latest"), "checkpoint").meta)


def restore(
    run: Path,
    model: Recommender,
    optimizer: torch.optim.Optimizer,
    tables: DistributedTables,
    averages: Averages | None = None,
) -> Position:
    """Load the latest checkpoint into what is trained, and return its position."""
    directory = _find(run, "latest")
    meta = read_manifest(directory, "checkpoint").meta
    model.load_state_dict(_load(directory / "model.safetensors"))
    restore_optimizer(model, optimizer, _load(directory / "optimizer.safetensors"))
    read_tables(directory, meta["tables"], tables)
    if averages is not None:
        for name, value in _load(directory / AVERAGES_FILE).items():
            averages.dense[name].copy_(value)
    raw = dict(meta["position"])
    raw["past"] = tuple(Progress(**past) for past in raw["past"])
    return Position(**raw)


def read_config(run: Path) -> Config:
    """Return the configuration that a run was trained with."""
    file = Path(run) / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{run}: no run here ({CONFIG_FILE} is missing); train first: hvdrec train")
    try:
        return from_stored(json.loads(file.read_text()))
    except (json.JSONDecodeError, UserError) as error:
        raise UserError(f"{file}: {error}; train again") from None


def load_model(run: Path, config: Config, which: Which = "best") -> tuple[Recommender, str]:
    """Return the model of a run's best (or latest) checkpoint, on the CPU, and its name."""
    directory = _find(Path(run), which)
    meta = read_manifest(directory, "checkpoint").meta
    fitted = Fitted.load(config.paths.of("features"))
    model = build_model(config, fitted.sizes, with_tables=True)
    read_into_model(directory, meta["tables"], model.tables)
    load_dense(model, directory, config)
    return model.eval(), directory.name


def load_model_and_tables(
    run: Path, config: Config, which: Which, device: torch.device
) -> tuple[Recommender, DistributedTables, str]:
    """Return a model without tables, its tables over the ranks, and the checkpoint's name.

    Where `load_model` would need more memory than a rank has. Every rank must call this.
    """
    directory = ranks.run_on_all(lambda: _find(Path(run), which))
    meta = ranks.run_on_all(lambda: read_manifest(directory, "checkpoint").meta)
    fitted = ranks.run_on_all(lambda: Fitted.load(config.paths.of("features")))
    model = build_model(config, fitted.sizes, with_tables=False)
    # Looking at rows needs no state beside them.
    plain = replace(config, train=replace(config.train, embedding_optimizer="sgd"))
    tables = ranks.run_on_all(
        lambda: make_tables(plain, fitted.sizes, ranks.current(), device, kernels={}, is_new=False)
    )

    def fill() -> None:
        read_tables(directory, meta["tables"], tables, served=True)
        load_dense(model, directory, config)

    ranks.run_on_all(fill)
    return model.to(device).eval(), tables, directory.name


def load_dense(model: Recommender, directory: Path, config: Config) -> None:
    """Fill a model's dense weights from a checkpoint: their averages, if there are any."""
    file = directory / AVERAGES_FILE
    file = file if file.is_file() else directory / "model.safetensors"
    tables = {n: v for n, v in model.state_dict().items() if n.startswith("tables.")}
    try:
        model.load_state_dict({**_load(file), **tables})
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{directory}: does not fit {config.paths.of('features')} ({first}); "
            "train again after hvdrec prepare"
        ) from None


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
