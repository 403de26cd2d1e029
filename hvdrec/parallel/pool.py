"""Run tasks on several processes and return their results in the order of the tasks.

The processes are started on this machine (`local_pool`) or are the ranks of an MPI job
(`open_pool`). A task is a module-level function with small arguments, such as the path of its
input and the part to process. Its result must depend only on these arguments, so that any number of
workers gives the same results.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar, cast

from hvdrec.errors import SharedError, UserError, invalid_value

if TYPE_CHECKING:
    from mpi4py.futures import MPIPoolExecutor
    from mpi4py.MPI import Intracomm

Task = TypeVar("Task")
Result = TypeVar("Result")

TASKS_PER_HELPER = 2
"""How many tasks each helper process has at a time: one runs, the others are ready to start."""
RESULTS_PER_WORKER = 4
"""How many finished results per worker may wait until earlier results are consumed."""
DEFAULT_WORKERS, HEAD_START_SECONDS = 8, 1.0
"""The largest number of workers by default, and how long this process works alone before it starts
others. Each worker needs a second to start, and memory of its own."""
MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
"""Set by MPI launchers, `horovodrun --mpi` included. Only their presence is checked, because
launchers give them different values."""
FOLLOW_SECONDS = 10.0
"""Time that the other ranks wait after an error, so that rank 0 reports it and the launcher then
stops them."""

_rank = 0


class WorkerPool:
    """A group of processes that share work: this process and its helpers.

    This process gives tasks to the helpers through a `concurrent.futures.Executor`.

    Attributes:
        helpers: The number of helpers.
        is_broken: True if a helper may have died. `map` then does not wait for running tasks.
    """

    def __init__(
        self, executor: Executor | None = None, helpers: int = 0, head_start: float = 0.0
    ) -> None:
        """Create a pool; this process works alone for `head_start` seconds from the first task."""
        self._executor, self.helpers = executor, helpers if executor is not None else 0
        self._head_start, self._started = head_start, None if head_start else 0.0
        self.is_broken = False

    def map(
        self, function: Callable[[Task], Result], tasks: Iterable[Task]
    ) -> Generator[Result, None, None]:
        """Yield the result of each task, in the order of the tasks.

        Tasks are taken from the iterable when a worker is free. Instead of waiting for helpers,
        this process runs tasks itself. If a task fails or the generator is closed, tasks that have
        not started are cancelled and running ones are awaited, so that no helper works afterwards.

        Raises:
            UserError: A helper process has died.
            Exception: The error of a task; if several tasks fail, the error of the first of them.
        """
        remaining = iter(tasks)
        none = object()
        pending: deque[Future[Result]] = deque()
        if self._started is None:
            self._started = time.monotonic()
        try:
            while True:
                busy = sum(not future.done() for future in pending)
                is_alone = time.monotonic() - self._started < self._head_start
                while (
                    self._executor is not None
                    and not is_alone
                    and busy < TASKS_PER_HELPER * self.helpers
                ):
                    task = next(remaining, none)
                    if task is none:
                        break
                    pending.append(self._executor.submit(function, task))  # type: ignore[arg-type]
                    busy += 1
                is_full = len(pending) >= RESULTS_PER_WORKER * (self.helpers + 1)
                is_ready = bool(pending) and pending[0].done()
                task = none if is_full or is_ready else next(remaining, none)
                if task is not none:
                    pending.append(_run_here(function, task))  # type: ignore[arg-type]
                elif pending:
                    yield pending.popleft().result()
                else:
                    return
        except BrokenProcessPool:
            raise UserError(
                "workers: a worker process has died, perhaps for lack of memory; use fewer "
                "--workers",
                field="workers",
            ) from None
        finally:
            running = [future for future in pending if not future.cancel()]
            if not self.is_broken:
                wait(running)


THIS_PROCESS = WorkerPool()
"""A pool without helpers: this process runs all tasks."""


def is_first_rank() -> bool:
    """Return True on rank 0 of an MPI job, and in a process that is not part of one."""
    return _rank == 0


@contextmanager
def local_pool(count: int = 0) -> Iterator[WorkerPool]:
    """Yield a pool of `count` workers on this machine, which includes this process.

    If `count` is 0, there is one worker per core, but at most DEFAULT_WORKERS. This process then
    works alone for HEAD_START_SECONDS before it starts the other workers. Processes are spawned,
    not forked: a fork would copy locks that threads of DuckDB, Arrow or onnxruntime hold, but not
    these threads, so nothing would release the locks.
    """
    head_start = 0.0 if count else HEAD_START_SECONDS
    count = count or min(len(os.sched_getaffinity(0)), DEFAULT_WORKERS)
    if count == 1:
        yield THIS_PROCESS
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count - 1, context, _ignore_interrupts) as executor:
        yield WorkerPool(executor, count - 1, head_start)


@contextmanager
def open_pool(count: int) -> Iterator[WorkerPool | None]:
    """Yield a pool of workers; in an MPI job, the ranks other than rank 0 get None.

    In an MPI job of several ranks, the ranks are the workers. Rank 0 runs the ``with`` block and
    gives tasks to the other ranks through `mpi4py.futures`. The other ranks run their own ``with``
    block after rank 0 has finished. Without an MPI job, `count` processes on this machine are the
    workers (see `local_pool`). Horovod is not started.

    Raises:
        UserError: `count` is negative.
        SharedError: The block failed on rank 0, or the ranks have no MPI (``horovodrun --gloo``).
    """
    global _rank  # noqa: PLW0603 -- one job per process
    if count < 0:
        remedy = "leave it out to use one worker per core"
        raise invalid_value("--workers", count, "must not be negative", remedy)
    world = _mpi_world()
    if world is None or world.Get_size() == 1:
        with local_pool(count) as workers:
            yield workers
        return
    _rank = world.Get_rank()
    if _rank == 0:
        with _leading(world) as workers:
            yield workers
    else:
        _follow(world)
        yield None


def _mpi_world() -> Intracomm | None:
    """Return the communicator of this process's MPI job, if it is part of one."""
    global _rank  # noqa: PLW0603 -- one job per process
    if any(name in os.environ for name in MPI_VARIABLES):
        from mpi4py import MPI

        return MPI.COMM_WORLD
    if os.environ.get("HOROVOD_SIZE", "1") != "1":
        # The launcher is horovodrun --gloo, which sets this variable reliably.
        _rank = int(os.environ["HOROVOD_RANK"])
        if _rank:
            time.sleep(FOLLOW_SECONDS)
        raise SharedError(
            "these ranks have no MPI, which this command needs to share its work; start it with "
            "mpirun or horovodrun --mpi, or as one process with --workers N"
        )
    return None


@contextmanager
def _leading(world: Intracomm) -> Iterator[WorkerPool]:
    """Yield a pool whose helpers are the other ranks; if the block fails, send them the error."""
    from mpi4py.futures import MPICommExecutor

    message: str | None = "rank 0 failed"
    try:
        with MPICommExecutor(world, root=0) as executor:
            workers = WorkerPool(cast("MPIPoolExecutor", executor), world.Get_size() - 1)
            with _exit_on_sigterm(workers):
                yield workers
        message = None
    except UserError as error:
        message = str(error)
        raise
    finally:
        world.bcast(message, root=0)


@contextmanager
def _exit_on_sigterm(workers: WorkerPool) -> Iterator[None]:
    """Raise SystemExit in the block on SIGTERM, so that the block can clean up."""

    def end(number: int, frame: object) -> None:
        workers.is_broken = True
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if workers.is_broken:
            # MPI must not be finalized, because finalizing waits for ranks that may have ended.
            os._exit(128 + signal.SIGTERM)


def _follow(world: Intracomm) -> None:
    """Run tasks for rank 0 until its block ends; raise SharedError if the block failed."""
    from mpi4py.futures import MPICommExecutor

    with MPICommExecutor(world, root=0):
        pass
    message = world.bcast(None, root=0)
    if message is not None:
        raise SharedError(message)


def _ignore_interrupts() -> None:
    """Ignore Ctrl-C in a helper, because the first process handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run_here(function: Callable[[Task], Result], task: Task) -> Future[Result]:
    """Run a task in this process and return a finished future."""
    future: Future[Result] = Future()
    try:
        future.set_result(function(task))
    except Exception as error:
        future.set_exception(error)
    return future
