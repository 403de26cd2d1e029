"""Set up this process on its machine: device, threads, memory allocator, garbage collector."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from hvdrec.errors import invalid_value
from hvdrec.parallel.ranks import World

# From malloc.h. LARGEST_THRESHOLD is the highest value that glibc accepts for M_MMAP_THRESHOLD.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_THRESHOLD = 32 << 20
CPU_FACTS = Path("/proc/cpuinfo")


def pick_device(option: Literal["auto", "cpu", "cuda"], world: World) -> torch.device:
    """Return the device of this rank: the CPU, or the GPU with this rank's number on its host.

    Args:
        option: ``train.device``.
        world: Number of this rank on its host.

    Raises:
        UserError: ``train.device`` is "cuda", but no GPU is visible.
    """
    if option == "cpu" or (option == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise invalid_value("train.device", option, "no GPU is visible here", "use 'cpu' or 'auto'")
    device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def has_bf16(device: torch.device, *, fast: bool = False) -> bool:
    """Return True if a device has bf16 instructions, or if it is a CPU with unknown instructions.

    Args:
        device: The device.
        fast: True to ask for matrix units (AMX, tensor cores), with which bf16 is faster than
            float32. The result is then False for a CPU with unknown instructions.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        text = CPU_FACTS.read_text()
    except OSError:
        return not fast
    flags = {flag for line in text.splitlines() for flag in line.partition(":")[2].split()}
    return not flags.isdisjoint({"amx_bf16"} if fast else {"amx_bf16", "avx512_bf16", "bf16"})


def set_threads(option: int, world: World) -> None:
    """Give this rank its share of the host's CPU threads.

    Args:
        option: ``train.threads``; 0 for the number of cores divided by the ranks on the host.
        world: Number of this rank, and number of ranks on this host.
    """
    cores = len(os.sched_getaffinity(0))
    set_up_process(option or max(1, cores // world.local_size))


def set_up_process(threads: int) -> None:
    """Set the number of threads, and settings of the process that make steps on a CPU fast."""
    torch.set_num_threads(threads)
    # Weights that decay towards 0 become denormal numbers. CPUs compute with these many times
    # slower than with other numbers.
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        # Each step allocates some megabytes of activations. By default, glibc returns this memory
        # to the kernel when it is freed, so the next step has a page fault for each page again.
        allocator = ctypes.CDLL(None)
        if hasattr(allocator, "mallopt"):
            allocator.mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
            allocator.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def no_gc_pauses() -> Iterator[None]:
    """Keep all current objects out of Python's garbage collections in the ``with`` body.

    A collection over all imported objects takes about 0.15 s. If it happened in the middle of a
    step, the other ranks would wait for this rank.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
