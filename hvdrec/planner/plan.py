"""What a training step would cost on any cluster, without one.

Bytes follow from what travels: for U distinct rows of a rank's batch and N ranks, a sharded table
of width w sends U (N - 1) / N times (4 + 8 w) bytes from each rank: row numbers, vectors and
gradients. For a replicated one, row numbers go round once, and the gradients of the V rows that any
rank met are reduced over a ring: 4 U (N - 1) + 8 w V (N - 1) / N. Dense gradients are reduced over
the ring, too, most of them during the backward pass. Times add up what was measured once
(`Constants`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hvdrec.embeddings.placement import TableGroup, bytes_per_rank
from hvdrec.embeddings.sharded import replicated_bytes
from hvdrec.errors import UserError
from hvdrec.parallel.gradients import bucket_bytes


@dataclass(frozen=True)
class Cluster:
    """Where a job would run.

    ranks: of the job; ranks_per_host: on each host; memory: bytes of each rank; bandwidth: bits per
    second that leave a host; cores: CPU cores of a host, shared by its ranks (0: each rank computes
    as fast as the one that was measured, as with a GPU of its own).
    """

    ranks: int
    ranks_per_host: int = 1
    memory: float = 0.0
    bandwidth: float = 0.0
    cores: int = 0


@dataclass(frozen=True)
class Constants:
    """What a machine needs for its work, in seconds; the defaults are guesses, not measured.

    step_seconds + row_seconds * rows: a rank's step on so many rows without other ranks, with
    `cores` cores of its own; message_seconds: what a collective costs in a step but for its bytes;
    byte_seconds: a byte that a rank sends to another on its own host.
    """

    step_seconds: float = 2e-3
    row_seconds: float = 1e-5
    cores: float = 1.0
    message_seconds: float = 1.5e-3
    byte_seconds: float = 1e-9
    is_measured: bool = False

    @staticmethod
    def load(file: Path) -> Constants:
        """Read what `save` wrote; raises UserError for anything else."""
        try:
            return Constants(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{file}: no measured constants ({error}); run hvdrec plan CONFIG --calibrate"
            ) from None

    def save(self, file: Path) -> None:
        """Write them as JSON."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")


@dataclass(frozen=True)
class Work:
    """What a step does, whatever the cluster.

    rows: of a rank's batch; distinct: group's name -> distinct rows that a rank looks up (the row
    of MISSING with them); union: the same for all ranks together; table_rows: table -> distinct
    rows; dense: dense parameters; softmax_bytes: what in-batch negatives send from a rank.
    """

    rows: int
    distinct: Mapping[str, float]
    union: Mapping[str, float]
    table_rows: Mapping[str, float]
    dense: int
    softmax_bytes: float = 0.0


@dataclass(frozen=True)
class TablePlan:
    """A table's part: placement, bytes of memory on each rank, distinct rows of a rank's step."""

    table: str
    rows: int
    width: int
    placement: str
    memory: int
    distinct: float


@dataclass(frozen=True)
class Plan:
    """The plan of a step: bytes that each rank sends, seconds by part, memory of each rank."""

    tables: tuple[TablePlan, ...]
    bytes_sent: Mapping[str, float]
    seconds: Mapping[str, float]
    memory: int
    fits: bool

    @property
    def step_seconds(self) -> float:
        """Return the predicted time of a step."""
        return sum(self.seconds.values())

    @property
    def total_bytes(self) -> float:
        """Return what a rank sends in a step."""
        return sum(self.bytes_sent.values())


def plan_step(
    groups: Sequence[TableGroup],
    work: Work,
    cluster: Cluster,
    constants: Constants,
    state_widths: Mapping[int, int],
) -> Plan:
    """Predict a step; groups: as arranged for the cluster's ranks; state_widths: width -> state."""
    ranks = cluster.ranks
    others = (ranks - 1) / ranks
    tables = tuple(
        TablePlan(
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
    sent: dict[str, float] = {}
    seconds = {"compute": _compute(work, cluster, constants)}
    ring = {"dense gradients": 8 * work.dense * others}
    spread: dict[str, float] = {}
    for group in groups:
        distinct = work.distinct[group.name]
        if group.is_sharded:
            spread[f"vectors ({group.name})"] = 4 * distinct * group.width * others
            spread[f"gradients ({group.name})"] = 4 * distinct * group.width * others
            sent[f"row numbers ({group.name})"] = 4 * distinct * others
        else:
            union = work.union.get(group.name, distinct)
            both = replicated_bytes(round(distinct), round(union), group.width, ranks)
            numbers = 4 * distinct * (ranks - 1)
            sent[f"row numbers ({group.name})"] = numbers
            ring[f"gradients ({group.name})"] = both - numbers
    if work.softmax_bytes:
        spread["in-batch negatives"] = work.softmax_bytes
    if ranks > 1:
        # Row numbers travel while the step before computes: they count as bytes only.
        seconds |= {n: _message(v, v, cluster, constants) for n, v in ring.items()}
        seconds["dense gradients"] -= _hidden(ring["dense gradients"], work, cluster, constants)
        hosts_share = (ranks - cluster.ranks_per_host) / (ranks - 1) * cluster.ranks_per_host
        for name, value in spread.items():
            seconds[name] = _message(value, value * hosts_share, cluster, constants)
        sent |= ring | spread
    else:
        sent = {}
    # Adam keeps two numbers beside each dense weight, the gradient is a third.
    memory = sum(table.memory for table in tables) + 16 * work.dense
    return Plan(tables, sent, seconds, memory, not cluster.memory or memory <= cluster.memory)


def _compute(work: Work, cluster: Cluster, constants: Constants) -> float:
    own = constants.step_seconds + constants.row_seconds * work.rows
    if not cluster.cores:
        return own
    there = min(cluster.ranks_per_host, cluster.ranks)
    return own * max(1.0, constants.cores * there / cluster.cores)


def _message(sent: float, leaves_host: float, cluster: Cluster, constants: Constants) -> float:
    """Return the seconds of a collective in which a rank sends, and its host lets out, bytes."""
    hosts = math.ceil(cluster.ranks / cluster.ranks_per_host)
    network = 8 * leaves_host / cluster.bandwidth if hosts > 1 and cluster.bandwidth else 0.0
    return constants.message_seconds + max(sent * constants.byte_seconds, network)


def _hidden(sent: float, work: Work, cluster: Cluster, constants: Constants) -> float:
    """Return the seconds in which dense gradients travel while a rank still computes others.

    All but the last bucket of them can, during the backward pass, which is half of a step at least.
    """
    travel = _message(sent, sent, cluster, constants) - constants.message_seconds
    last = min(1.0, bucket_bytes(4 * work.dense) / max(1, 4 * work.dense))
    return min((1.0 - last) * travel, _compute(work, cluster, constants) / 2)


def smallest_cluster(
    groups_of: Mapping[int, Sequence[TableGroup]], state_widths: Mapping[int, int], memory: float
) -> int | None:
    """Return the smallest of the numbers of ranks whose tables fit, or None."""
    for ranks in sorted(groups_of):
        if bytes_per_rank(groups_of[ranks], state_widths) <= memory:
            return ranks
    return None
