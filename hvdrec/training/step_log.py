"""Write the log lines of a training run: its start, and the mean losses and speed of its steps."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from hvdrec.data.loader import ShardLoader
from hvdrec.parallel import ranks
from hvdrec.parallel.gradients import global_sum
from hvdrec.training.checkpoint import Position
from hvdrec.training.divergence import check_loss
from hvdrec.training.job import TrainJob
from hvdrec.training.labels import metric_name
from hvdrec.training.log import TrainingLog
from hvdrec.training.objective import StepLoss


@dataclass
class StepSums:
    """Sums over the steps between two log lines.

    ``losses`` is this rank's share of the total loss, the ranking loss, the retrieval loss and the
    loss of each task, float32 [3 + tasks].
    """

    losses: Tensor
    loader: ShardLoader
    steps: int = 0
    rows: int = 0
    started: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        self.started = self._clocks()

    def add(self, loss: StepLoss, rows: int) -> None:
        """Add a step in which all ranks together read `rows` rows."""
        self.losses[:3] += torch.stack([loss.total, loss.ranking, loss.retrieval])
        self.losses[3:] += loss.tasks
        self.steps += 1
        self.rows += rows

    def reset(self) -> None:
        """Start the next interval."""
        self.losses.zero_()
        self.steps = self.rows = 0
        self.started = self._clocks()

    def speed(self) -> dict[str, Any]:
        """Return the rows per second of all ranks, and shares of the time of this rank.

        ``reading`` is the share in which this rank waits for batches. ``exchanging`` is the share
        in which it waits for messages from other ranks. ``computing`` is the rest.
        """
        elapsed, *waits = (
            now - then for now, then in zip(self._clocks(), self.started, strict=True)
        )
        reading, exchanging = (round(wait / elapsed, 4) for wait in waits)
        shares = {"reading": reading, "exchanging": exchanging}
        return {
            "rows_per_second": round(self.rows / elapsed),
            "time_shares": {**shares, "computing": round(1 - reading - exchanging, 4)},
        }

    def _clocks(self) -> tuple[float, float, float]:
        return time.perf_counter(), self.loader.waited_seconds, ranks.waited_seconds()


def rows_done(job: TrainJob, position: Position) -> int:
    """Return the number of rows of the current epoch that were read before an interruption."""
    return min(job.loader.rows, sum(p.world_size * p.batch_size * p.steps for p in position.past))


def log_start(job: TrainJob, log: TrainingLog) -> None:
    """Log the event ``start``, which describes the model and its data, and the notes of the job."""
    tables, model, train = job.state.tables, job.state.model, job.config.train
    embedded = sum(rows * group.width for group in tables.groups for rows in group.sizes.values())
    total_steps = job.start.step
    if not job.start.finished:
        rows, step_rows = job.loader.rows, job.loader.batch_size * job.world.size
        total_steps += math.ceil((rows - rows_done(job, job.start)) / step_rows)
        total_steps += (train.epochs - job.start.epoch - 1) * math.ceil(rows / step_rows)
    log.write(
        "start",
        name=job.config.name,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        epochs=train.epochs,
        total_steps=total_steps,
        world_size=job.world.size,
        device=str(job.device),
        batch_size=train.batch_size,
        warmup_steps=train.warmup_steps,
        patience=train.patience,
        metric=metric_name(job.config),
        precision=train.precision,
        cpu_layers=train.cpu_layers,
        rows=job.loader.rows,
        parameters=sum(parameter.numel() for parameter in model.parameters()) + embedded,
        tables={
            group.name: {
                "tables": list(group.sizes),
                "rows": group.local_rows,
                "kernel": kernel.name,
            }
            for group, kernel in zip(tables.groups, tables.kernels, strict=True)
        },
        step=job.start.step,
    )
    for note in job.notes:
        log.note(note)


def log_step(
    job: TrainJob, log: TrainingLog, sums: StepSums, position: Position, progress: float
) -> None:
    """Log the mean losses over all ranks since the last log line.

    All ranks must call this at the same time.
    """
    total, ranking, retrieval, *tasks = (global_sum(sums.losses) / sums.steps).tolist()
    names = [task.name for task in job.config.tasks]
    log.write(
        "step",
        step=position.step,
        epoch=position.epoch + 1,
        progress=round(progress, 6),
        loss=total,
        ranking_loss=ranking,
        retrieval_loss=retrieval,
        **({"task_losses": dict(zip(names, tasks, strict=True))} if names else {}),
        learning_rate=job.state.optimizer.param_groups[0]["lr"],
        **sums.speed(),
        reader_wait=round(job.loader.waited_seconds, 3),
        table_bytes_sent=job.state.tables.sent_bytes,
    )
    sums.reset()
    check_loss(job.config.train, position.step, total)
