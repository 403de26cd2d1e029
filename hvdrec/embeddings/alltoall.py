"""Alltoall of a varying number of rows, in messages that hit Horovod's response cache.

Horovod caches collectives by name and tensor shape. For any other collective, all ranks negotiate
with rank 0 first, which is most expensive with Gloo. The number of rows changes in each step, so
send buffers are padded to a fixed shape; the padding is not sent.
"""

from __future__ import annotations

from torch import Tensor

_capacities: dict[str, int] = {}
"""The rows of the send buffer for each name of a collective; names belong to the process."""


def start_alltoall(rows: Tensor, counts: Tensor, name: str) -> int:
    """Start to send rows to each rank; every rank must call this together.

    Args:
        rows: The rows for all ranks [n, ...], in rank order.
        counts: The number of rows for each rank, int32 [ranks] on the CPU.
        name: The name of the collective, the same in each step.

    Returns:
        A handle; `ranks.wait` returns the received rows in rank order, and their count by rank.
    """
    import horovod.torch as hvd

    count = rows.shape[0]
    buffer = rows.new_empty(padded_rows(name, count), *rows.shape[1:])
    buffer[:count] = rows
    handle: int = hvd.alltoall_async(buffer, splits=counts, name=name)
    return handle


def padded_rows(name: str, count: int) -> int:
    """Return the size of a send buffer for `count` rows; it stays the same for similar counts."""
    capacity = _capacities.get(name, 0)
    if not count <= capacity <= 2 * count:
        capacity = _capacities[name] = count + count // 8 + 1
    return capacity
