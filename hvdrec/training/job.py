"""Set up a training job: check it, then build everything that the loop needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hvdrec.config import Config
from hvdrec.config.structure import to_dict
from hvdrec.data.loader import ShardLoader
from hvdrec.embeddings.setup import make_tables
from hvdrec.embeddings.sharded import DistributedTables
from hvdrec.features.fit import Fitted
from hvdrec.models.cpu_layers import use_cpu_layers
from hvdrec.models.recommender import Recommender
from hvdrec.parallel import checks, ranks
from hvdrec.parallel.gradients import broadcast_state, check_synchronization
from hvdrec.parallel.ranks import World
from hvdrec.training import checkpoint
from hvdrec.training.average import Averages
from hvdrec.training.build import build_model
from hvdrec.training.cpu_probe import choose_cpu_layers
from hvdrec.training.inputs import (
    check_codes,
    load_negatives,
    load_teacher,
    log_probability_of_items,
)
from hvdrec.training.machine import pick_device, set_threads
from hvdrec.training.optimizer import make_optimizer
from hvdrec.training.pipeline import NegativeSampler
from hvdrec.training.pointers import latest_meta
from hvdrec.training.run_directory import check_features, check_run, create_run_directory
from hvdrec.training.state import TrainState
from hvdrec.training.warm_start import check_size, warm_start


@dataclass(frozen=True)
class TrainJob:
    """Everything that stays the same during training.

    Attributes:
        config: The run, with the choice of CPU layers that was made.
        world: This rank's position in the job.
        device: Where this rank computes.
        run: Directory of the run.
        loader: Reads the training split.
        negatives: Draws negatives from the catalogue; None if there are none.
        state: The model and its optimizers.
        start: Where training starts or resumes.
        probe: Median milliseconds of each choice of CPU layers; empty if there was no probe.
    """

    config: Config
    world: World
    device: torch.device
    run: Path
    loader: ShardLoader
    negatives: NegativeSampler | None
    state: TrainState
    start: checkpoint.Position
    probe: dict[str, float]


def set_up(config: Config, world: World, *, resume: bool, overwrite: bool) -> TrainJob:
    """Check a job and build what it needs; every rank must call this together.

    Raises:
        UserError: See `training.trainer.train`; nothing is written.
    """
    run = config.paths.of("run")
    features, is_resumed = _check(config, world, resume=resume, overwrite=overwrite)
    set_threads(config.train.threads, world)
    device = ranks.run_on_all(lambda: pick_device(config.train.device, world))
    ranks.run_on_all(lambda: check_synchronization(config.parallel.synchronization, world, device))
    loader, sizes = _open_shards(config, world)
    stored = ranks.run_on_all(lambda: latest_meta(run)) if is_resumed else None
    tables = _place_tables(config, sizes, world, device, stored)
    teacher = ranks.run_on_all(lambda: load_teacher(config, device))
    if config.train.warm_start.history:
        ranks.run_on_all(lambda: check_size(config, sizes[config.schema.item_key]))
    model, config, probe = _build_model(config, sizes, device, loader.batch_size, stored)
    replaces = overwrite and not is_resumed
    ranks.run_on_all(lambda: create_run_directory(run, config, world, overwrite=replaces))
    if config.train.warm_start.history and not is_resumed:
        warm_start(config, sizes[config.schema.item_key], model, tables)
    broadcast_state(dict(model.state_dict()))
    state = _make_state(config, model.to(device), tables, teacher, features)
    start = checkpoint.Position()
    if is_resumed:
        start = ranks.run_on_all(lambda: checkpoint.restore(run, state))
    negatives = load_negatives(config)
    return TrainJob(config, world, device, run, loader, negatives, state, start, probe)


def _check(config: Config, world: World, *, resume: bool, overwrite: bool) -> tuple[str, bool]:
    """Check configuration, features and run directory.

    Returns:
        The identity of the features, and True if a run is resumed.
    """
    run, features = config.paths.of("run"), config.paths.of("features")
    checks.require_same_config(to_dict(config))
    identity = ranks.run_on_all(lambda: check_features(config)).identity
    checks.require_same_files(
        features, "copy the same features to all of them, or share the directory"
    )
    is_resumed = ranks.run_on_all(
        lambda: world.is_first and check_run(config, run, resume=resume, overwrite=overwrite)
    )
    is_resumed = bool(ranks.broadcast_object(is_resumed))
    if is_resumed:
        reason = "a run is resumed where every rank sees its checkpoints"
        checks.require_shared_directory(run, reason)
    return identity, is_resumed


def _open_shards(config: Config, world: World) -> tuple[ShardLoader, dict[str, int]]:
    """Open the training split and return it with the sizes of the tables."""
    rows = math.ceil(config.train.batch_size / world.size)
    loader = ranks.run_on_all(
        lambda: ShardLoader.from_config(config, "train", rows, world.rank, world.size, shuffle=True)
    )
    sizes = ranks.run_on_all(lambda: Fitted.load(config.paths.of("features")).sizes)
    ranks.run_on_all(lambda: check_codes(loader, config.schema, sizes))
    return loader, sizes


def _place_tables(
    config: Config,
    sizes: dict[str, int],
    world: World,
    device: torch.device,
    stored: dict[str, Any] | None,
) -> DistributedTables:
    """Create the tables; those of a resumed run keep their kernels."""
    kernels = {} if stored is None else stored["tables"]["kernels"]
    kernels = {int(width): name for width, name in kernels.items()}
    tables = ranks.run_on_all(
        lambda: make_tables(config, sizes, world, device, kernels=kernels, is_new=stored is None)
    )
    if any(group.is_sharded for group in tables.groups):
        reason = "every rank writes its part of sharded tables there"
        checks.require_shared_directory(config.paths.of("run"), reason)
    return tables


def _build_model(
    config: Config,
    sizes: dict[str, int],
    device: torch.device,
    batch_size: int,
    stored: dict[str, Any] | None,
) -> tuple[Recommender, Config, dict[str, float]]:
    """Build the model and choose its CPU layers.

    Returns:
        The model, the configuration that records the choice, and the timings of the probe.
    """
    torch.manual_seed(config.seed)
    model = build_model(config, sizes, with_tables=False)
    rows = math.ceil(batch_size / config.train.accumulate)
    choice, probe = choose_cpu_layers(model, config.train, rows, device, stored)
    use_cpu_layers(model, choice)
    return model, replace(config, train=replace(config.train, cpu_layers=choice)), probe


def _make_state(
    config: Config,
    model: Recommender,
    tables: DistributedTables,
    teacher: Recommender | None,
    features: str,
) -> TrainState:
    """Create the optimizer and the averages next to the weights, on their device."""
    train = config.train
    averages = None
    if train.average_decay:
        averages = Averages(model, tables, train.average_decay, train.average_steps)
    return TrainState(
        config,
        model,
        tables,
        make_optimizer(model, train),
        log_probability_of_items(config, tables.device),
        teacher,
        averages,
        features,
    )
