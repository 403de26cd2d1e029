"""Placement: which rank holds which row of which embedding table.

Tables of one width and placement form a group. Their rows are stored in one array, travel in one
exchange and are updated together. Row ``id`` of a sharded table is stored on rank ``id % N`` at
``id // N``; a replicated table is stored completely on every rank.
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
    """Tables of one width and placement."""

    width: int
    ranks: int
    """The number of ranks that share the rows; 1 for replicated tables."""
    sizes: Mapping[str, int]
    """The number of rows of each table."""

    @property
    def is_sharded(self) -> bool:
        """True if each rank holds a part of the rows."""
        return self.ranks > 1

    @property
    def name(self) -> str:
        """The name used for collectives and reports, such as ``sharded-16``."""
        return f"{'sharded' if self.is_sharded else 'replicated'}-{self.width}"

    @property
    def offsets(self) -> dict[str, int]:
        """The first row of each table in a rank's array, the same on every rank."""
        offsets, offset = {}, 0
        for table, size in self.sizes.items():
            offsets[table] = offset
            offset += -(-size // self.ranks)
        return offsets

    @property
    def local_rows(self) -> int:
        """The number of rows in a rank's array."""
        return sum(-(-size // self.ranks) for size in self.sizes.values())

    @property
    def key_type(self) -> type[np.uint32] | type[np.int64]:
        """The smallest dtype that holds all keys, see `keys`."""
        return np.uint32 if self.ranks * self.local_rows <= 2**32 else np.int64

    def local_ids(self, table: str, rank: int) -> Array:
        """Return the ids of a table's rows on a rank, int64, in the order of its array."""
        return np.arange(rank if self.is_sharded else 0, self.sizes[table], self.ranks)

    def keys(self, table: str, codes: Array) -> Array:
        """Return ``owner rank * local_rows + index in its array`` for each code.

        Keys have dtype `key_type` and the shape of `codes`. The rows of MISSING of all tables,
        which are zero, share key 0.
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
    """Choose the placement of tables, given the rows and the width of each, and group them.

    ``auto`` shards tables of at least `shard_from_bytes` (float32). One rank shards nothing.
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
    """Return the bytes of a rank's rows with their optimizer state, all float32.

    `state_widths` gives the numbers of optimizer state per row, by width of the table.
    """
    return sum(4 * g.local_rows * (g.width + state_widths[g.width]) for g in groups)
