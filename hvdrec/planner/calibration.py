"""Measure on this machine the speeds (`Constants`) from which the planner predicts step times.

A *trial* is a short training run whose steps are timed.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch

from hvdrec.config import Config
from hvdrec.data.batch import Batch
from hvdrec.data.loader import ShardLoader
from hvdrec.embeddings.setup import make_tables
from hvdrec.features.fit import Fitted
from hvdrec.parallel import ranks
from hvdrec.parallel.ranks import World, wait
from hvdrec.planner.cost import Cluster, Constants
from hvdrec.planner.workload import predict
from hvdrec.training.build import build_model
from hvdrec.training.machine import no_gc_pauses, pick_device, set_threads
from hvdrec.training.optimizer import make_optimizer
from hvdrec.training.pipeline import make_preparer, steps
from hvdrec.training.state import TrainState
from hvdrec.training.step import take_step

WARM_UP_STEPS, TRIAL_STEPS, TRIAL_SECONDS = 8, 24, 12.0
"""A trial takes at least TRIAL_STEPS steps after the warm-up. The loader reads a whole row group or
shuffle window at once, so a trial lasts for three such reads or for TRIAL_SECONDS, whichever is
shorter."""
MAX_TRIAL_ROWS = 1_000_000
"""Larger embedding tables are cut to this many rows in a trial, to save memory; the time of a step
does not depend on the size of a table."""
SMALL_MESSAGE, LARGE_MESSAGE = 1 << 10, 1 << 22
MESSAGE_REPEATS = 15


def measure_constants(config: Config) -> Constants:
    """Measure the speed of this machine while all ranks of the job work; takes up to a minute.

    Every rank must call this. A job of one rank sends no messages, so the two constants of messages
    keep their defaults.
    """
    world = ranks.init()
    set_threads(config.train.threads, world)
    device = pick_device(config.train.device, world)
    sizes = Fitted.load(config.paths.of("features")).sizes
    small = {name: min(size, MAX_TRIAL_ROWS) for name, size in sizes.items()}
    rows = max(2, math.ceil(config.train.batch_size / world.size))
    full, half = (_time_alone(config, small, device, n) for n in (rows, rows // 2))
    slope = max((full - half) / (rows - rows // 2), 1e-9)
    default = Constants()
    message, byte = default.message_seconds, default.byte_seconds
    if world.size > 1:
        message, byte = time_messages(world.size)
    available = len(os.sched_getaffinity(0)) / world.local_size
    used = min(torch.get_num_threads(), available) if device.type == "cpu" else 0.0
    values = np.array([max(full - slope * rows, 0.0), slope, used, message, byte])
    step, row, cores, message, byte = (ranks.sum_arrays(values) / world.size).tolist()
    constants = Constants(step, row, cores, message, byte, is_measured=True)
    if world.size == 1:
        return constants
    return _correct_messages(constants, config, small, world, device, rows)


def _correct_messages(
    constants: Constants,
    config: Config,
    sizes: Mapping[str, int],
    world: World,
    device: torch.device,
    rows: int,
) -> Constants:
    """Correct the time of a message so that the predicted time of a step equals the measured time.

    Within a training step, a message does not take the same time as alone: ranks wait for the
    slowest one, and some messages travel while ranks compute.
    """
    cost = predict(config, Cluster(world.size, world.local_size), constants)
    predicted = cost.total_seconds
    count = max(TRIAL_STEPS, min(_trial_steps(config, rows), int(TRIAL_SECONDS / predicted)))
    count = ranks.broadcast_object(count)
    measured = _time_step(config, sizes, world, device, rows, count)
    measured = float(ranks.sum_arrays(np.array([measured]))[0]) / world.size
    messages = len(cost.seconds) - 1
    message = max(constants.message_seconds + (measured - predicted) / messages, 0.0)
    if message > 0:
        return replace(constants, message_seconds=message)
    # The step is faster than predicted even with messages that take no time, because a waiting rank
    # leaves its cores to other ranks. So the time of the computation is corrected instead.
    share = measured / cost.seconds["compute"]
    return replace(
        constants,
        step_seconds=constants.step_seconds * share,
        row_seconds=constants.row_seconds * share,
        message_seconds=0.0,
    )


def _trial_steps(config: Config, rows: int) -> int:
    """Return the number of steps of `rows` rows in a trial that does not reach TRIAL_SECONDS."""
    loader = ShardLoader.from_config(config, "train", rows, 0, 1, shuffle=True)
    read_together = max(_shuffle_rows(config, rows), loader.largest_row_group)
    return 3 * max(TRIAL_STEPS // 3, math.ceil(read_together / rows))


def _shuffle_rows(config: Config, rows: int) -> int:
    """Return the rows of a trial's shuffle window: so few that most steps include reading."""
    return min(config.loader.shuffle_rows, rows * TRIAL_STEPS)


def _time_alone(config: Config, sizes: Mapping[str, int], device: torch.device, rows: int) -> float:
    """Return the seconds of a step on `rows` rows, including the loader but no messages.

    All ranks take such steps at the same time, so the time includes the effect of shared cores. No
    rank communicates with another.
    """
    ranks.barrier()
    with ranks.single_rank() as world:
        return _time_step(config, sizes, world, device, rows, _trial_steps(config, rows))


def _time_step(
    config: Config,
    sizes: Mapping[str, int],
    world: World,
    device: torch.device,
    rows: int,
    count: int,
) -> float:
    """Take `count` training steps with `rows` rows per rank and return the seconds per step.

    A job of one rank stops after TRIAL_SECONDS. Each third of the steps gives a mean time; the
    median of the three means is returned, so that a short peak of other load does not distort the
    result.
    """
    torch.manual_seed(0)
    config = replace(
        config,
        train=replace(config.train, batch_size=rows * world.size),
        loader=replace(config.loader, shuffle_rows=_shuffle_rows(config, rows)),
    )
    model = build_model(config, sizes, with_tables=False).to(device)
    tables = make_tables(config, sizes, world, device)
    state = TrainState(config, model, tables, make_optimizer(model, config.train))
    prepare = make_preparer(tables, config, 0)
    loader = ShardLoader.from_config(config, "train", rows, world.rank, world.size, shuffle=True)
    # The loader's thread runs beside the step, as in training, because it may need the same cores.
    with (
        no_gc_pauses(),
        closing(
            loader.epochs(0, None, lambda n, batch: prepare(n, _fold_codes(batch, config, sizes)))
        ) as epochs,
    ):
        trial = steps(itertools.chain.from_iterable(epochs), tables, device)
        # The first steps are slower: they allocate memory, and the loader fills its queue.
        for number, step in enumerate(itertools.islice(trial, WARM_UP_STEPS)):
            float(take_step(state, step, number, 0.0).total)
        ends = [time.perf_counter()]
        for number, step in enumerate(itertools.islice(trial, count), start=1):
            float(take_step(state, step, WARM_UP_STEPS + number, 0.0).total)
            ends.append(time.perf_counter())
            seconds = ends[-1] - ends[0]
            if world.size == 1 and number >= TRIAL_STEPS and seconds > TRIAL_SECONDS:
                break
    thirds = np.array_split(np.diff(ends), 3)
    return float(np.median([third.mean() for third in thirds]))


def _fold_codes(batch: Batch, config: Config, sizes: Mapping[str, int]) -> Batch:
    """Take each code modulo the size of its table, because a trial cuts large tables."""
    features = dict(batch.features)
    for feature in config.schema.features:
        if feature.is_embedded:
            size = sizes[config.schema.vocabulary_of(feature)]
            features[feature.name] = features[feature.name] % size
    return replace(batch, features=features)


def time_messages(size: int) -> tuple[float, float]:
    """Return the seconds that a collective takes without data, and the seconds per byte sent.

    All ranks of a job must call this at the same time; `size` > 1 is their number.
    """
    import horovod.torch as hvd

    def allreduce(count: int) -> None:
        wait(hvd.allreduce_async(torch.zeros(count), op=hvd.Sum, name=f"trial/allreduce/{count}"))

    def alltoall(count: int) -> None:
        splits = torch.full((size,), count // size, dtype=torch.int32)
        values = torch.zeros(int(splits.sum()))
        wait(hvd.alltoall_async(values, splits=splits, name=f"trial/alltoall/{count}"))

    small = (_median(allreduce, SMALL_MESSAGE) + _median(alltoall, SMALL_MESSAGE)) / 2
    bytes_sent = 4 * LARGE_MESSAGE * (size - 1) / size * (2 + 1)
    large = _median(allreduce, LARGE_MESSAGE) + _median(alltoall, LARGE_MESSAGE)
    return small, max((large - 2 * small) / bytes_sent, 1e-12)


def _median(collective: Callable[[int], None], count: int) -> float:
    """Call a collective on `count` elements several times; return its median seconds.

    The first three calls do not count.
    """
    times = []
    for _ in range(MESSAGE_REPEATS):
        started = time.perf_counter()
        collective(count)
        times.append(time.perf_counter() - started)
    return float(np.median(times[3:]))
