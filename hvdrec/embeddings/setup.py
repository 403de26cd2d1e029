"""From a configuration to the tables of this rank: placement, kernels, and whether they fit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from hvdrec.config import Config
from hvdrec.embeddings.kernels import KernelName, RowOptimizer, fastest_kernel, fbgemm_refuses
from hvdrec.embeddings.placement import Group, arrange, bytes_of_rows
from hvdrec.embeddings.sharded import DistributedTables
from hvdrec.errors import UserError
from hvdrec.models.embedding import dimensions
from hvdrec.parallel import ranks
from hvdrec.parallel.ranks import World


def row_optimizer(config: Config) -> RowOptimizer:
    """Return the optimizer of table rows."""
    train = config.train
    return RowOptimizer(
        train.embedding_optimizer,
        train.embedding_weight_decay,
        train.embedding_initial_accumulator,
    )


def table_groups(config: Config, sizes: Mapping[str, int], world_size: int) -> tuple[Group, ...]:
    """Return how the tables are placed on so many ranks; sizes: table -> rows."""
    widths = dimensions(config.schema, config.model.dimension)
    return arrange(
        {name: sizes[name] for name in widths},
        widths,
        world_size,
        config.parallel.placement,
        int(1e6 * config.parallel.shard_from_mb),
    )


def make_tables(
    config: Config,
    sizes: Mapping[str, int],
    world: World,
    device: torch.device,
    *,
    kernels: Mapping[int, KernelName] | None = None,
    is_new: bool = True,
) -> DistributedTables:
    """Make this rank's tables, with first values if they are new, else zeros to be filled.

    kernels: width -> kernel of an earlier run, which goes on with what it began with. Every rank
    must call this. Raises UserError for tables that do not fit into memory, or that a wished
    kernel cannot hold.
    """
    groups = table_groups(config, sizes, world.size)
    optimizer = row_optimizer(config)
    check_memory(groups, optimizer, world, device)
    chosen = _choose(config, groups, optimizer, device, kernels or {})
    return DistributedTables(
        config.schema,
        groups,
        optimizer,
        world,
        kernels=chosen,
        seed=config.seed if is_new else None,
        deviation=config.model.initial_deviation,
        device=device,
        pooling=config.model.pooling,
    )


def check_synchronization(config: Config, world: World, device: torch.device) -> None:
    """Raise UserError if this job cannot do what parallel.synchronization asks for."""
    if config.parallel.synchronization != "adasum" or world.size == 1:
        return
    import horovod.torch as hvd

    if world.size & (world.size - 1):
        raise UserError(
            "parallel.synchronization = 'adasum': takes a power of two of ranks, not "
            f"{world.size}; change their number or use 'step'"
        )
    if device.type == "cpu" and not hvd.mpi_enabled():
        raise UserError(
            "parallel.synchronization = 'adasum': on CPUs Horovod needs MPI for it; start the job "
            "with mpirun or horovodrun --mpi, or use 'step'"
        )


def _choose(
    config: Config,
    groups: tuple[Group, ...],
    optimizer: RowOptimizer,
    device: torch.device,
    before: Mapping[int, KernelName],
) -> dict[int, KernelName]:
    wish = config.parallel.kernel
    chosen: dict[int, KernelName] = {}
    for group in groups:
        reason = fbgemm_refuses(group.width, optimizer, torch.float32)
        if wish == "fbgemm" and reason:
            raise UserError(
                f"parallel.kernel = 'fbgemm': cannot hold table '{next(iter(group.rows))}': "
                f"{reason}; use 'torch' or 'auto'"
            )
        if wish != "auto":
            chosen[group.width] = wish
        elif group.width in before:
            chosen[group.width] = "torch" if reason else before[group.width]
        elif group.width not in chosen:
            chosen[group.width] = fastest_kernel(group.width, optimizer, torch.float32, device)
    # The ranks' trials may differ, and the kernels in the last digit.
    told = ranks.broadcast_object({str(width): name for width, name in chosen.items()})
    return {int(width): name for width, name in told.items()}


def check_memory(
    groups: tuple[Group, ...], optimizer: RowOptimizer, world: World, device: torch.device
) -> None:
    """Raise UserError, with the largest table's name, if the tables do not fit into memory."""
    need = bytes_of_rows(groups, {g.width: optimizer.state_width(g.width) for g in groups})
    if device.type == "cuda":
        have, ranks_there, where = torch.cuda.mem_get_info(device)[0], 1, "this rank's GPU"
    else:
        have, ranks_there, where = free_memory(), world.local_size, "this host"
    if need * ranks_there <= have:
        return
    group, table = max(
        ((g, t) for g in groups for t in g.rows),
        key=lambda of: of[0].width * of[0].rows[of[1]] / of[0].ranks,
    )
    how = "sharded" if group.is_sharded else "replicated"
    remedy = "add hosts or narrow it (its feature's `dimension`)"
    if not group.is_sharded:
        remedy = "train on more ranks with parallel.placement = 'auto', or narrow it (`dimension`)"
    raise UserError(
        f"table '{table}' ({group.rows[table]} rows of width {group.width}, {how}): the tables "
        f"take {need / 1e9:.2f} GB on each of {ranks_there} ranks, {where} has "
        f"{have / 1e9:.2f} GB free; {remedy}"
    )


def free_memory() -> int:
    """Return how many bytes this host can still give, within the limits of its control group."""
    have = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                have = int(line.split()[1]) * 1024
    control = Path("/sys/fs/cgroup")
    limit = control / "memory.max"
    if limit.is_file() and limit.read_text().strip() != "max":
        stat = dict(line.split() for line in (control / "memory.stat").read_text().splitlines())
        # Pages of files that were read can be given up at any time.
        used = int((control / "memory.current").read_text()) - int(stat["inactive_file"])
        have = min(have, int(limit.read_text()) - used)
    return have
