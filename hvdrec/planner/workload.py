"""Count the embedding rows that a run's batches look up, and predict its training step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing

import numpy as np

from hvdrec.config import Config
from hvdrec.data.batch import Batch
from hvdrec.data.loader import ShardLoader
from hvdrec.embeddings.lookup import look_up
from hvdrec.embeddings.placement import TableGroup
from hvdrec.embeddings.setup import row_optimizer, table_groups
from hvdrec.features.fit import Fitted
from hvdrec.models.embedding import dimensions
from hvdrec.planner.cost import Cluster, Constants, StepCost, Workload, predict_step
from hvdrec.training.build import build_model

SAMPLED_BATCHES = 6


def predict(config: Config, cluster: Cluster, constants: Constants) -> StepCost:
    """Predict a run's training step on a cluster; the encoded shards must exist."""
    sizes = Fitted.load(config.paths.of("features")).sizes
    groups = place_tables(config, sizes, cluster.ranks)
    work = measure_workload(config, sizes, groups, cluster.ranks)
    return predict_step(groups, work, cluster, constants, state_widths(config, groups))


def place_tables(config: Config, sizes: Mapping[str, int], ranks: int) -> tuple[TableGroup, ...]:
    """Return a run's embedding tables in groups, placed on a number of ranks."""
    return table_groups(config.schema, config.model.dimension, sizes, ranks, config.parallel)


def state_widths(config: Config, groups: Sequence[TableGroup]) -> dict[int, int]:
    """Return, for each table width, the number of optimizer state values of a row."""
    optimizer = row_optimizer(config.train)
    return {group.width: optimizer.state_width(group.width) for group in groups}


def measure_workload(
    config: Config, sizes: Mapping[str, int], groups: Sequence[TableGroup], ranks: int
) -> Workload:
    """Count the rows of `groups` that some batches of the training split look up."""
    schema = config.schema
    widths = dimensions(schema, config.model.dimension)
    single_tables = [TableGroup(widths[name], 1, {name: sizes[name]}) for name in widths]
    rows = math.ceil(config.train.batch_size / ranks)
    local = list(_batches(config, rows, ranks))
    everyone = list(_batches(config, config.train.batch_size, 1))

    def unique_rows(batches: Sequence[Batch], placed: Sequence[TableGroup]) -> list[float]:
        counts = [
            [len(f.rows) for f in look_up(schema, placed, b.features, config.model.pooling)]
            for b in batches
        ]
        return [float(mean) for mean in np.mean(counts, axis=0)]

    softmax = 0.0
    if config.train.objective != "ranking":
        positive = float(np.mean([int((b.label * b.weight > 0).sum()) for b in local]))
        # Item embeddings and indices are gathered from all ranks; the gradients of all ranks' items
        # are reduced over a ring.
        softmax = (ranks - 1) * positive * (12 * config.model.tower.output + 8)
    names = [group.name for group in groups]
    model = build_model(config, sizes, with_tables=False)
    return Workload(
        rows,
        dict(zip(names, unique_rows(local, groups), strict=True)),
        dict(zip(names, unique_rows(everyone, groups), strict=True)),
        # Each lookup also fetches the row of code MISSING, which all tables share.
        {n: count - 1 for n, count in zip(widths, unique_rows(local, single_tables), strict=True)},
        sum(parameter.numel() for parameter in model.parameters()),
        softmax,
    )


def _batches(config: Config, rows: int, ranks: int) -> Iterator[Batch]:
    loader = ShardLoader.from_config(config, "train", rows, 0, ranks, shuffle=True)
    with closing(loader.epoch(0)) as batches:
        yield from itertools.islice(batches, SAMPLED_BATCHES)
