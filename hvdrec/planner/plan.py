"""Plan a training job: predict a step of a run on any cluster from its encoded shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdrec.config import Config
from hvdrec.embeddings.placement import TableGroup, bytes_per_rank
from hvdrec.errors import choices, invalid_value
from hvdrec.features.fit import Fitted
from hvdrec.parallel import ranks as job
from hvdrec.planner.calibration import measure_constants
from hvdrec.planner.cost import Cluster, Constants, TableCost
from hvdrec.planner.workload import place_tables, predict, state_widths

CONSTANTS_FILE = "plan.json"
MEMORY_UNITS = {"GB": 1e9, "MB": 1e6, "TB": 1e12}
BANDWIDTH_UNITS = {"Gbit": 1e9, "Mbit": 1e6, "Tbit": 1e12}
MAX_RANKS = 4096


@dataclass(frozen=True)
class PlanResult:
    """The predicted cost of a training step on a cluster."""

    cluster: Cluster
    constants: Constants
    tables: tuple[TableCost, ...]
    memory_per_rank: int
    """Bytes for weights and optimizer state."""
    fits: bool
    """False if the memory exceeds that of the cluster's ranks."""
    smallest_ranks: int | None
    """The number of ranks on which the tables fit, if any does."""
    bytes_sent_per_step: Mapping[str, float]
    """The bytes that each rank sends, by part of a step and in ``total``."""
    seconds_per_step: Mapping[str, float]
    """The time by part of a step and in ``total``."""
    rows_per_second: float


def plan(
    config: Config,
    *,
    ranks: int = 0,
    ranks_per_host: int = 0,
    memory: str = "",
    bandwidth: str = "",
    cores: int = 0,
    calibrate: bool = False,
    constants: Path | None = None,
) -> PlanResult:
    """Predict memory, traffic and time of a training step.

    Args:
        config: The run, whose features are encoded.
        ranks: The number of ranks; 0: those of this job.
        ranks_per_host: The ranks on each host; 0: all ranks on one host.
        memory: The memory of each rank, such as ``80GB``; empty: no limit.
        bandwidth: What a host can send, such as ``10Gbit``; empty: no limit.
        cores: The CPU cores of each host; 0: each rank has as many cores as it uses.
        calibrate: Measure this machine first, with all ranks of this job, and save the constants.
        constants: A file of constants measured on another machine.

    Raises:
        UserError: An option is invalid, or the features are missing.
    """
    for name, value in (("ranks", ranks), ("ranks_per_host", ranks_per_host), ("cores", cores)):
        if value < 0:
            raise invalid_value(name, value, "must not be negative")
    memory_bytes = parse_quantity("memory", memory, MEMORY_UNITS) if memory else 0.0
    bits = parse_quantity("bandwidth", bandwidth, BANDWIDTH_UNITS) if bandwidth else 0.0
    speed = _calibrated(config) if calibrate else _constants(config, constants)
    count = ranks or job.current().size
    cluster = Cluster(count, ranks_per_host or count, memory_bytes, bits, cores)
    cost = predict(config, cluster, speed)
    fits = not memory_bytes or cost.memory <= memory_bytes
    seconds = cost.total_seconds
    return PlanResult(
        cluster,
        speed,
        cost.tables,
        cost.memory,
        fits,
        count if fits else _smallest_ranks(config, cluster),
        {**cost.bytes_sent, "total": sum(cost.bytes_sent.values())},
        {**cost.seconds, "total": seconds},
        config.train.batch_size / seconds,
    )


def parse_quantity(option: str, text: str, units: Mapping[str, float]) -> float:
    """Return a number with its unit: ``parse_quantity("memory", "80GB", {"GB": 1e9})`` is 8e10."""
    number = text.rstrip("".join(set("".join(units)))).strip()
    unit = text[len(number) :].strip()
    try:
        if unit in units and float(number) > 0:
            return float(number) * units[unit]
    except ValueError:
        pass
    problem = f"must be a number above 0 with one of the units {choices(units)}"
    raise invalid_value(option, text, problem, f"write for example 80{next(iter(units))}")


def smallest_ranks(
    groups_by_ranks: Mapping[int, Sequence[TableGroup]], widths: Mapping[int, int], memory: float
) -> int | None:
    """Return the smallest number of ranks whose tables fit into `memory` bytes each, or None.

    `widths` gives the numbers of optimizer state per row, by width of the table.
    """
    fitting = (
        ranks
        for ranks, groups in sorted(groups_by_ranks.items())
        if bytes_per_rank(groups, widths) <= memory
    )
    return next(fitting, None)


def _smallest_ranks(config: Config, cluster: Cluster) -> int | None:
    sizes = Fitted.load(config.paths.of("features")).sizes
    powers = (2**i for i in range(MAX_RANKS.bit_length()))
    groups = {n: place_tables(config, sizes, n) for n in powers if n > cluster.ranks}
    widths = state_widths(config, place_tables(config, sizes, 1))
    return smallest_ranks(groups, widths, cluster.memory)


def _calibrated(config: Config) -> Constants:
    world = job.init()
    constants = job.run_on_all(lambda: measure_constants(config))
    if world.is_first:
        constants.save(Path(config.paths.work) / CONSTANTS_FILE)
    return constants


def _constants(config: Config, file: Path | None) -> Constants:
    """Return the constants in a file or of this run; the defaults if none were measured."""
    if file is None:
        file = Path(config.paths.work) / CONSTANTS_FILE
        if not file.is_file():
            return Constants()
    return Constants.load(file)
