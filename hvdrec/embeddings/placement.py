"""Placement: which rank holds which row of which embedding table.

Tables of one width and placement form a group. On each rank, the rows of a group are stored in one
array, exchanged in one message and updated together. In a job of N ranks, row ``id`` of a sharded
table is stored on rank ``id % N`` at position ``id // N`` of the table's part of the array. A
replicated table is stored completely on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hvdrec.config.schema import MISSING

Array = NDArray[Any]
Placement = Literal["auto", "replicated", "sharded"]


@dataclass(frozen=True)
class TableGroup:
    """Embedding tables that have the same width and are all sharded or all replicated."""

    width: int
    ranks: int
    """The number of ranks over which the rows are divided; 1 for replicated tables."""
    sizes: Mapping[str, int]
    """The number of rows of each table."""

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds only a part of the rows."""
        return self.ranks > 1

    @property
    def name(self) -> str:
        """The name used for collectives and reports, such as ``sharded-16``."""
        return f"{'sharded' if self.is_sharded else 'replicated'}-{self.width}"

    @property
    def offsets(self) -> dict[str, int]:
        """The position of each table's first row in the array; it is the same on every rank."""
        offsets, offset = {}, 0
        for table, size in self.sizes.items():
            offsets[table] = offset
            offset += -(-size // self.ranks)
        return offsets

    @property
    def local_rows(self) -> int:
        """The number of rows of the array on each rank."""
        return sum(-(-size // self.ranks) for size in self.sizes.values())

    @property
    def key_type(self) -> type[np.uint32] | type[np.int64]:
        """The smaller dtype that can hold all results of `keys`."""
        return np.uint32 if self.ranks * self.local_rows <= 2**32 else np.int64

    def local_ids(self, table: str, rank: int) -> Array:
        """Return the ids, int64, of the rows of a table that a rank holds, in array order."""
        return np.arange(rank if self.is_sharded else 0, self.sizes[table], self.ranks)

    def keys(self, table: str, codes: Array) -> Array:
        """Return the key of each code: ``rank that holds the row * local_rows + index there``.

        A code is the row number of a value in its table. Keys have dtype `key_type` and the shape
        of `codes`. Code 0 (missing) gives key 0 for all tables, because its row is always zero.
        """
        offset = self.offsets[table]
        codes = codes.astype(self.key_type)  # the dtype of the codes may be too small for keys
        if self.is_sharded:
            index, owner = np.divmod(codes, self.ranks)
            keys = owner * self.local_rows + index + offset
        else:
            keys = codes + offset
        if offset:
            keys[codes == MISSING] = 0
        return np.asarray(keys)


def group_tables(
    sizes: Mapping[str, int],
    widths: Mapping[str, int],
    ranks: int,
    placement: Placement = "auto",
    shard_from_bytes: int = 0,
) -> tuple[TableGroup, ...]:
    """Decide which tables are sharded, and group the tables by width and placement.

    `sizes` and `widths` map the name of each table to its numbers of rows and columns. With
    ``auto``, tables that take at least `shard_from_bytes` in float32 are sharded. On one rank,
    nothing is sharded.
    """
    groups: dict[tuple[int, bool], dict[str, int]] = {}
    for table, size in sizes.items():
        is_large = 4 * size * widths[table] >= shard_from_bytes
        shard = ranks > 1 and (placement == "sharded" or (placement == "auto" and is_large))
        groups.setdefault((widths[table], shard), {})[table] = size
    return tuple(
        TableGroup(width, ranks if shard else 1, tables)
        for (width, shard), tables in sorted(groups.items())
    )


def bytes_per_rank(groups: Sequence[TableGroup], state_widths: Mapping[int, int]) -> int:
    """Return the bytes that embedding rows and their optimizer state take on a rank, as float32.

    `state_widths` maps each table width to the number of optimizer state values of a row.
    """
    return sum(4 * g.local_rows * (g.width + state_widths[g.width]) for g in groups)
