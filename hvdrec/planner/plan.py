"""Plan a training job: predict the training step of a run on any cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hvdrec.config import Config
from hvdrec.embeddings.placement import TableGroup, bytes_per_rank
from hvdrec.errors import choices, invalid_value
from hvdrec.features.fit import Fitted
from hvdrec.parallel import ranks as job
from hvdrec.planner.calibration import measure_constants
from hvdrec.planner.cost import Cluster, Constants, TableCost
from hvdrec.planner.workload import place_tables, predict, state_widths
from hvdrec.storage.artifacts import read_manifest
from hvdrec.training.defaults import default_batch_size

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
    """The bytes of weights, gradients and optimizer state on each rank."""
    fits: bool
    """Whether `memory_per_rank` is within the memory of a rank of the cluster."""
    smallest_ranks: int | None
    """The planned number of ranks if the job fits into their memory. Otherwise the smallest power
    of two, up to MAX_RANKS, on which it fits; None if there is none."""
    bytes_sent_per_step: Mapping[str, float]
    """The bytes that each rank sends, for each kind of message and in ``total``."""
    seconds_per_step: Mapping[str, float]
    """The seconds of the computation, of each kind of message and in ``total``."""
    rows_per_second: float
    batch_size: int
    """Number of rows of a training step on all ranks together."""


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
    """Predict the memory, network traffic and time of a training step.

    Args:
        config: The configuration of the run; `prepare` must have encoded its features.
        ranks: The number of ranks; 0 takes the number of ranks of this job.
        ranks_per_host: The number of ranks on each host; 0 puts all ranks on one host.
        memory: The memory of each rank, such as ``80GB``; empty for no limit.
        bandwidth: The data that a host can send per second, such as ``10Gbit``; empty for no limit.
        cores: The CPU cores of each host; 0 gives each rank as many cores as it used in the
            measurement.
        calibrate: Measure this machine first, with all ranks of this job, and save the constants.
        constants: A file of constants that ``--calibrate`` wrote, perhaps on another machine.

    Raises:
        UserError: An option is invalid, or the features are missing.
    """
    for name, value in (("ranks", ranks), ("ranks_per_host", ranks_per_host), ("cores", cores)):
        if value < 0:
            raise invalid_value(name, value, "must not be negative")
    memory_bytes = parse_quantity("memory", memory, MEMORY_UNITS) if memory else 0.0
    bits = parse_quantity("bandwidth", bandwidth, BANDWIDTH_UNITS) if bandwidth else 0.0
    config = _with_batch_size(config)
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
        config.train.batch_size,
    )


def parse_quantity(option: str, text: str, units: Mapping[str, float]) -> float:
    """Read a number with a unit: ``parse_quantity("memory", "80GB", {"GB": 1e9})`` is 8e10."""
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
    """Return the smallest number of ranks on which the embedding tables fit, or None.

    `groups_by_ranks` maps each number of ranks to try to the placed tables. `widths` maps each
    table width to the number of optimizer state values per row. `memory` is the memory of each rank
    in bytes.
    """
    fitting = (
        ranks
        for ranks, groups in sorted(groups_by_ranks.items())
        if bytes_per_rank(groups, widths) <= memory
    )
    return next(fitting, None)


def _with_batch_size(config: Config) -> Config:
    """Return the configuration with training's default batch size if it sets none."""
    if config.train.batch_size:
        return config
    rows = read_manifest(config.paths.of("features"), "features").meta["rows"]["train"]
    return replace(config, train=replace(config.train, batch_size=default_batch_size(rows)))


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
    """Read the constants from `file` or from the run's own file; without either, use defaults."""
    if file is None:
        file = Path(config.paths.work) / CONSTANTS_FILE
        if not file.is_file():
            return Constants()
    return Constants.load(file)
