"""Workers for what comes before and after training: the ranks of an MPI job, or a pool.

Rank 0 does the work and shares out its tasks through `mpi4py.futures`; the other ranks do nothing
else. Horovod is not needed for that and is not started.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from hvdrec.errors import SharedError, UserError
from hvdrec.parallel.pool import Workers, local_workers

if TYPE_CHECKING:
    from mpi4py.futures import MPIPoolExecutor
    from mpi4py.MPI import Intracomm

MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
"""Set by MPI launchers, by `horovodrun --mpi` too: they tell that there is one, no more."""
HEAD_START_SECONDS = 1.0

_rank = 0


def is_first() -> bool:
    """Return whether this process is the first of its MPI job, or alone."""
    return _rank == 0


@contextmanager
def open_workers(count: int) -> Iterator[Workers | None]:
    """Yield workers for tasks; on all ranks of an MPI job but the first, None.

    Those ranks have then done what the first one asked of them: there is nothing left to do. In an
    MPI job of several ranks these are the workers, else ``count`` processes on this machine (see
    `local_workers`). An error that ends the block on the first rank is raised as SharedError on the
    others, so that all of them fail. Raises UserError for a negative count, and on ranks
    that know no MPI (horovodrun --gloo).
    """
    global _rank  # noqa: PLW0603 -- one job per process
    if count < 0:
        raise UserError(
            f"--workers {count}: must not be negative; leave it out for one for each core"
        )
    world = _world()
    if world is None or world.Get_size() == 1:
        with local_workers(count) as workers:
            yield workers
        return
    _rank = world.Get_rank()
    if _rank == 0:
        with _led(world) as workers:
            yield workers
    else:
        _follow(world)
        yield None


def _world() -> Intracomm | None:
    """Return the ranks of this process's MPI job, if it is in one."""
    global _rank  # noqa: PLW0603 -- one job per process
    if any(name in os.environ for name in MPI_VARIABLES):
        from mpi4py import MPI

        return MPI.COMM_WORLD
    if int(os.environ.get("HOROVOD_SIZE", "1")) > 1:
        _rank = int(os.environ.get("HOROVOD_RANK", "0"))
        if _rank:
            # The launcher ends the job with the first rank that exits; rank 0 prints the error.
            time.sleep(HEAD_START_SECONDS)
        raise SharedError(
            "these ranks have no MPI, which shares the work of this stage: start it with mpirun "
            "or horovodrun --mpi, or in one process with --workers N"
        )
    return None


@contextmanager
def _led(world: Intracomm) -> Iterator[Workers]:
    """Yield the other ranks as workers, and tell them at the end how it went."""
    from mpi4py.futures import MPICommExecutor

    message: str | None = "the first rank failed"
    try:
        with MPICommExecutor(world, root=0) as executor:
            workers = Workers(cast("MPIPoolExecutor", executor), world.Get_size() - 1)
            with _tidied_when_ended(workers):
                yield workers
        message = None
    except UserError as error:
        message = str(error)
        raise
    finally:
        world.bcast(message, root=0)


@contextmanager
def _tidied_when_ended(workers: Workers) -> Iterator[None]:
    """Let a block clean up after itself when the launcher ends the job, as if it had failed."""

    def end(number: int, frame: object) -> None:
        workers.are_gone = True
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if workers.are_gone:
            # The others may be gone, too: no farewell between ranks.
            os._exit(128 + signal.SIGTERM)


def _follow(world: Intracomm) -> None:
    """Do what the first rank asks for, until it ends; SharedError if it ends with an error."""
    from mpi4py.futures import MPICommExecutor

    with MPICommExecutor(world, root=0):
        pass
    message = world.bcast(None, root=0)
    if message is not None:
        raise SharedError(message)
