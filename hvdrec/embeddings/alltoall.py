"""Alltoall of a varying number of rows that hits Horovod's response cache in most steps.

Horovod caches its plan for a collective by name and tensor shape. If a name is used with a new
shape, all ranks first negotiate with rank 0, which is slow, most of all with Gloo. The number of
rows changes in each step, so send buffers are padded to a shape that rarely changes. The padding is
not sent.
"""

from __future__ import annotations

from torch import Tensor

_capacities: dict[str, int] = {}
"""Name of a collective -> number of rows of its send buffer, for the whole process."""


def start_alltoall(rows: Tensor, counts: Tensor, name: str) -> int:
    """Start to send some rows to each rank; all ranks must call this at the same time.

    Args:
        rows: [n, ...], first the rows for rank 0, then those for rank 1, and so on.
        counts: int32 [ranks] on the CPU, the number of rows for each rank.
        name: The name of the collective, the same in each step.

    Returns:
        A handle. `ranks.wait` turns it into the received rows, ordered by sending rank, and the
        number of rows from each rank.
    """
    import horovod.torch as hvd

    count = rows.shape[0]
    buffer = rows.new_empty(padded_rows(name, count), *rows.shape[1:])
    buffer[:count] = rows
    handle: int = hvd.alltoall_async(buffer, splits=counts, name=name)
    return handle


def padded_rows(name: str, count: int) -> int:
    """Return the size of the send buffer for `count` rows; similar counts give the same size."""
    capacity = _capacities.get(name, 0)
    if not count <= capacity <= 2 * count:
        capacity = _capacities[name] = count + count // 8 + 1
    return capacity
