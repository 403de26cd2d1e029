"""Which rank holds which row of which embedding table.

Tables of one width and placement form a group: their rows are kept in one array, travel in one
exchange and are updated together. Of a sharded table, row ``id`` lives on rank ``id % N`` at
``id // N``; a replicated table lives whole on every rank.
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
class Group:
    """Tables of one width and placement.

    rows: the rows of each table; ranks: over how many ranks they are sharded, 1 if they are
    replicated.
    """

    width: int
    ranks: int
    rows: Mapping[str, int]

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a part."""
        return self.ranks > 1

    @property
    def name(self) -> str:
        """Return what its collectives and files are named after."""
        return f"{'sharded' if self.is_sharded else 'replicated'}-{self.width}"

    @property
    def bases(self) -> dict[str, int]:
        """Return where each table begins in a rank's array, the same on every rank."""
        found, base = {}, 0
        for table, rows in self.rows.items():
            found[table] = base
            base += -(-rows // self.ranks)
        return found

    @property
    def local_rows(self) -> int:
        """Return the length of a rank's array."""
        return sum(-(-rows // self.ranks) for rows in self.rows.values())

    @property
    def key_type(self) -> type[np.uint32] | type[np.int64]:
        """Return the smallest type that holds all keys, see `keys`."""
        return np.uint32 if self.ranks * self.local_rows <= 2**32 else np.int64

    def ids(self, table: str, rank: int) -> Array:
        """Return which rows of a table a rank holds, int64, in their order there."""
        return np.arange(rank if self.is_sharded else 0, self.rows[table], self.ranks)

    def keys(self, table: str, codes: Array) -> Array:
        """Return ``owner * local_rows + place there`` of codes, `key_type` of the same shape.

        The rows of MISSING of all tables, which are zero, share key 0.
        """
        base = self.bases[table]
        codes = codes.astype(self.key_type)  # in that of the codes, keys could be too large
        if self.is_sharded:
            place, owner = np.divmod(codes, self.ranks)
            keys = owner * self.local_rows + place + base
        else:
            keys = codes + base
        if base:
            keys[codes == MISSING] = 0
        return np.asarray(keys)


def arrange(
    rows: Mapping[str, int],
    widths: Mapping[str, int],
    ranks: int,
    placement: Placement = "auto",
    shard_from_bytes: int = 0,
) -> tuple[Group, ...]:
    """Put tables into groups.

    rows, widths: of each table. With ``auto`` those of at least ``shard_from_bytes`` (float32) are
    sharded; one rank has nothing to shard.
    """
    groups: dict[tuple[int, bool], dict[str, int]] = {}
    for table, count in rows.items():
        is_large = 4 * count * widths[table] >= shard_from_bytes
        shards = ranks > 1 and (placement == "sharded" or (placement == "auto" and is_large))
        groups.setdefault((widths[table], shards), {})[table] = count
    return tuple(
        Group(width, ranks if shards else 1, tables)
        for (width, shards), tables in sorted(groups.items())
    )


def bytes_of_rows(groups: Sequence[Group], state_width: Mapping[int, int]) -> int:
    """Return the bytes of a rank's rows with their optimizer state, all float32.

    state_width: width of a table -> numbers of optimizer state beside each row.
    """
    return sum(4 * g.local_rows * (g.width + state_width[g.width]) for g in groups)
