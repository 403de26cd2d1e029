"""Shares of time: from measured seconds, from nvidia-smi's lines, and from a profile."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from statistics import mean

Interval = tuple[float, float]


def shares_of_time(
    wall: float, reading: float, exchange: float, busy: float | None
) -> dict[str, float]:
    """Return the shares of the wall time, which add up to one.

    Args:
        wall: Seconds of all steps.
        reading: Seconds in which the step waited for the loader.
        exchange: Seconds in which it waited for other ranks.
        busy: Share of the time in which the GPU ran a kernel, between 0 and 1; None on a CPU, where
            all the rest is compute.
    """
    read, sent = reading / wall, exchange / wall
    rest = max(0.0, 1.0 - read - sent)
    if busy is None:
        return {"reading": read, "exchange": sent, "compute": rest}
    compute = min(busy, rest)
    return {"reading": read, "exchange": sent, "compute": compute, "host": rest - compute}


def gpu_figures(lines: Sequence[str]) -> dict[str, float]:
    """Return the mean utilization and the largest memory of nvidia-smi's lines; {} if none."""
    pairs = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the last line may be cut off, or "[N/A]"
            use, memory = line.split(",")
            pairs.append((float(use), float(memory)))
    if not pairs:
        return {}
    return {
        "busy_share": mean(use for use, _ in pairs) / 100,
        "memory_mb": max(memory for _, memory in pairs),
        "samples": len(pairs),
    }


def covered(intervals: Sequence[Interval]) -> float:
    """Return the length of the union of some intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
