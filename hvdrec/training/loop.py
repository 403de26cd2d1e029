"""The training loop."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvdrec.config import Config
from hvdrec.config.schema import Feature
from hvdrec.config.structure import from_dict, to_dict
from hvdrec.data.loader import ShardLoader
from hvdrec.data.sampler import Progress
from hvdrec.embeddings.kernels import KernelName
from hvdrec.embeddings.setup import make_tables
from hvdrec.errors import UserError
from hvdrec.evaluation.evaluate import validation_metric
from hvdrec.features.checks import check_task_labels
from hvdrec.features.fit import Fitted
from hvdrec.parallel import checks, ranks
from hvdrec.parallel.gradients import broadcast_state, check_synchronization, global_sum
from hvdrec.parallel.ranks import World
from hvdrec.parallel.watchdog import watched
from hvdrec.storage.artifacts import read_manifest, write_text
from hvdrec.training import checkpoint
from hvdrec.training.average import Averages
from hvdrec.training.build import build_model
from hvdrec.training.checkpoint import CONFIG_FILE, Position
from hvdrec.training.inputs import (
    check_codes,
    load_catalogue,
    load_teacher,
    log_probability_of_items,
)
from hvdrec.training.log import TrainingLog
from hvdrec.training.machine import collector_spared, pick_device, set_threads
from hvdrec.training.optimizer import make_optimizer
from hvdrec.training.pipeline import Catalogue, Prepared, preparer, steps
from hvdrec.training.step import Trainee, settle, take_step
from hvdrec.training.warm_start import check_size, warm_start


@dataclass
class _Sums:
    """What is added up between two log lines."""

    losses: Tensor
    steps: int = 0
    rows: int = 0
    started: float = 0.0


Stop = Callable[[int, float], bool]
"""(epoch from 0, validation metric) -> whether training ends here; the same on every rank."""


@dataclass(frozen=True)
class _Job:
    """Everything that stays the same during training."""

    config: Config
    world: World
    device: torch.device
    run: Path
    trainee: Trainee
    loader: ShardLoader
    log: TrainingLog
    catalogue: Catalogue | None
    stop: Stop | None = None


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Train a model on the encoded shards and return what the run came to.

    Runs alone or on every rank of a Horovod job alike. Writes the run directory (see
    `checkpoint`); with `resume` it goes on from the latest checkpoint, if there is one, and with
    `overwrite` an earlier run is removed first; `stop` is asked after each validation. Raises
    UserError before anything is written if the
    shards are missing or do not fit, if the directory is taken, or if the hosts of the job have
    other versions, configurations or features.
    """
    world = ranks.init()
    with watched():
        return _train(world, config, resume=resume, overwrite=overwrite, stop=stop)


def _train(
    world: World, config: Config, *, resume: bool, overwrite: bool, stop: Stop | None
) -> dict[str, Any]:
    run, features = config.paths.of("run"), config.paths.of("features")
    checks.require_same_config(to_dict(config))
    ranks.run_on_all(lambda: check_features(config))
    checks.require_same_files(
        features, "copy the same features to all of them, or share the directory"
    )
    resuming = ranks.broadcast_object(
        ranks.run_on_all(
            lambda: world.is_first and _check_run(config, run, resume=resume, overwrite=overwrite)
        )
    )
    if resuming:
        checks.require_shared_directory(
            run, "a run is resumed where every rank sees its checkpoints"
        )
    set_threads(config, world)
    device = ranks.run_on_all(lambda: pick_device(config, world))
    ranks.run_on_all(lambda: check_synchronization(config.parallel.synchronization, world, device))
    rows = math.ceil(config.train.batch_size / world.size)
    loader = ranks.run_on_all(
        lambda: ShardLoader.from_config(config, "train", rows, world.rank, world.size, shuffle=True)
    )
    fitted = ranks.run_on_all(lambda: Fitted.load(features))
    ranks.run_on_all(lambda: check_codes(loader, config, fitted.sizes))
    kernels = ranks.run_on_all(lambda: _kernels_before(run)) if resuming else {}
    tables = ranks.run_on_all(
        lambda: make_tables(
            config, fitted.sizes, world, device, kernels=kernels, is_new=not resuming
        )
    )
    if any(group.is_sharded for group in tables.groups):
        checks.require_shared_directory(run, "every rank writes its part of sharded tables there")
    teacher = ranks.run_on_all(lambda: load_teacher(config, device))
    if config.train.warm_start.history:
        ranks.run_on_all(lambda: check_size(config, fitted.sizes[config.schema.item_key]))
    ranks.run_on_all(lambda: _prepare(world, run, config, overwrite and not resuming))
    torch.manual_seed(config.seed)
    model = build_model(config, fitted.sizes, with_tables=False)
    if config.train.warm_start.history and not resuming:
        warm_start(config, fitted.sizes[config.schema.item_key], model, tables)
    broadcast_state(dict(model.state_dict()))
    # What is made of the weights, and read beside them, must find them on the device.
    model.to(device)
    optimizer = make_optimizer(model, config.train)
    averages = None
    if config.train.average_decay:
        averages = Averages(model, tables, config.train.average_decay, config.train.average_steps)
    position = Position()
    if resuming:
        position = ranks.run_on_all(
            lambda: checkpoint.restore(run, model, optimizer, tables, averages)
        )
    with TrainingLog(run, is_first=world.is_first, rows_per_epoch=loader.rows) as log:
        job = _Job(
            config,
            world,
            device,
            run,
            Trainee(
                config,
                model,
                tables,
                optimizer,
                log_probability_of_items(config, device),
                teacher,
                averages,
            ),
            loader,
            log,
            load_catalogue(config),
            stop,
        )
        log.write(
            "start",
            world_size=world.size,
            device=str(device),
            rows=loader.rows,
            parameters=sum(p.numel() for p in model.parameters())
            + sum(rows * group.width for group in tables.groups for rows in group.sizes.values()),
            tables={
                group.name: {
                    "tables": list(group.sizes),
                    "rows": group.local_rows,
                    "kernel": k.name,
                }
                for group, k in zip(tables.groups, tables.kernels, strict=True)
            },
            step=position.step,
        )
        with collector_spared():
            position = _run_epochs(job, position)
        log.write("end", step=position.step, best=position.best, best_step=position.best_step)
    metric = metric_name(config)
    return {
        "run": str(run),
        "steps": position.step,
        "epochs": position.epoch,
        "world_size": world.size,
        "validation": {metric: position.best, "step": position.best_step},
    }


def metric_name(config: Config) -> str:
    """Return the name of the validation metric that early stopping watches."""
    if config.train.metric != "auto":
        name = config.train.metric
    elif config.tasks:
        name = "task_auc"
    else:
        name = "recall" if config.train.objective == "retrieval" else "auc"
    return f"{name}@{config.evaluate.k[0]}" if name in ("recall", "ndcg") else name


def check_features(config: Config) -> None:
    """Raise UserError unless a configuration's features are there and were encoded by it."""
    features = config.paths.of("features")
    manifest = read_manifest(features, "features")
    # An earlier version may have stored fewer fields of a feature.
    stored = [from_dict(Feature, feature) for feature in manifest.meta["config"]["features"]]
    if stored != list(config.features):
        raise UserError(
            f"{features}: was encoded with other [[features]] than the configuration now has; "
            "run hvdrec prepare again"
        )
    check_task_labels(features, manifest, config.tasks, "hvdrec samples and hvdrec prepare")


def _check_run(config: Config, run: Path, *, resume: bool, overwrite: bool) -> bool:
    """Check the run's directory before anything is written; return whether the run is resumed.

    For the first rank alone: who has looked for a file on a network file system before it was
    written may not see it for a while.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other; give one of them")
    if checkpoint.has_checkpoint(run) and resume:
        _check_same(run, checkpoint.read_config(run), config)
        return True
    if run.exists() and any(run.iterdir()) and not overwrite and not resume:
        raise UserError(
            f"{run}: already holds a run; pass --resume to go on or --overwrite to start anew"
        )
    return False


def _check_same(run: Path, before: Config, now: Config) -> None:
    """Raise UserError if what decides the order of rows or the model is not as it was."""
    for name, old, new in (
        ("seed", before.seed, now.seed),
        ("loader.shuffle_rows", before.loader.shuffle_rows, now.loader.shuffle_rows),
        ("train.objective", before.train.objective, now.train.objective),
        (
            "train.embedding_optimizer",
            before.train.embedding_optimizer,
            now.train.embedding_optimizer,
        ),
        ("model", to_dict(before.model), to_dict(now.model)),
        ("tasks", *([task.name for task in c.tasks] for c in (before, now))),
    ):
        if old != new:
            raise UserError(
                f"{run}: was trained with {name} = {old}, the configuration says {new}; "
                "resume with the former or pass --overwrite to start anew"
            )


def _prepare(world: World, run: Path, config: Config, overwrite: bool) -> None:
    """Let the first rank make the run directory, without what an earlier run left there."""
    if not world.is_first:
        return
    if overwrite and run.exists():
        if not (run / CONFIG_FILE).is_file() and any(run.iterdir()):
            raise UserError(f"{run}: is no run of hvdrec; choose another directory")
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / CONFIG_FILE, json.dumps(to_dict(config), indent=1) + "\n")


def _kernels_before(run: Path) -> dict[int, KernelName]:
    """Return which kernel held which width when a run was interrupted."""
    kernels = checkpoint.latest_meta(run)["tables"]["kernels"]
    return {int(width): name for width, name in kernels.items()}


def _run_epochs(job: _Job, position: Position) -> Position:
    train_config = job.config.train
    if train_config.warm_start.history and position.best is None:
        begun, position = _validate(job, position, 0)
        position = replace(position, finished=train_config.epochs == 0)
        _save(job, position, begun)
    tables, past = job.trainee.tables, position.past
    prepare = preparer(tables, job.config, position.step, job.world.rank, job.catalogue)
    epochs = job.loader.epochs(position.epoch, train_config.epochs, prepare, past)
    with closing(epochs):
        while position.epoch < train_config.epochs and not position.finished:
            position = _run_epoch(job, position, next(epochs))
            epoch = position.epoch + 1
            last = epoch == train_config.epochs
            metrics, position = _validate(job, position, epoch)
            stop = position.stale >= train_config.patience
            if job.stop is not None:
                stop = job.stop(position.epoch, float(metrics[metric_name(job.config)])) or stop
            position = replace(position, epoch=epoch, past=(), finished=last or stop)
            _save(job, position, metrics)
    return position


def _run_epoch(job: _Job, position: Position, prepared: Iterator[Prepared]) -> Position:
    """Train to the end of the epoch under way, on what is left of it."""
    config, loader = job.config.train, job.loader
    batch_size = loader.batch_size
    past = position.past
    done = min(loader.rows, sum(p.world_size * p.batch_size * p.steps for p in past))
    job.log.start_epoch(position.epoch, done)
    job.trainee.model.train()
    losses = torch.zeros(3 + len(job.config.tasks), device=job.device)
    sums = _Sums(losses, started=time.perf_counter())
    step = position.step
    for number, now in enumerate(steps(prepared, job.trainee.tables, job.device), start=1):
        progress = (position.epoch + done / loader.rows) / config.epochs
        loss = take_step(job.trainee, now, step, progress)
        step += 1
        rows = batch_size * job.world.size
        done = min(loader.rows, done + rows)
        sums.losses[:3] += torch.stack([loss.total, loss.ranking, loss.retrieval])
        sums.losses[3:] += loss.tasks
        sums.steps += 1
        sums.rows += rows
        job.log.advance(rows)
        if step % config.log_every == 0:
            _log_step(job, sums, step, progress)
        if config.checkpoint_every and step % config.checkpoint_every == 0:
            here = (*past, Progress(job.world.size, batch_size, number))
            _save(job, replace(position, step=step, past=here), {})
    return replace(position, step=step)


def _log_step(job: _Job, sums: _Sums, step: int, progress: float) -> None:
    """Write the means since the last line, over all ranks, and start new ones."""
    total, ranking, retrieval, *of_tasks = (global_sum(sums.losses) / sums.steps).tolist()
    names = [task.name for task in job.config.tasks]
    now = time.perf_counter()
    job.log.write(
        "step",
        step=step,
        progress=round(progress, 6),
        loss=total,
        ranking_loss=ranking,
        retrieval_loss=retrieval,
        **({"task_losses": dict(zip(names, of_tasks, strict=True))} if names else {}),
        learning_rate=job.trainee.optimizer.param_groups[0]["lr"],
        rows_per_second=round(sums.rows / (now - sums.started)),
        reader_wait=round(job.loader.waited_seconds, 3),
        table_bytes_sent=job.trainee.tables.sent_bytes,
    )
    sums.losses.zero_()
    sums.steps = sums.rows = 0
    sums.started = now


def _validate(job: _Job, position: Position, epoch: int) -> tuple[dict[str, Any], Position]:
    """Evaluate on the validation split; every rank comes to the first rank's verdict."""
    settle(job.trainee)
    job.trainee.model.eval()
    name = metric_name(job.config)
    averages = job.trainee.averages
    with averages.in_place() if averages is not None else nullcontext():
        found = validation_metric(
            job.trainee.model, job.config, name, job.trainee.tables.fetch_rows
        )
    value, metrics = ranks.broadcast_object(found)
    better = position.best is None or (
        value < position.best if name == "log_loss" else value > position.best
    )
    if better:
        position = replace(position, best=value, best_step=position.step, stale=0)
    else:
        position = replace(position, stale=position.stale + 1)
    job.log.write("validation", epoch=epoch, step=position.step, better=better, **metrics)
    return metrics, position


def _save(job: _Job, position: Position, metrics: dict[str, Any]) -> None:
    """Write a checkpoint, all ranks together."""
    settle(job.trainee)
    trainee = job.trainee
    checkpoint.save(
        job.run,
        position,
        trainee.model,
        trainee.optimizer,
        trainee.tables,
        job.config,
        metrics,
        trainee.averages,
    )
