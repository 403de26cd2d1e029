"""Rows from each rank to each, as many as a step has, in messages that Horovod knows again.

It knows a collective by its name and its tensor's shape, and about one that it does not know all
ranks ask the first one, which costs most under Gloo. The number of rows changes with each step: so
they are sent from tensors that have room behind them, which does not travel.
"""

from __future__ import annotations

from torch import Tensor

_rooms: dict[str, int] = {}
"""By a collective's name, which belongs to the process: the rows that its tensor has place for."""


def begin_alltoall(rows: Tensor, counts: Tensor, name: str) -> int:
    """Begin to send rows [n, ...], rank by rank as many as `counts` (int32 [ranks], of the CPU).

    Every rank must call this together. Waiting for the handle that is returned gives what came, in
    order of rank, and how many rows from each.
    """
    import horovod.torch as hvd

    count = rows.shape[0]
    given = rows.new_empty(_room(name, count), *rows.shape[1:])
    given[:count] = rows
    handle: int = hvd.alltoall_async(given, splits=counts, name=name)
    return handle


def _room(name: str, count: int) -> int:
    """Return the same number of rows at least as large as `count`, while that changes little."""
    room = _rooms.get(name, 0)
    if not count <= room <= 2 * count:
        room = _rooms[name] = count + count // 8 + 1
    return room
