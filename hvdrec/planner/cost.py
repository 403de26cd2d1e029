"""Predict the memory, traffic and time of a training step from the rows that its batches look up.

The formulas count the bytes that each of N ranks sends for an embedding table of width w. A rank
looks up U unique rows in its batch; all ranks together look up V unique rows. A sharded table takes
U (N - 1) / N * (4 + 8 w) bytes: row indices, vectors and gradients. A replicated table takes
4 U (N - 1) + 8 w V (N - 1) / N bytes: row indices are gathered over a ring, and gradients are
reduced over a ring. Dense gradients are reduced over a ring as well, most of them during the
backward pass. `Constants` gives the time per byte and per message.
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
from hvdrec.storage.drafts import write_text
from hvdrec.storage.json_text import json_text


@dataclass(frozen=True)
class Cluster:
    """The ranks and hosts of a job."""

    ranks: int
    ranks_per_host: int = 1
    memory: float = 0.0
    """The memory of each rank in bytes; 0 means no limit."""
    bandwidth: float = 0.0
    """The bits per second that a host can send; 0 means no limit."""
    cores: int = 0
    """The CPU cores of a host, which its ranks share; 0 means that each rank has as many cores as
    it had in the measurement."""


@dataclass(frozen=True)
class Constants:
    """The speed of a machine; the defaults are guesses.

    A training step with a batch of R rows, on one rank that has `cores` cores for itself, takes
    ``step_seconds + row_seconds * R`` seconds.
    """

    step_seconds: float = 2e-3
    row_seconds: float = 1e-5
    cores: float = 1.0
    message_seconds: float = 1.5e-3
    """The seconds that each collective adds to a step, regardless of its size."""
    byte_seconds: float = 1e-9
    """The seconds to send one byte to another rank on the same host."""
    is_measured: bool = False

    @staticmethod
    def load(file: Path) -> Constants:
        """Read a file that `save` wrote; raises UserError if that fails."""
        try:
            return Constants(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            problem = f"does not hold measured constants ({error})"
            raise invalid_file(file, problem, "run hvdrec plan CONFIG --calibrate") from None

    def save(self, file: Path) -> None:
        """Write the constants as JSON."""
        write_text(file, json_text(asdict(self), indent=1) + "\n")


@dataclass(frozen=True)
class Workload:
    """The work of each rank in one training step; a group is a group of embedding tables."""

    rows: int
    """The number of rows in a rank's batch."""
    unique: Mapping[str, float]
    """For each group, the number of unique rows that a rank looks up, including the row for
    MISSING."""
    union: Mapping[str, float]
    """For each group, the number of unique embedding rows that all ranks together look up."""
    table_rows: Mapping[str, float]
    """For each embedding table, the number of its unique rows that a rank looks up."""
    dense: int
    """The number of dense parameters."""
    softmax_bytes: float = 0.0
    """The bytes that a rank sends for in-batch negatives."""


@dataclass(frozen=True)
class TableCost:
    """The placement and the cost of one embedding table [rows, width]."""

    table: str
    rows: int
    width: int
    placement: str
    memory: int
    """The bytes of weights and optimizer state on each rank."""
    distinct: float
    """The number of unique rows that a rank looks up in a step."""


@dataclass(frozen=True)
class StepCost:
    """The predicted cost of a training step on each rank: bytes sent, seconds, bytes of memory.

    `bytes_sent` has an entry for each kind of message. `seconds` has an entry for the computation
    and for each kind of message that takes time.
    """

    tables: tuple[TableCost, ...]
    bytes_sent: Mapping[str, float]
    seconds: Mapping[str, float]
    memory: int

    @property
    def total_seconds(self) -> float:
        """The time of the whole step in seconds."""
        return sum(self.seconds.values())


def predict_step(
    groups: Sequence[TableGroup],
    work: Workload,
    cluster: Cluster,
    constants: Constants,
    state_widths: Mapping[int, int],
) -> StepCost:
    """Predict the cost of a training step.

    `groups` are the embedding tables, placed on the ranks of the cluster. `state_widths` maps each
    table width to the number of optimizer state values of a row.
    """
    tables = _table_costs(groups, work, cluster.ranks, state_widths)
    # A dense parameter takes four float32 numbers: weight, gradient, and Adam's two moments.
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
    """Return the bytes that a rank sends: as row indices, over a ring, and by alltoall."""
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
    """Return the seconds of a collective.

    A rank sends `sent` bytes; `leaves_host` bytes leave its host over the network.
    """
    hosts = math.ceil(cluster.ranks / cluster.ranks_per_host)
    network = 8 * leaves_host / cluster.bandwidth if hosts > 1 and cluster.bandwidth else 0.0
    return constants.message_seconds + max(sent * constants.byte_seconds, network)


def _hidden(sent: float, work: Workload, cluster: Cluster, constants: Constants) -> float:
    """Return the seconds in which dense gradients travel while the backward pass still computes.

    All gradient buckets but the last one can travel then. The backward pass is taken to be half of
    the computation.
    """
    travel = _message(sent, sent, cluster, constants) - constants.message_seconds
    last = min(1.0, bucket_bytes(4 * work.dense) / max(1, 4 * work.dense))
    return min((1.0 - last) * travel, _compute(work, cluster, constants) / 2)
