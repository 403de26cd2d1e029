"""The ranks of a job and what they tell each other outside the gradient."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from hvdrec.errors import SharedError, UserError

T = TypeVar("T")

LAUNCHER_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
"""Set by horovodrun, Open MPI, and other MPI launchers: they tell that there is one, no more."""

SPIN_SECONDS, SLEEP_SECONDS = 5e-5, 1e-4
"""How long `wait` looks without a pause, and how long it pauses between two looks after that."""

Array = NDArray[Any]


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size` in the job, `local_rank` of `local_size` on a host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and talks to people."""
        return self.rank == 0


_world: World | None = None


def init() -> World:
    """Start Horovod (once) and return this process's place in the job.

    Raises UserError where Horovod is not installed.
    """
    global _world  # noqa: PLW0603 -- one job per process, as in Horovod itself
    if _world is None:
        try:
            import horovod.torch as hvd
        except ImportError as error:
            raise UserError(
                f"horovod: cannot be imported ({error}); install it with scripts/install"
            ) from None
        if not any(name in os.environ for name in LAUNCHER_VARIABLES):
            # A process alone needs no MPI runtime, which would want its daemon on the path.
            os.environ.setdefault("HOROVOD_CONTROLLER", "gloo")
            os.environ.setdefault("HOROVOD_CPU_OPERATIONS", "gloo")
        hvd.init()
        _world = World(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size())
    return _world


def current() -> World:
    """Return the place of this process; before `init`, that of a process alone."""
    return _world or World()


@contextmanager
def alone() -> Iterator[World]:
    """Let this process work as if it had no other ranks; all of them may do so at a time."""
    global _world  # noqa: PLW0603 -- see init
    before, _world = _world, None
    try:
        yield current()
    finally:
        _world = before


def wait(handle: int) -> Any:
    """Wait for a collective that was begun and return its result, as ``hvd.synchronize`` does.

    That one keeps a core busy until the result is there, which Horovod's own thread and other ranks
    of the host may need: with two ranks to a core it made steps ten times longer.
    """
    import horovod.torch as hvd

    began = time.perf_counter()
    while not hvd.poll(handle):
        if time.perf_counter() - began > SPIN_SECONDS:
            time.sleep(SLEEP_SECONDS)
    return hvd.synchronize(handle)


def barrier() -> None:
    """Wait until every rank is here."""
    if current().size > 1:
        import horovod.torch as hvd

        wait(hvd.allreduce_async(torch.zeros(1), op=hvd.Sum, name="barrier"))


def sum_arrays(array: Array) -> Array:
    """Return the element-wise sum of an array over the ranks, float64 or int64, on every rank."""
    if current().size == 1:
        return array
    import horovod.torch as hvd

    wide = np.ascontiguousarray(array, dtype=np.int64 if array.dtype.kind in "iub" else np.float64)
    # Horovod has no zero-dimensional tensors on every transport: always send one dimension.
    mine = torch.from_numpy(wide.reshape(-1).copy())
    total = wait(hvd.allreduce_async(mine, op=hvd.Sum, name="sum_arrays"))
    return np.asarray(total.numpy()).reshape(array.shape)


def gather_arrays(array: Array) -> Array:
    """Return the ranks' arrays, of any lengths, joined in order of rank, on every rank."""
    if current().size == 1:
        return array
    import horovod.torch as hvd

    tail = array.shape[1:]
    flat = np.ascontiguousarray(array).reshape(array.shape[0], math.prod(tail))
    gathered = wait(hvd.allgather_async(torch.from_numpy(flat.copy()), name="gather_arrays"))
    return np.asarray(gathered.numpy()).reshape(-1, *tail)


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's JSON value, in order of rank, on every rank."""
    if current().size == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
    lengths = gather_arrays(np.array([text.size], dtype=np.int64))
    joined = gather_arrays(text).tobytes()
    ends = np.cumsum(lengths)
    return [
        json.loads(joined[end - length : end]) for end, length in zip(ends, lengths, strict=True)
    ]


def broadcast_object(value: Any) -> Any:
    """Return the first rank's JSON value on every rank."""
    if current().size == 1:
        return value
    return gather_objects(value if current().is_first else None)[0]


def together(action: Callable[[], T]) -> T:
    """Run an action on every rank; a user's mistake on any of them is raised on all of them.

    Without this a rank that stops alone would leave the others waiting in a collective. Raises
    SharedError.
    """
    result: Sequence[T] = ()
    message: str | None = None
    try:
        result = (action(),)
    except UserError as error:
        message = str(error)
    messages = gather_objects(message)
    failed = [rank for rank, text in enumerate(messages) if text is not None]
    if failed:
        everywhere = len(set(messages)) == 1
        who = "" if everywhere or len(messages) == 1 else f"rank {failed[0]}: "
        raise SharedError(f"{who}{messages[failed[0]]}")
    return result[0]
