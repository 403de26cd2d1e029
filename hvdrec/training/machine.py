"""This process on its machine: device, threads, memory."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hvdrec.config import Config
from hvdrec.errors import UserError
from hvdrec.parallel.ranks import World

# Of malloc.h; the largest threshold that glibc takes for the first.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_THRESHOLD = 32 << 20


def pick_device(config: Config, world: World) -> torch.device:
    """Return where this rank computes: its own GPU, by its rank on the host, or the CPU."""
    wanted = config.train.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("train.device = 'cuda': no GPU is visible here; use 'cpu' or 'auto'")
    device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def set_threads(config: Config, world: World) -> None:
    """Give this rank its share of the machine's CPU threads."""
    cores = len(os.sched_getaffinity(0))
    set_up_process(config.train.threads or max(1, cores // world.local_size))


def set_up_process(threads: int) -> None:
    """Set threads, and what makes steps on a CPU fast."""
    torch.set_num_threads(threads)
    # Decaying weights reach denormal numbers, on which CPUs are many times slower.
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        # Activations of some megabytes are allocated in every step: by default glibc gives such
        # memory back to the kernel each time and gets it again page by page.
        allocator = ctypes.CDLL(None)
        if hasattr(allocator, "mallopt"):
            allocator.mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
            allocator.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def collector_spared() -> Iterator[None]:
    """Let Python's garbage collector pass over all that is there now, for a while.

    To look through everything that was imported takes it some 0.15 s, in the midst of a step, and
    the other ranks wait as long.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
