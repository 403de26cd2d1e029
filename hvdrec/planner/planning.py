"""What the planner has to know: what a run's batches look up, and how fast a machine is."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from hvdrec.config import Config
from hvdrec.data.batch import Batch
from hvdrec.data.loader import ShardLoader
from hvdrec.embeddings.lookup import look_up
from hvdrec.embeddings.placement import TableGroup
from hvdrec.embeddings.setup import make_tables, row_optimizer, table_groups
from hvdrec.errors import UserError
from hvdrec.features.fit import Fitted
from hvdrec.models.embedding import dimensions
from hvdrec.parallel import ranks
from hvdrec.parallel.ranks import World
from hvdrec.planner.messages import time_messages
from hvdrec.planner.plan import Cluster, Constants, Plan, Work, plan_step, smallest_cluster
from hvdrec.training.build import build_model
from hvdrec.training.machine import collector_spared, pick_device, set_threads
from hvdrec.training.optimizer import make_optimizer
from hvdrec.training.pipeline import preparer, steps
from hvdrec.training.step import Trainee, take_step

CONSTANTS_FILE = "plan.json"
SAMPLED_BATCHES = 6
WARM_UP_STEPS, TRIAL_STEPS, TRIAL_SECONDS = 8, 24, 12.0
"""A trial has at least so many steps behind its first ones, and unless they take longer, as many as
three windows of the reader, or three row groups: those are read at once."""
LARGEST_TRIAL = 1_000_000
"""Rows of a table in the trial of `calibrate`: a step's cost does not depend on them."""


@dataclass(frozen=True)
class Planned:
    """A plan with what it was made for; smallest: ranks that the tables need, if these are few."""

    cluster: Cluster
    constants: Constants
    work: Work
    plan: Plan
    smallest: int | None


def make_plan(config: Config, cluster: Cluster, constants: Constants) -> Planned:
    """Plan a run's step on a cluster, from its encoded shards.

    Raises UserError if the shards are missing.
    """
    fitted = Fitted.load(config.paths.of("features"))
    groups = _groups(config, fitted.sizes, cluster.ranks)
    optimizer = row_optimizer(config.train)
    widths = {width: optimizer.state_width(width) for width in {g.width for g in groups}}
    work = measure_work(config, fitted.sizes, groups, cluster.ranks)
    plan = plan_step(groups, work, cluster, constants, widths)
    smallest: int | None = cluster.ranks
    if not plan.fits:
        more = [2**i for i in range(13) if 2**i > cluster.ranks]
        candidates = {n: _groups(config, fitted.sizes, n) for n in more}
        smallest = smallest_cluster(candidates, widths, cluster.memory)
    return Planned(cluster, constants, work, plan, smallest)


def _groups(config: Config, sizes: Mapping[str, int], ranks: int) -> tuple[TableGroup, ...]:
    return table_groups(config.schema, config.model.dimension, sizes, ranks, config.parallel)


def measure_work(
    config: Config, sizes: Mapping[str, int], groups: Sequence[TableGroup], world_size: int
) -> Work:
    """Count what some batches of the training split look up on so many ranks."""
    schema = config.schema
    widths = dimensions(schema, config.model.dimension)
    alone = [TableGroup(widths[name], 1, {name: sizes[name]}) for name in widths]
    rows = math.ceil(config.train.batch_size / world_size)
    mine = list(_batches(config, rows, world_size))
    everyone = list(_batches(config, config.train.batch_size, 1))
    model = build_model(config, sizes, with_tables=False)

    def mean(batches: Sequence[Batch], places: Sequence[TableGroup]) -> list[float]:
        counts = [
            [len(f.rows) for f in look_up(schema, places, b.features, config.model.pooling)]
            for b in batches
        ]
        return [float(value) for value in np.mean(counts, axis=0)]

    softmax = 0.0
    if config.train.objective != "ranking":
        positive = float(np.mean([int((b.label * b.weight > 0).sum()) for b in mine]))
        # Embeddings and indices go to all others, gradients of all ranks' rows round the ring.
        softmax = (world_size - 1) * positive * (12 * config.model.tower.output + 8)
    return Work(
        rows,
        dict(zip((group.name for group in groups), mean(mine, groups), strict=True)),
        dict(zip((group.name for group in groups), mean(everyone, groups), strict=True)),
        # The row of MISSING is not the table's own.
        {name: count - 1 for name, count in zip(widths, mean(mine, alone), strict=True)},
        sum(parameter.numel() for parameter in model.parameters()),
        softmax,
    )


def _batches(config: Config, rows: int, world_size: int) -> Iterator[Batch]:
    loader = ShardLoader.from_config(config, "train", rows, 0, world_size, shuffle=True)
    with closing(loader.epoch(0)) as batches:
        yield from itertools.islice(batches, SAMPLED_BATCHES)


def calibrate(config: Config) -> Constants:
    """Measure this machine, all ranks of the job at once; alone it cannot time messages.

    Every rank calls this. Takes up to a minute.
    """
    world = ranks.init()
    set_threads(config, world)
    device = pick_device(config, world)
    sizes = Fitted.load(config.paths.of("features")).sizes
    small = {name: min(size, LARGEST_TRIAL) for name, size in sizes.items()}
    rows = max(2, math.ceil(config.train.batch_size / world.size))
    whole, half = (_seconds_alone(config, small, device, n) for n in (rows, rows // 2))
    slope = max((whole - half) / (rows - rows // 2), 1e-9)
    default = Constants()
    message, byte = default.message_seconds, default.byte_seconds
    if world.size > 1:
        message, byte = time_messages()
    there = len(os.sched_getaffinity(0)) / world.local_size
    own = min(torch.get_num_threads(), there) if device.type == "cpu" else 0.0
    values = np.array([max(whole - slope * rows, 0.0), slope, own, message, byte])
    step, row, cores, message, byte = (ranks.sum_arrays(values) / world.size).tolist()
    found = Constants(step, row, cores, message, byte, is_measured=True)
    if world.size == 1:
        return found
    # Between two messages ranks compute, and the slowest comes last; some messages travel while
    # ranks compute: what one costs in a step is not what it costs when nothing else is done.
    planned = make_plan(config, Cluster(world.size, world.local_size), found).plan
    count = max(TRIAL_STEPS, min(_enough(config, rows), int(TRIAL_SECONDS / planned.step_seconds)))
    count = ranks.broadcast_object(count)
    together = _step_seconds(config, small, world, device, rows, count)
    together = float(ranks.sum_arrays(np.array([together]))[0]) / world.size
    messages = len(planned.seconds) - 1
    message = max(message + (together - planned.step_seconds) / messages, 0.0)
    if message == 0:
        # Ranks that wait for each other leave cores to others: then their steps are faster, too.
        share = together / planned.seconds["compute"]
        found = replace(found, step_seconds=step * share, row_seconds=row * share)
    return replace(found, message_seconds=message)


def _enough(config: Config, rows: int) -> int:
    """Return how many steps a trial on so many rows takes, unless they are slow."""
    loader = ShardLoader.from_config(config, "train", rows, 0, 1, shuffle=True)
    read_at_once = max(_window(config, rows), loader.largest_row_group)
    return 3 * max(TRIAL_STEPS // 3, math.ceil(read_at_once / rows))


def _window(config: Config, rows: int) -> int:
    """Return how many rows a trial's reader shuffles together: few, to read all the time."""
    return min(config.loader.shuffle_rows, rows * TRIAL_STEPS)


def _seconds_alone(
    config: Config, sizes: Mapping[str, int], device: torch.device, rows: int
) -> float:
    """Return the time of a step on so many rows, reader included, without messages.

    All ranks take such steps at the same time, each for itself: they may share cores.
    """
    ranks.barrier()
    with ranks.single_rank() as world:
        return _step_seconds(config, sizes, world, device, rows, _enough(config, rows))


def _step_seconds(
    config: Config,
    sizes: Mapping[str, int],
    world: World,
    device: torch.device,
    rows: int,
    count: int,
) -> float:
    """Return the time of a step on so many rows a rank, of `count`; a rank alone may take fewer.

    It is the mean of those in one third, the middle one by its mean: what disturbs the machine for
    a while does not count.
    """
    torch.manual_seed(0)
    config = replace(
        config,
        train=replace(config.train, batch_size=rows * world.size),
        loader=replace(config.loader, shuffle_rows=_window(config, rows)),
    )
    model = build_model(config, sizes, with_tables=False).to(device)
    tables = make_tables(config, sizes, world, device)
    trainee = Trainee(config, model, tables, make_optimizer(model, config.train))
    prepare = preparer(tables, config, 0, world.rank)
    loader = ShardLoader.from_config(config, "train", rows, world.rank, world.size, shuffle=True)
    # The reader's thread works beside the step, as in training: it may need the same cores.
    with (
        collector_spared(),
        closing(
            loader.epochs(0, None, lambda n, batch: prepare(n, _within(batch, config, sizes)))
        ) as epochs,
    ):
        trial = steps(itertools.chain.from_iterable(epochs), tables, device)
        # The first ones are slower: memory is got for them, and the reader fills its queue.
        for number, step in enumerate(itertools.islice(trial, WARM_UP_STEPS)):
            float(take_step(trainee, step, number, 0.0).total)
        ends = [time.perf_counter()]
        for number, step in enumerate(itertools.islice(trial, count), start=1):
            float(take_step(trainee, step, WARM_UP_STEPS + number, 0.0).total)
            ends.append(time.perf_counter())
            seconds = ends[-1] - ends[0]
            if world.size == 1 and number >= TRIAL_STEPS and seconds > TRIAL_SECONDS:
                break
    thirds = np.array_split(np.diff(ends), 3)
    return float(np.median([third.mean() for third in thirds]))


def _within(batch: Batch, config: Config, sizes: Mapping[str, int]) -> Batch:
    """Return a batch whose codes fit tables that were cut for a trial."""
    features = dict(batch.features)
    for feature in config.schema.features:
        if feature.is_embedded:
            size = sizes[config.schema.vocabulary_of(feature)]
            features[feature.name] = features[feature.name] % size
    return replace(batch, features=features)


def constants_for(config: Config, file: Path | None) -> Constants:
    """Return what was measured for a run, or the defaults if nothing was."""
    if file is not None:
        return Constants.load(file)
    found = Path(config.paths.work) / CONSTANTS_FILE
    return Constants.load(found) if found.is_file() else Constants()


def parse_quantity(text: str, units: Mapping[str, float], option: str) -> float:
    """Return a number with its unit: ``parse_quantity("80GB", {"GB": 1e9}, …)`` is 8e10."""
    number = text.rstrip("".join(set("".join(units)))).strip()
    unit = text[len(number) :].strip()
    try:
        if unit in units and float(number) > 0:
            return float(number) * units[unit]
    except ValueError:
        pass
    raise UserError(
        f"{option} {text}: must be a number above 0 with one of {list(units)}, e.g. "
        f"80{next(iter(units))}"
    )
