"""The ranks of a job and what they tell each other outside the gradient."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from hvdrec.errors import SharedError, UserError
from hvdrec.parallel import agreement
from hvdrec.parallel.environment import (
    check_gloo_address,
    check_rendezvous,
    is_launched,
    set_environment,
    unseen_processes,
)

T = TypeVar("T")

SILENCE_VARIABLE = "HVDREC_SILENCE_SECONDS"
"""Seconds after which a rank that gives no sign of life counts as lost; 0: never."""
DEFAULT_SILENCE = 25.0
GLOO_VARIABLE = "HOROVOD_GLOO_TIMEOUT_SECONDS"
GLOO_SECONDS = 30.0
"""Horovod's own limit for a message under Gloo, which tells less: it must not come first."""

SPIN_SECONDS, SLEEP_SECONDS = 5e-5, 1e-4
"""How long `wait` looks without a pause, and how long it pauses between two looks after that."""
SPEAK_SECONDS = 1.0
"""Head start of the first rank in telling a mistake: a launcher ends it with whoever ends first."""

Array = NDArray[Any]


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size` in the job, `local_rank` of `local_size` on a host.

    hosts: the name of every rank's host.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    hosts: tuple[str, ...] = ()

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and talks to people."""
        return self.rank == 0

    def place(self, *ranks: int) -> str:
        """Return where ranks are, for people: ``rank 1 on hv2``."""
        return agreement.places(ranks, self.hosts)


_world: World | None = None


def silence_seconds() -> float:
    """Return after how many seconds a silent rank counts as lost; 0: never."""
    text = os.environ.get(SILENCE_VARIABLE, str(DEFAULT_SILENCE))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (seconds == 0 or 1 <= seconds < math.inf):
        raise UserError(f"{SILENCE_VARIABLE} = {text}: must be 0 (never) or at least 1 second")
    return seconds


def init() -> World:
    """Start Horovod (once) and return this process's place in the job.

    Raises UserError where Horovod is not installed or does not start, and SharedError where the
    hosts have different versions of what is in `agreement.versions`.
    """
    global _world  # noqa: PLW0603 -- one job per process, as in Horovod itself
    if _world is None:
        try:
            import horovod.torch as hvd
        except ImportError as error:
            raise UserError(
                f"horovod: cannot be imported ({error}); install it with scripts/install"
            ) from None
        if not is_launched():
            # A process alone needs no MPI runtime, which would want its daemon on the path.
            os.environ.setdefault("HOROVOD_CONTROLLER", "gloo")
            os.environ.setdefault("HOROVOD_CPU_OPERATIONS", "gloo")
        os.environ.setdefault(GLOO_VARIABLE, f"{max(GLOO_SECONDS, silence_seconds() + 5):.0f}")
        set_environment()
        host = agreement.host_name()
        check_gloo_address(host)
        check_rendezvous(host)
        try:
            hvd.init()
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{host}: Horovod does not start ({error}); a host is down, a firewall is between "
                "them, or a rank has ended: see the lines above, and hvdrec hosts"
            ) from None
        _world = World(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), (host,))
        _check_launcher(_world)
        _world = replace(_world, hosts=tuple(gather_objects(host)))
        told = agreement.different_versions(gather_objects(agreement.versions()), _world.hosts)
        if told is not None:
            _raise_shared(told)
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
        first = messages[failed[0]]
        same = [rank for rank in failed if messages[rank] == first]
        who = "" if len(same) == len(messages) else f"{current().place(*same)}: "
        _raise_shared(f"{who}{first}")
    return result[0]


def agree_on_config(config: Mapping[str, Any]) -> None:
    """Raise SharedError, which names field and hosts, unless all ranks have one configuration."""
    text = json.dumps(config, sort_keys=True)
    if len(set(gather_objects(hashlib.sha256(text.encode()).hexdigest()))) > 1:
        told = agreement.different_fields(gather_objects(json.loads(text)), current().hosts)
        if told is not None:
            _raise_shared(told)


def agree_on_files(place: agreement.Place, remedy: str) -> None:
    """Raise SharedError, which names the hosts, unless all ranks see the same file or artifact."""
    seen = together(lambda: agreement.digest(place))
    told = agreement.difference(gather_objects(seen), current().hosts)
    if told is not None:
        _raise_shared(f"{place}: is not the same on every host: {told}; {remedy}")


def _check_launcher(world: World) -> None:
    """Raise UserError where Horovod does not know of the processes that were started with it."""
    unseen = unseen_processes(world.size)
    if unseen is not None:
        raise UserError(
            f"{world.hosts[0]}: the launcher has started {unseen[1]} processes ({unseen[0]}), "
            "Horovod sees one: use the mpirun of the MPI that it was built with, or horovodrun"
        )


def _raise_shared(text: str) -> NoReturn:
    """Raise SharedError; the first rank is ahead of the others."""
    if not current().is_first:
        time.sleep(SPEAK_SECONDS)
    raise SharedError(text)
