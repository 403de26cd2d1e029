"""Predict the memory, traffic and time of a training step from what its batches look up.

The formulas count the bytes that each of N ranks sends. For U unique rows in its batch, a sharded
table of width w takes U (N - 1) / N * (4 + 8 w) bytes: row indices, vectors and gradients. For a
replicated table, row indices go around a ring once, and the gradients of the V rows that any rank
looked up are reduced over a ring: 4 U (N - 1) + 8 w V (N - 1) / N. Dense gradients are reduced over
the ring as well, most of them during the backward pass. Times follow from `Constants`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hvdrec.embeddings.placement import TableGroup
from hvdrec.embeddings.sharded import replicated_bytes
from hvdrec.errors import invalid_file
from hvdrec.parallel.gradients import bucket_bytes


@dataclass(frozen=True)
class Cluster:
    """The ranks and hosts of a job."""

    ranks: int
    ranks_per_host: int = 1
    memory: float = 0.0
    """Bytes for each rank; 0: no limit."""
    bandwidth: float = 0.0
    """Bits per second that leave a host; 0: no limit."""
    cores: int = 0
    """CPU cores of a host, shared by its ranks; 0: each rank is as fast as the measured one."""


@dataclass(frozen=True)
class Constants:
    """The speed of a machine, in seconds; the defaults are guesses.

    A step on R rows without other ranks takes ``step_seconds + row_seconds * R`` if the rank has
    `cores` cores of its own.
    """

    step_seconds: float = 2e-3
    row_seconds: float = 1e-5
    cores: float = 1.0
    message_seconds: float = 1.5e-3
    """What a collective adds to a step, apart from its bytes."""
    byte_seconds: float = 1e-9
    """The time to send a byte to another rank on the same host."""
    is_measured: bool = False

    @staticmethod
    def load(file: Path) -> Constants:
        """Read the file that `save` wrote; raises UserError for any other content."""
        try:
            return Constants(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            problem = f"does not hold measured constants ({error})"
            raise invalid_file(file, problem, "run hvdrec plan CONFIG --calibrate") from None

    def save(self, file: Path) -> None:
        """Write the constants as JSON."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")


@dataclass(frozen=True)
class Workload:
    """What a step does on each rank."""

    rows: int
    """The rows of a rank's batch."""
    unique: Mapping[str, float]
    """By group: the unique rows that a rank looks up, including the row of MISSING."""
    union: Mapping[str, float]
    """By group: the unique rows that all ranks together look up."""
    table_rows: Mapping[str, float]
    """By table: the unique rows that a rank looks up."""
    dense: int
    """The number of dense parameters."""
    softmax_bytes: float = 0.0
    """The bytes that a rank sends for in-batch negatives."""


@dataclass(frozen=True)
class TableCost:
    """One table: its placement, bytes on each rank, and unique rows in a rank's step."""

    table: str
    rows: int
    width: int
    placement: str
    memory: int
    distinct: float


@dataclass(frozen=True)
class StepCost:
    """The cost of a step: bytes that each rank sends and seconds, by part; memory of each rank."""

    tables: tuple[TableCost, ...]
    bytes_sent: Mapping[str, float]
    seconds: Mapping[str, float]
    memory: int

    @property
    def total_seconds(self) -> float:
        """The time of the step."""
        return sum(self.seconds.values())


def predict_step(
    groups: Sequence[TableGroup],
    work: Workload,
    cluster: Cluster,
    constants: Constants,
    state_widths: Mapping[int, int],
) -> StepCost:
    """Predict the cost of a step.

    The `groups` are placed on the ranks of the cluster; `state_widths` gives the numbers of
    optimizer state per row, by width of the table.
    """
    tables = _table_costs(groups, work, cluster.ranks, state_widths)
    # Adam stores two numbers for each dense weight; the gradient is another one.
    memory = sum(table.memory for table in tables) + 16 * work.dense
    seconds = {"compute": _compute(work, cluster, constants)}
    if cluster.ranks == 1:
        return StepCost(tables, {}, seconds, memory)
    indices, ring, alltoall = _bytes_sent(groups, work, cluster.ranks)
    # Row indices travel while the previous step computes, so they take no time.
    seconds |= {name: _message(sent, sent, cluster, constants) for name, sent in ring.items()}
    seconds["dense gradients"] -= _hidden(ring["dense gradients"], work, cluster, constants)
    other_ranks = cluster.ranks - 1
    leaving = (cluster.ranks - cluster.ranks_per_host) / other_ranks * cluster.ranks_per_host
    for name, sent in alltoall.items():
        seconds[name] = _message(sent, sent * leaving, cluster, constants)
    return StepCost(tables, indices | ring | alltoall, seconds, memory)


def _table_costs(
    groups: Sequence[TableGroup], work: Workload, ranks: int, state_widths: Mapping[int, int]
) -> tuple[TableCost, ...]:
    return tuple(
        TableCost(
            table,
            rows,
            group.width,
            "sharded" if group.is_sharded else "replicated" if ranks > 1 else "whole",
            4 * -(-rows // group.ranks) * (group.width + state_widths[group.width]),
            work.table_rows[table],
        )
        for group in groups
        for table, rows in group.sizes.items()
    )


def _bytes_sent(
    groups: Sequence[TableGroup], work: Workload, ranks: int
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Return the bytes that a rank sends as row indices, over the ring, and to all other ranks."""
    share = (ranks - 1) / ranks
    indices: dict[str, float] = {}
    ring = {"dense gradients": 8 * work.dense * share}
    alltoall: dict[str, float] = {}
    for group in groups:
        unique = work.unique[group.name]
        if group.is_sharded:
            alltoall[f"vectors ({group.name})"] = 4 * unique * group.width * share
            alltoall[f"gradients ({group.name})"] = 4 * unique * group.width * share
            indices[f"row numbers ({group.name})"] = 4 * unique * share
        else:
            union = work.union.get(group.name, unique)
            both = replicated_bytes(round(unique), round(union), group.width, ranks)
            numbers = 4 * unique * (ranks - 1)
            indices[f"row numbers ({group.name})"] = numbers
            ring[f"gradients ({group.name})"] = both - numbers
    if work.softmax_bytes:
        alltoall["in-batch negatives"] = work.softmax_bytes
    return indices, ring, alltoall


def _compute(work: Workload, cluster: Cluster, constants: Constants) -> float:
    seconds = constants.step_seconds + constants.row_seconds * work.rows
    if not cluster.cores:
        return seconds
    local_ranks = min(cluster.ranks_per_host, cluster.ranks)
    return seconds * max(1.0, constants.cores * local_ranks / cluster.cores)


def _message(sent: float, leaves_host: float, cluster: Cluster, constants: Constants) -> float:
    """Return the time of a collective, given the bytes that a rank sends and a host sends out."""
    hosts = math.ceil(cluster.ranks / cluster.ranks_per_host)
    network = 8 * leaves_host / cluster.bandwidth if hosts > 1 and cluster.bandwidth else 0.0
    return constants.message_seconds + max(sent * constants.byte_seconds, network)


def _hidden(sent: float, work: Workload, cluster: Cluster, constants: Constants) -> float:
    """Return the time in which dense gradients travel during the backward pass.

    All buckets but the last one can, and the backward pass takes at least half of a step.
    """
    travel = _message(sent, sent, cluster, constants) - constants.message_seconds
    last = min(1.0, bucket_bytes(4 * work.dense) / max(1, 4 * work.dense))
    return min((1.0 - last) * travel, _compute(work, cluster, constants) / 2)
