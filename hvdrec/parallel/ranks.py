"""The ranks of a job, and collectives for everything but gradients."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from hvdrec.errors import SharedError, UserError, invalid_value
from hvdrec.parallel import agreement, environment

T = TypeVar("T")

SILENCE_VARIABLE = "HVDREC_SILENCE_SECONDS"
"""Environment variable with the number of seconds without a sign of life after which a rank counts
as lost; 0 disables the check."""
DEFAULT_SILENCE = 25.0
GLOO_TIMEOUT_VARIABLE = "HOROVOD_GLOO_TIMEOUT_SECONDS"
MIN_GLOO_TIMEOUT = 30.0
"""The smallest timeout of Gloo for a message. Gloo's error does not name the lost rank, so the
watchdog must report the loss first."""

SPIN_SECONDS, SLEEP_SECONDS = 5e-5, 1e-4
"""How long `wait` polls without a pause, and how long it then sleeps between polls."""
FIRST_RANK_LEAD_SECONDS = 1.0
"""Time that the other ranks wait, so that rank 0 can report an error first: launchers stop all
ranks as soon as one ends."""

Array = NDArray[Any]


@dataclass(frozen=True)
class World:
    """The rank of this process, and the size of the job.

    Attributes:
        rank: The number of this process, from 0 to `size` - 1.
        size: The number of ranks of the job (the world size).
        local_rank: The number of this process among the `local_size` ranks of its host.
        local_size: The number of ranks on this host.
        hosts: The host name of every rank.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    hosts: tuple[str, ...] = ()

    @property
    def is_first(self) -> bool:
        """True on rank 0, which writes files and prints for the job."""
        return self.rank == 0

    def describe(self, *ranks: int) -> str:
        """Format ranks with their hosts, such as ``rank 1 on hv2``."""
        return agreement.describe_ranks(ranks, self.hosts)


_world: World | None = None
_waited_seconds = 0.0


def silence_seconds() -> float:
    """Return after how many seconds without a sign of life a rank counts as lost; 0 means never."""
    text = os.environ.get(SILENCE_VARIABLE, str(DEFAULT_SILENCE))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (seconds == 0 or 1 <= seconds < math.inf):
        raise invalid_value(SILENCE_VARIABLE, text, "must be 0 (never) or at least 1 second")
    return seconds


def init() -> World:
    """Start Horovod on the first call, and return this process's rank and the size of the job.

    Raises:
        UserError: Horovod is not installed or does not start.
        SharedError: The versions in `agreement.versions` differ between hosts.
    """
    global _world  # noqa: PLW0603 -- one job per process, as in Horovod itself
    if _world is None:
        host = agreement.host_name()
        _start_horovod(host)
        import horovod.torch as hvd

        _world = World(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), (host,))
        environment.check_process_count(host, _world.size)
        _world = replace(_world, hosts=tuple(gather_objects(host)))
        versions = gather_objects(agreement.versions())
        message = agreement.version_differences(versions, _world.hosts)
        if message is not None:
            raise_shared(message)
    return _world


def _start_horovod(host: str) -> None:
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise UserError(
            f"horovod: cannot be imported ({error}); install it with scripts/install, or build a "
            "wheel for pip: scripts/build_horovod wheel --to wheels/",
            field="horovod",
        ) from None
    timeout = max(MIN_GLOO_TIMEOUT, silence_seconds() + 5)
    os.environ.setdefault(GLOO_TIMEOUT_VARIABLE, f"{timeout:.0f}")
    before = set(os.environ)
    environment.set_horovod_defaults()
    environment.check_gloo_address(host)
    environment.check_rendezvous(host)
    try:
        hvd.init()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{host}: Horovod does not start ({error}); a host is down, a firewall is between "
            "the hosts, or a rank has ended: see the lines above, and run hvdrec hosts",
            field=host,
        ) from None
    finally:
        # This process (a notebook, say) may later start a launcher, which must not inherit these
        # variables.
        for name in environment.SINGLE_PROCESS_DEFAULTS.keys() - before:
            os.environ.pop(name, None)


def current() -> World:
    """Return this process's rank and the size of the job; before `init`, a job of one rank."""
    return _world or World()


@contextmanager
def single_rank() -> Iterator[World]:
    """Let this process work as if it were the only rank: `current` returns a job of one rank."""
    global _world  # noqa: PLW0603 -- see init
    before, _world = _world, None
    try:
        yield current()
    finally:
        _world = before


def wait(handle: int) -> Any:
    """Wait for a collective and return its result, as ``hvd.synchronize`` does.

    ``hvd.synchronize`` keeps a core busy while it waits. Horovod's own thread and other ranks of
    the host may need that core: with two ranks per core, steps took ten times as long with
    ``hvd.synchronize``. This function sleeps between polls.
    """
    global _waited_seconds  # noqa: PLW0603 -- a counter of the process
    import horovod.torch as hvd

    started = time.perf_counter()
    while not hvd.poll(handle):
        if time.perf_counter() - started > SPIN_SECONDS:
            time.sleep(SLEEP_SECONDS)
    result = hvd.synchronize(handle)
    _waited_seconds += time.perf_counter() - started
    return result


def waited_seconds() -> float:
    """Return how many seconds this process has waited for collectives so far."""
    return _waited_seconds


def barrier() -> None:
    """Wait until every rank has called this."""
    if current().size > 1:
        import horovod.torch as hvd

        wait(hvd.allreduce_async(torch.zeros(1), op=hvd.Sum, name="barrier"))


def sum_arrays(array: Array) -> Array:
    """Return the element-wise sum of an array over the ranks, float64 or int64, on every rank."""
    if current().size == 1:
        return array
    import horovod.torch as hvd

    wide = np.ascontiguousarray(array, dtype=np.int64 if array.dtype.kind in "iub" else np.float64)
    # Not every transport of Horovod supports tensors without dimensions, so a dimension is added.
    mine = torch.from_numpy(wide.reshape(-1).copy())
    total = wait(hvd.allreduce_async(mine, op=hvd.Sum, name="sum_arrays"))
    return np.asarray(total.numpy()).reshape(array.shape)


def gather_arrays(array: Array) -> Array:
    """Concatenate the arrays of all ranks in rank order; they may have different lengths."""
    if current().size == 1:
        return array
    import horovod.torch as hvd

    tail = array.shape[1:]
    flat = np.ascontiguousarray(array).reshape(array.shape[0], math.prod(tail))
    gathered = wait(hvd.allgather_async(torch.from_numpy(flat.copy()), name="gather_arrays"))
    return np.asarray(gathered.numpy()).reshape(-1, *tail)


def gather_objects(value: Any) -> list[Any]:
    """Return a list of the values of all ranks, in rank order; a value must be valid JSON."""
    if current().size == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
    lengths = gather_arrays(np.array([text.size], dtype=np.int64))
    joined = gather_arrays(text).tobytes()
    ends = np.cumsum(lengths)
    return [json.loads(joined[e - n : e]) for e, n in zip(ends, lengths, strict=True)]


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value on every rank; it must be valid JSON."""
    if current().size == 1:
        return value
    return gather_objects(value if current().is_first else None)[0]


def run_on_all(action: Callable[[], T]) -> T:
    """Run an action on every rank; if it fails on one rank, raise an error on all of them.

    All ranks must call this at the same time. If an action simply failed on one rank, the other
    ranks would wait for that rank in their next collective.

    Raises:
        SharedError: The action raised UserError on at least one rank.
    """
    result: Sequence[T] = ()
    mistake: list[str] | None = None
    try:
        result = (action(),)
    except UserError as error:
        mistake = [str(error), error.field]
    mistakes = gather_objects(mistake)
    failed = [rank for rank, each in enumerate(mistakes) if each is not None]
    if failed:
        text, field = mistakes[failed[0]]
        same = [rank for rank in failed if mistakes[rank] == mistakes[failed[0]]]
        where = "" if len(same) == len(mistakes) else f"{current().describe(*same)}: "
        raise_shared(f"{where}{text}", field)
    return result[0]


def raise_shared(text: str, field: str = "") -> NoReturn:
    """Raise SharedError on all ranks; ranks other than 0 first wait while rank 0 prints it."""
    if not current().is_first:
        time.sleep(FIRST_RANK_LEAD_SECONDS)
    raise SharedError(text, field=field)
