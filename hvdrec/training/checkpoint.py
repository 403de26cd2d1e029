"""Save and load checkpoints: directories of safetensors and JSON files, written atomically.

The directory of a run holds ``checkpoints/step-NNNNNNNN/`` for each checkpoint, with
``model.safetensors``, ``optimizer.safetensors``, the files of `embeddings.files`, and
``manifest.json``, which also says how far training has come. The text files ``latest`` and ``best``
of the run each name one checkpoint. ``config.json`` and ``log.jsonl`` are beside these two files.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

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
from hvdrec.errors import invalid_file
from hvdrec.features.fit import Fitted
from hvdrec.models.recommender import Recommender
from hvdrec.parallel import ranks
from hvdrec.parallel.progress import print_line
from hvdrec.storage.artifacts import (
    MADE_FROM,
    StoredFiles,
    file_facts,
    write_artifact,
)
from hvdrec.storage.checksums import unsealed
from hvdrec.storage.lineage import require_source
from hvdrec.storage.urls import Location
from hvdrec.training.build import build_model
from hvdrec.training.optimizer import optimizer_tensors, restore_optimizer
from hvdrec.training.pointers import (
    FOLDER,
    Checkpoint,
    Which,
    checkpoint_name,
    find_checkpoint,
    remove_old,
    write_pointer,
)
from hvdrec.training.state import TrainState

CONFIG_FILE = "config.json"
MODEL_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.safetensors"
AVERAGES_FILE = "averages.safetensors"


@dataclass(frozen=True)
class Position:
    """How far training has come.

    Attributes:
        epoch: The current epoch, from 0.
        past: The parts of this epoch that have been read, each with the number of ranks that read
            it and their batch size.
        step: Number of optimizer steps so far.
        best: Best value of the validation metric; None before the first validation.
        best_step: Step at which `best` was reached.
        stale: Number of validations without improvement since `best_step`.
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
    """Write a checkpoint and remove old ones.

    The file ``latest`` then names the new checkpoint. If its validation metric is the best so far,
    the file ``best`` names it, too.

    All ranks must call this at the same time, since each writes its part of sharded tables.

    Args:
        run: Directory of the run.
        position: How far training has come.
        state: The model, its tables and their optimizers.
        metrics: Validation metrics at this position; empty in the middle of an epoch.

    Raises:
        UserError: A rank cannot write. The error is raised on all ranks, and there is no new
            checkpoint.
    """
    name = checkpoint_name(position.step)
    meta = {
        "position": asdict(position),
        "metrics": metrics,
        "tables": table_meta(state.tables),
        "config": to_dict(state.config),
        MADE_FROM: {"features": state.features} if state.features else {},
    }
    known: dict[str, Any] = {}
    is_first = ranks.current().is_first
    with ExitStack() as stack:
        draft: Path | None = None
        if is_first:
            path = run / FOLDER / name
            draft = stack.enter_context(
                write_artifact(path, "checkpoint", meta, overwrite=True, known=known)
            )
        folder = Path(ranks.broadcast_object(str(draft)))
        written = ranks.run_on_all(lambda: _write(folder, state, is_first=is_first))
        for facts in ranks.gather_objects(written):
            known.update(facts)
    if is_first:
        if position.best is not None and position.best_step == position.step:
            write_pointer(run, "best", name)
        write_pointer(run, "latest", name)
        remove_old(run, state.config.train.keep)
    ranks.barrier()


def _write(folder: Path, state: TrainState, *, is_first: bool) -> dict[str, Any]:
    """Write this rank's files; return file name -> `file_facts`, computed on the same rank."""
    dense = {}
    if is_first:
        dense = {
            MODEL_FILE: state.model.state_dict(),
            OPTIMIZER_FILE: optimizer_tensors(state.model, state.optimizer),
        }
        if state.averages is not None:
            dense[AVERAGES_FILE] = state.averages.dense
    try:
        written = write_tables(folder, state.tables)
        for name, tensors in dense.items():
            written.append(folder / name)
            _save(tensors, written[-1])
        return {file.name: file_facts(file) for file in written}
    except (OSError, SafetensorError) as error:
        raise invalid_file(
            folder.parent,
            f"cannot write a checkpoint ({error})",
            "free space or fix permissions, then rerun with --resume: the checkpoint before is "
            "complete",
        ) from None


def restore(run: Path, state: TrainState) -> Position:
    """Load the latest checkpoint into `state`; return how far training had come."""
    checkpoint = find_checkpoint(run, "latest")
    files, meta = checkpoint.files, checkpoint.manifest.meta
    state.model.load_state_dict(load_tensors(files.verified(MODEL_FILE)))
    restore_optimizer(state.model, state.optimizer, load_tensors(files.verified(OPTIMIZER_FILE)))
    read_tables(files, meta["tables"], state.tables)
    if state.averages is not None:
        for name, value in load_tensors(files.verified(AVERAGES_FILE)).items():
            state.averages.dense[name].copy_(value)
    raw = dict(meta["position"])
    raw["past"] = tuple(Progress(**past) for past in raw["past"])
    return Position(**raw)


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
        return from_stored(unsealed(file.read_bytes()))
    except ValueError as error:  # includes UserError
        raise invalid_file(file, str(error), "train again with --overwrite") from None


def require_features(checkpoint: Checkpoint, features: Location) -> None:
    """Check that a checkpoint was trained on exactly the features at a location.

    Raises:
        UserError: The location holds other features.
    """
    remedy = (
        "train again with --overwrite, or restore the features it was trained on; features that "
        "went on from those need a new run, by hvdrec train with --from"
    )
    directory, manifest = checkpoint.directory, checkpoint.manifest
    if not require_source(directory, manifest, features, "features", remedy):
        print_line(f"{directory}: does not record its features, so they are not compared")


def load_model(run: Path, config: Config, which: Which = "best") -> tuple[Recommender, Checkpoint]:
    """Load the model of a run, with all its embedding tables, on the CPU.

    Returns:
        The model in evaluation mode, and the checkpoint that it was loaded from.

    Raises:
        UserError: The checkpoint is damaged, or was trained on other features.
    """
    checkpoint = find_checkpoint(Path(run), which)
    require_features(checkpoint, config.paths.of("features"))
    model = build_model(config, Fitted.load(config.paths.of("features")).sizes, with_tables=True)
    read_into_model(checkpoint.files, checkpoint.manifest.meta["tables"], model.tables)
    _load_dense(model, checkpoint.files, config)
    return model.eval(), checkpoint


def load_model_and_tables(
    run: Path, config: Config, which: Which, device: torch.device
) -> tuple[Recommender, DistributedTables, Checkpoint]:
    """Load the model of a run with its embedding tables distributed over the ranks.

    No rank needs memory for all tables. All ranks must call this at the same time.

    Returns:
        The model in evaluation mode, its tables, and the checkpoint that they were loaded from.

    Raises:
        UserError: The checkpoint is damaged, or was trained on other features.
    """
    checkpoint = ranks.run_on_all(lambda: find_checkpoint(Path(run), which))
    ranks.run_on_all(lambda: require_features(checkpoint, config.paths.of("features")))
    files, meta = checkpoint.files, checkpoint.manifest.meta
    sizes = ranks.run_on_all(lambda: Fitted.load(config.paths.of("features")).sizes)
    model = build_model(config, sizes, with_tables=False)
    # Evaluation needs no optimizer state. Choose SGD, which has none that could be loaded.
    stateless = replace(config, train=replace(config.train, embedding_optimizer="sgd"))
    tables = ranks.run_on_all(
        lambda: make_tables(stateless, sizes, ranks.current(), device, kernels={}, is_new=False)
    )
    ranks.run_on_all(lambda: read_tables(files, meta["tables"], tables, served=True))
    ranks.run_on_all(lambda: _load_dense(model, files, config))
    return model.to(device).eval(), tables, checkpoint


def _load_dense(model: Recommender, files: StoredFiles, config: Config) -> None:
    """Load the dense weights of a model, or their moving averages if the run has them."""
    file = files.verified(AVERAGES_FILE if AVERAGES_FILE in files else MODEL_FILE)
    tables = {n: v for n, v in model.state_dict().items() if n.startswith("tables.")}
    try:
        model.load_state_dict({**load_tensors(file), **tables})
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise invalid_file(
            files.directory,
            f"does not fit {config.paths.of('features')} ({first})",
            "train again after hvdrec prepare",
        ) from None


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a file; raise UserError if it is damaged."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise invalid_file(file, f"cannot be read ({error})", "use another checkpoint") from None


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, file)
