"""Set up a training job: check its inputs, then build everything that the training loop needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hvdrec.config import Config
from hvdrec.config.sections import Train
from hvdrec.config.structure import from_dict, to_dict
from hvdrec.data.loader import ShardLoader
from hvdrec.embeddings.setup import make_tables
from hvdrec.embeddings.sharded import DistributedTables
from hvdrec.evaluation.events import Events
from hvdrec.evaluation.references import LabelFacts, Reference
from hvdrec.features.fit import Fitted
from hvdrec.models.recommender import Recommender
from hvdrec.parallel import checks, ranks
from hvdrec.parallel.gradients import broadcast_state, check_synchronization
from hvdrec.parallel.ranks import World
from hvdrec.storage.artifacts import Manifest, read_manifest
from hvdrec.training import checkpoint
from hvdrec.training.average import Averages
from hvdrec.training.build import build_model
from hvdrec.training.defaults import with_defaults
from hvdrec.training.inputs import (
    check_codes,
    load_negatives,
    load_teacher,
    log_probability_of_items,
)
from hvdrec.training.labels import (
    read_label_facts,
    start_at_base_rate,
    with_defined_metric,
    with_popularity_by_event,
)
from hvdrec.training.machine import has_bf16, pick_device, set_threads
from hvdrec.training.optimizer import make_optimizer
from hvdrec.training.pipeline import NegativeSampler
from hvdrec.training.pointers import latest_meta
from hvdrec.training.resume import continued
from hvdrec.training.run_directory import check_features, check_run, create_run_directory
from hvdrec.training.start_from import Origin, find_origin, start_from
from hvdrec.training.state import TrainState
from hvdrec.training.trackers import check_trackers
from hvdrec.training.warm_start import check_size, warm_start


@dataclass(frozen=True)
class TrainJob:
    """The objects that the training loop uses from beginning to end.

    Attributes:
        config: Configuration of the run, with chosen values for the settings that it left open.
        world: Number of this rank, and number of all ranks.
        device: Device on which this rank computes.
        run: Directory of the run.
        loader: Reads the training split.
        negatives: Draws negatives from all items; None if ``train.uniform_negatives`` is 0.
        state: The model, its tables and their optimizers.
        start: Position at which training starts or resumes.
        references: Metrics of the baselines on the validation split.
        events: Validation events on which retrieval is compared with popularity; None without.
        notes: Lines to show to the user.
        is_trained: True if the initial weights are already trained; they are then validated before
            the first epoch.
    """

    config: Config
    world: World
    device: torch.device
    run: Path
    loader: ShardLoader
    negatives: NegativeSampler | None
    state: TrainState
    start: checkpoint.Position
    references: tuple[Reference, ...]
    events: Events | None
    notes: tuple[str, ...]
    is_trained: bool


def set_up(
    config: Config, world: World, *, resume: bool, overwrite: bool, earlier: Path | None = None
) -> TrainJob:
    """Check a job and build what it needs; all ranks must call this at the same time.

    `earlier` is the run from which a new run starts; None to start from initial values.

    Raises:
        UserError: For the reasons listed in `training.trainer.train`. Nothing has been written.
    """
    run = config.paths.of("run")
    features, is_resumed = _check(config, world, resume=resume, overwrite=overwrite)
    origin = _find_origin(earlier, config, features) if not is_resumed else None
    set_threads(config.train.threads, world)
    device = ranks.run_on_all(lambda: pick_device(config.train.device, world))
    ranks.run_on_all(lambda: check_synchronization(config.parallel.synchronization, world, device))
    stored = ranks.run_on_all(lambda: latest_meta(run)) if is_resumed else None
    recorded = stored if origin is None else dict(origin.checkpoint.manifest.meta)
    config, facts, events, notes = _fill_in(config, device, recorded)
    loader, fitted = _open_shards(config, world)
    sizes = fitted.sizes
    tables = _place_tables(config, sizes, world, device, recorded, is_new=not is_resumed)
    teacher = ranks.run_on_all(lambda: load_teacher(config, device))
    is_warm = bool(config.train.warm_start.history) and not is_resumed and origin is None
    if is_warm:
        ranks.run_on_all(lambda: check_size(config, sizes[config.schema.item_key]))
    torch.manual_seed(config.seed)
    model = build_model(config, sizes, with_tables=False)
    start_at_base_rate(model, facts.rates)
    replaces = overwrite and not is_resumed
    ranks.run_on_all(lambda: create_run_directory(run, config, world, overwrite=replaces))
    if is_warm:
        warm_start(config, sizes[config.schema.item_key], model, tables)
    broadcast_state(dict(model.state_dict()))
    state = _make_state(config, model.to(device), tables, teacher, features.identity)
    start = checkpoint.Position()
    if origin is not None:
        start = ranks.run_on_all(lambda: start_from(origin, state, fitted))
        notes.append(f"starting from {origin.checkpoint.directory}, step {start.step}")
    if stored is not None:
        start = ranks.run_on_all(lambda: checkpoint.restore(run, state))
        start, note = continued(start, stored["config"]["train"], config.train)
        notes += [note] if note else []
    negatives = load_negatives(config)
    references = tuple(facts.references)
    is_trained = origin is not None or bool(config.train.warm_start.history)
    return TrainJob(
        config,
        world,
        device,
        run,
        loader,
        negatives,
        state,
        start,
        references,
        events,
        tuple(notes),
        is_trained,
    )


def _check(config: Config, world: World, *, resume: bool, overwrite: bool) -> tuple[Manifest, bool]:
    """Check the configuration, the features and the run directory.

    Returns:
        The manifest of the features; and True if training resumes an earlier run.
    """
    run, features = config.paths.of("run"), config.paths.of("features")
    ranks.run_on_all(lambda: check_trackers(config.train.trackers))
    checks.require_same_config(to_dict(config))
    manifest = ranks.run_on_all(lambda: check_features(config))
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
    return manifest, is_resumed


def _find_origin(earlier: Path | None, config: Config, features: Manifest) -> Origin | None:
    if earlier is None:
        return None
    origin = ranks.run_on_all(lambda: find_origin(earlier, config, features))
    checks.require_same_files(origin.checkpoint.directory, "start from the same run everywhere")
    return origin


def _fill_in(
    config: Config, device: torch.device, before: dict[str, Any] | None
) -> tuple[Config, LabelFacts, Events | None, list[str]]:
    """Choose the settings that the configuration leaves open.

    All ranks must call this at the same time.

    Returns:
        The complete configuration; facts about the labels; the events on which retrieval is
        compared with popularity, if it is; and lines to show to the user.
    """
    features = config.paths.of("features")
    recorded = None if before is None else before["config"]["train"]
    rows = ranks.run_on_all(lambda: read_manifest(features, "features").meta["rows"]["train"])
    # Ranks on different CPUs would choose different values, so all use those of the first rank.
    chosen = ranks.broadcast_object(to_dict(with_defaults(config.train, rows, device, recorded)))
    config = replace(config, train=from_dict(Train, chosen))
    config, facts, notes = with_defined_metric(config, read_label_facts(config))
    facts, by_event, reasons = with_popularity_by_event(config, facts)
    notes += reasons
    if config.train.precision == "bf16" and not has_bf16(device):
        notes.append(
            "train.precision = 'bf16': this CPU has no bf16 instructions and will be many times "
            "slower than with 'fp32' or 'auto'"
        )
    return config, facts, None if by_event is None else by_event.events, notes


def _open_shards(config: Config, world: World) -> tuple[ShardLoader, Fitted]:
    """Open the training split and the fitted features."""
    rows = math.ceil(config.train.batch_size / world.size)
    loader = ranks.run_on_all(
        lambda: ShardLoader.from_config(config, "train", rows, world.rank, world.size, shuffle=True)
    )
    fitted = ranks.run_on_all(lambda: Fitted.load(config.paths.of("features")))
    ranks.run_on_all(lambda: check_codes(loader, config.schema, fitted.sizes))
    return loader, fitted


def _place_tables(
    config: Config,
    sizes: dict[str, int],
    world: World,
    device: torch.device,
    recorded: dict[str, Any] | None,
    *,
    is_new: bool,
) -> DistributedTables:
    """Create the embedding tables, with the kernels (PyTorch or FBGEMM) of a checkpoint, if any."""
    kernels = {} if recorded is None else recorded["tables"]["kernels"]
    kernels = {int(width): name for width, name in kernels.items()}
    tables = ranks.run_on_all(
        lambda: make_tables(config, sizes, world, device, kernels=kernels, is_new=is_new)
    )
    if any(group.is_sharded for group in tables.groups):
        reason = "every rank writes its part of sharded tables there"
        checks.require_shared_directory(config.paths.of("run"), reason)
    return tables


def _make_state(
    config: Config,
    model: Recommender,
    tables: DistributedTables,
    teacher: Recommender | None,
    features: str,
) -> TrainState:
    """Create the optimizer and the moving averages, on the same device as the weights."""
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
