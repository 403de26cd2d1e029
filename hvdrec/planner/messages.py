"""How long this job's collectives take."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from hvdrec.parallel.ranks import current, wait

SMALL, LARGE = 1 << 10, 1 << 22
TURNS = 15


def time_messages() -> tuple[float, float]:
    """Return the seconds of a collective without content, and of each byte that a rank sends.

    Every rank of a job of several must call this together.
    """
    import horovod.torch as hvd

    size = current().size
    others = (size - 1) / size

    def reduce(count: int) -> None:
        wait(hvd.allreduce_async(torch.zeros(count), op=hvd.Sum, name=f"trial/reduce/{count}"))

    def spread(count: int) -> None:
        splits = torch.full((size,), count // size, dtype=torch.int32)
        values = torch.zeros(int(splits.sum()))
        wait(hvd.alltoall_async(values, splits=splits, name=f"trial/spread/{count}"))

    small = (_median(reduce, SMALL) + _median(spread, SMALL)) / 2
    bytes_sent = 4 * LARGE * others * (2 + 1)
    large = _median(reduce, LARGE) + _median(spread, LARGE)
    return small, max((large - 2 * small) / bytes_sent, 1e-12)


def _median(collective: Callable[[int], None], count: int) -> float:
    times = []
    for _ in range(TURNS):
        started = time.perf_counter()
        collective(count)
        times.append(time.perf_counter() - started)
    return float(np.median(times[3:]))
