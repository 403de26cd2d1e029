"""Create this rank's embedding tables from the configuration; check that they fit into memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import psutil
import torch

from hvdrec.config import Config
from hvdrec.config.schema import Schema
from hvdrec.config.sections import Parallel, Train
from hvdrec.embeddings.kernels import KernelName, RowOptimizer, default_kernel, fbgemm_problem
from hvdrec.embeddings.placement import TableGroup, bytes_per_rank, group_tables
from hvdrec.embeddings.sharded import DistributedTables
from hvdrec.errors import UserError, invalid_value
from hvdrec.models.embedding import dimensions
from hvdrec.parallel import ranks
from hvdrec.parallel.ranks import World

CONTROL_GROUP = Path("/sys/fs/cgroup")


def row_optimizer(train: Train) -> RowOptimizer:
    """Return the optimizer of embedding rows that the ``[train]`` section describes."""
    return RowOptimizer(
        train.embedding_optimizer,
        train.embedding_weight_decay,
        train.embedding_initial_accumulator,
    )


def table_groups(
    schema: Schema, dimension: int, sizes: Mapping[str, int], ranks: int, parallel: Parallel
) -> tuple[TableGroup, ...]:
    """Return the embedding tables in groups, placed on `ranks` ranks.

    `sizes` maps the name of each table to its number of rows. `dimension` is the width of tables
    whose feature does not set one.
    """
    widths = dimensions(schema, dimension)
    shard_from = int(1e6 * parallel.shard_from_mb)
    used = {name: sizes[name] for name in widths}
    return group_tables(used, widths, ranks, parallel.placement, shard_from)


def make_tables(
    config: Config,
    sizes: Mapping[str, int],
    world: World,
    device: torch.device,
    *,
    kernels: Mapping[int, KernelName] | None = None,
    is_new: bool = True,
) -> DistributedTables:
    """Create this rank's embedding tables; all ranks must call this at the same time.

    Args:
        config: The run's configuration.
        sizes: The number of rows of each table.
        world: This rank's number and the number of ranks.
        device: The device that stores the rows.
        kernels: If a run is resumed: the kernel that it used for each table width.
        is_new: Whether to fill the rows with initial values; otherwise they are zero.

    Raises:
        UserError: The tables do not fit into memory, or the configured kernel cannot hold them.
    """
    groups = table_groups(config.schema, config.model.dimension, sizes, world.size, config.parallel)
    optimizer = row_optimizer(config.train)
    check_memory(groups, optimizer, world, device)
    return DistributedTables(
        config.schema,
        groups,
        optimizer,
        world,
        kernels=_choose_kernels(config.parallel.kernel, groups, optimizer, device, kernels or {}),
        seed=config.seed if is_new else None,
        deviation=config.model.initial_deviation,
        device=device,
        pooling=config.model.pooling,
    )


def _choose_kernels(
    option: KernelName | Literal["auto"],
    groups: tuple[TableGroup, ...],
    optimizer: RowOptimizer,
    device: torch.device,
    previous: Mapping[int, KernelName],
) -> dict[int, KernelName]:
    """Return the kernel for each width, the same on every rank."""
    chosen: dict[str, KernelName] = {}
    for group in groups:
        width, table = group.width, next(iter(group.sizes))
        problem = fbgemm_problem(width, optimizer, torch.float32)
        if option == "fbgemm" and problem:
            problem = f"cannot hold table '{table}': {problem}"
            raise invalid_value("parallel.kernel", option, problem, "use 'torch' or 'auto'")
        if option != "auto":
            chosen[str(width)] = option
        elif width in previous:
            chosen[str(width)] = "torch" if problem else previous[width]
        elif str(width) not in chosen:
            chosen[str(width)] = default_kernel(width, optimizer, torch.float32, device)
    # FBGEMM may be installed on some hosts only. All ranks use the kernel that rank 0 chooses,
    # because the results of two kernels differ in the last digit.
    return {int(width): name for width, name in ranks.broadcast_object(chosen).items()}


def check_memory(
    groups: tuple[TableGroup, ...], optimizer: RowOptimizer, world: World, device: torch.device
) -> None:
    """Raise UserError if the tables and optimizer state of this host's ranks exceed free memory."""
    need = bytes_per_rank(groups, {g.width: optimizer.state_width(g.width) for g in groups})
    if device.type == "cuda":
        free, local_ranks, where = torch.cuda.mem_get_info(device)[0], 1, "this rank's GPU"
    else:
        free, local_ranks, where = free_memory(), world.local_size, "this host"
    if need * local_ranks <= free:
        return
    group, table = max(
        ((g, t) for g in groups for t in g.sizes),
        key=lambda pair: pair[0].width * pair[0].sizes[pair[1]] / pair[0].ranks,
    )
    remedy = "add hosts, or reduce the `dimension` of its feature"
    if not group.is_sharded:
        remedy = "train on more ranks with parallel.placement = 'auto', or reduce its `dimension`"
    raise UserError(
        f"table '{table}' ({group.sizes[table]} rows, {group.name}): the tables take "
        f"{need / 1e9:.2f} GB on each of {local_ranks} ranks, but {where} has {free / 1e9:.2f} GB "
        f"free; {remedy}",
        field=table,
        value=group.sizes[table],
    )


def free_memory() -> int:
    """Return the bytes of free memory on this host, or in this container if that is less."""
    free = int(psutil.virtual_memory().available)
    limit = CONTROL_GROUP / "memory.max"
    if limit.is_file() and limit.read_text().strip() != "max":
        lines = (CONTROL_GROUP / "memory.stat").read_text().splitlines()
        stat = dict(line.split() for line in lines)
        # The page cache counts as used, but the system frees it when memory is needed.
        used = int((CONTROL_GROUP / "memory.current").read_text()) - int(stat["inactive_file"])
        free = min(free, int(limit.read_text()) - used)
    return free
