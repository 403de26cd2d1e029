"""Train a model: set up the job, then loop over epochs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hvdrec.config import Config
from hvdrec.data.sampler import Progress
from hvdrec.evaluation.evaluate import embed_side, validation_metric
from hvdrec.evaluation.references import describe_worse, worse_than
from hvdrec.evaluation.titles import item_titles
from hvdrec.parallel import ranks
from hvdrec.parallel.gradients import global_sum
from hvdrec.parallel.watchdog import watched
from hvdrec.training import checkpoint
from hvdrec.training.checkpoint import Position
from hvdrec.training.display import Display, LogFormat, Silent, make_display
from hvdrec.training.divergence import check_loss, check_weights
from hvdrec.training.job import TrainJob, set_up
from hvdrec.training.labels import metric_name
from hvdrec.training.log import TrainingLog
from hvdrec.training.machine import no_gc_pauses
from hvdrec.training.pipeline import Prepared, make_preparer, steps
from hvdrec.training.pointers import find_checkpoint
from hvdrec.training.profiler import record_steps
from hvdrec.training.step import take_step
from hvdrec.training.step_log import StepSums, log_start, log_step, rows_done
from hvdrec.training.trackers import Trained, open_trackers

Stop = Callable[[int, float], bool]
"""Function that is given the epoch, from 0, and the validation metric, and returns True to stop
training. It must return the same value on every rank."""


PROJECTED_ITEMS = 20_000
"""Trackers record the item vectors only if the catalogue has at most this number of items."""


@dataclass(frozen=True)
class TrainResult:
    """The result of `train`.

    Attributes:
        run: Directory of the run.
        steps: Number of optimizer steps since the start of training.
        epochs: Number of epochs since the start of training.
        world_size: Number of ranks.
        metric: Name of the validation metric.
        best: Best value of this metric; None if there was no validation.
        best_step: Step at which `best` was reached.
        worse_than: The simple baselines that are better than the best checkpoint on the validation
            split; see `evaluation.references.worse_than`.
    """

    run: str
    steps: int
    epochs: int
    world_size: int
    metric: str
    best: float | None
    best_step: int
    worse_than: Sequence[Mapping[str, Any]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return {
            "run": self.run,
            "steps": self.steps,
            "epochs": self.epochs,
            "world_size": self.world_size,
            "validation": {self.metric: self.best, "step": self.best_step},
            "worse_than": [dict(each) for each in self.worse_than],
        }


def train(
    config: Config,
    *,
    start_from: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    log_format: LogFormat = "text",
    profile: Path | None = None,
    stop: Stop | None = None,
) -> TrainResult:
    """Train a model on the encoded shards.

    Call it in one process, or on every rank of a Horovod job. It reads ``paths.features`` and
    writes checkpoints, ``config.json`` and ``log.jsonl`` to ``paths.run``. If one rank of a job
    fails, all ranks end, with one line that names the failed rank.

    Args:
        config: Configuration of the run.
        start_from: Directory of an earlier run, whose best checkpoint this run starts from. The
            features of this run must be the same as those of the earlier run, or made from them by
            `prepare` with ``start_from``. If this run is resumed, it goes on from its own
            checkpoint instead.
        resume: Continue from the latest checkpoint, if there is one.
        overwrite: Remove an earlier run first.
        progress: Show progress on standard error of the first rank: a bar on a terminal, else lines
            of text.
        log_format: "json" to show the lines of ``log.jsonl`` instead.
        profile: Directory to which every rank writes a trace of some steps; see `record_steps`.
        stop: Called after each validation; if it returns True, training ends.

    Returns:
        The result, the same on every rank.

    Raises:
        UserError: The features are missing or do not match the configuration; ``paths.run`` holds
            another run; or the hosts differ in version, configuration or features. In all these
            cases, nothing has been written.
    """
    world = ranks.init()
    with watched():
        earlier = None if start_from is None else Path(start_from)
        job = set_up(config, world, resume=resume, overwrite=overwrite, earlier=earlier)
        with _open_log(job, make_display(log_format) if progress else Silent()) as log:
            log_start(job, log)
            with no_gc_pauses(), record_steps(profile, world, job.device) as after_step:
                end = _fit(job, log, stop, after_step)
            if job.config.train.trackers:
                log.finish(_trained(job, end.step))
            worse = _worse_than(job)
            if worse:
                log.note(f"the best checkpoint is worse on validation than {describe_worse(worse)}")
            log.write(
                "end", step=end.step, best=end.best, best_step=end.best_step, worse_than=worse
            )
    metric = metric_name(job.config)
    return TrainResult(
        str(job.run), end.step, end.epoch, world.size, metric, end.best, end.best_step, worse
    )


def _open_log(job: TrainJob, display: Display) -> TrainingLog:
    """Open the log with its trackers; all ranks must call this at the same time."""
    is_first = job.world.is_first
    trackers = ranks.run_on_all(lambda: open_trackers(job.config, job.run) if is_first else [])
    return TrainingLog(job.run, is_first=is_first, display=display, trackers=trackers)


def _fit(
    job: TrainJob, log: TrainingLog, stop: Stop | None, after_step: Callable[[], None]
) -> Position:
    """Train all remaining epochs, with a validation and a checkpoint after each."""
    train, position = job.config.train, job.start
    if job.is_trained and position.best is None:
        metrics, position = _validate(job, log, position, 0)
        position = replace(position, finished=train.epochs == 0)
        _save(job, position, metrics)
    prepare = make_preparer(job.state.tables, job.config, position.step, job.negatives)
    epochs = job.loader.epochs(position.epoch, train.epochs, prepare, position.past)
    with closing(epochs):
        while position.epoch < train.epochs and not position.finished:
            position = _train_epoch(job, log, position, next(epochs), after_step)
            epoch = position.epoch + 1
            metrics, position = _validate(job, log, position, epoch)
            is_last = epoch == train.epochs or position.stale >= train.patience
            if stop is not None and metrics:
                is_last |= stop(position.epoch, float(metrics[metric_name(job.config)]))
            position = replace(position, epoch=epoch, past=(), finished=is_last)
            _save(job, position, metrics)
    return position


def _train_epoch(
    job: TrainJob,
    log: TrainingLog,
    position: Position,
    prepared: Iterator[Prepared],
    after_step: Callable[[], None],
) -> Position:
    """Train on the rest of the current epoch; return the new position."""
    train, loader, world = job.config.train, job.loader, job.world
    rows = loader.batch_size * world.size
    done = rows_done(job, position)
    log.start_epoch(position.epoch + 1, train.epochs, loader.rows, done)
    job.state.model.train()
    sums = StepSums(torch.zeros(3 + len(job.config.tasks), device=job.device), loader)
    step = position.step
    due: Position | None = None
    for number, now in enumerate(steps(prepared, job.state.tables, job.device), start=1):
        # Save only if another step follows. After the last step of an epoch, `_fit` saves a
        # checkpoint that also has the metrics of the validation.
        if due is not None:
            _save(job, due, {})
            due = None
        progress = (position.epoch + done / loader.rows) / train.epochs
        loss = take_step(job.state, now, step, progress)
        step += 1
        done = min(loader.rows, done + rows)
        sums.add(loss, rows)
        log.advance(rows)
        after_step()
        if step % train.log_every == 0:
            log_step(job, log, sums, replace(position, step=step), progress)
        if train.checkpoint_every and step % train.checkpoint_every == 0:
            past = (*position.past, Progress(world.size, loader.batch_size, number))
            _check_losses(job, sums, step)
            due = replace(position, step=step, past=past)
    _check_losses(job, sums, step)
    return replace(position, step=step)


def _check_losses(job: TrainJob, sums: StepSums, step: int) -> None:
    """Raise an error if a loss since the last log line is not finite.

    All ranks must call this at the same time.
    """
    if sums.steps:
        check_loss(job.config.train, step, float(global_sum(sums.losses)[0]) / sums.steps)


def _validate(
    job: TrainJob, log: TrainingLog, position: Position, epoch: int
) -> tuple[dict[str, Any], Position]:
    """Measure the model on the validation split; return the metrics and the new position.

    All ranks use the metrics of the first rank.
    """
    state, name = job.state, metric_name(job.config)
    if name == "none":
        return {}, position
    state.average_ranks()
    state.model.eval()
    with state.averages.swapped_in() if state.averages is not None else nullcontext():
        result = validation_metric(
            state.model, job.config, name, state.tables.fetch_rows, job.events
        )
    value, metrics = ranks.broadcast_object(result)
    metrics["worse_than"] = worse_than(metrics, job.references)
    warmup = job.config.train.warmup_steps
    is_warm = warmup == "auto" or position.step >= warmup
    position = judged(position, value, is_loss=name == "log_loss", counts=is_warm)
    better = position.best_step == position.step and position.best is not None
    log.write("validation", epoch=epoch, step=position.step, better=better, **metrics)
    return metrics, position


def judged(position: Position, value: float, *, is_loss: bool, counts: bool = True) -> Position:
    """Return a position with `best`, `best_step` and `stale` updated after a validation.

    Args:
        position: Position before the validation.
        value: Value of the validation metric; NaN and infinite values are never the best.
        is_loss: True if a smaller value is better.
        counts: False if this validation does not count for early stopping.
    """
    best = position.best
    if math.isfinite(value) and (best is None or (value < best if is_loss else value > best)):
        return replace(position, best=value, best_step=position.step, stale=0)
    return replace(position, stale=position.stale + counts)


def _trained(job: TrainJob, step: int) -> Trained:
    """Collect the data for trackers at the end; all ranks must call this at the same time."""
    state, config = job.state, job.config
    state.model.eval()
    titles: list[str] = []
    vectors = None
    if state.model.output_width:
        titles = ranks.run_on_all(lambda: item_titles(config))
        if len(titles) <= PROJECTED_ITEMS:
            vectors = embed_side(state.model, config, "item", state.tables.fetch_rows)
    weights = {name: each.detach().cpu().numpy() for name, each in state.model.named_parameters()}
    return Trained(step, weights, vectors, titles)


def _worse_than(job: TrainJob) -> list[dict[str, Any]]:
    """Return the simple baselines that the best checkpoint records as better than the model."""

    def read() -> list[dict[str, Any]]:
        if not ranks.current().is_first:
            return []
        found: list[dict[str, Any]] = find_checkpoint(job.run, "best").metrics.get("worse_than", [])
        return found

    worse: list[dict[str, Any]] = ranks.broadcast_object(ranks.run_on_all(read))
    return worse


def _save(job: TrainJob, position: Position, metrics: dict[str, Any]) -> None:
    """Write a checkpoint; all ranks must call this at the same time."""
    job.state.average_ranks()
    check_weights(job.state, position.step)
    checkpoint.save(job.run, position, job.state, metrics)
