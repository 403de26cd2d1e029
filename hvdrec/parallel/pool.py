"""Pure tasks, spread over processes, with their results in order.

The processes are a pool on this machine (`local_workers`) or the ranks of an MPI job
(`parallel.workers`). A task is a function at the top of a module with small arguments: where its
inputs lie, and which part of them it is to work on. What it returns depends on these alone, so that
any number of workers comes to the same.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from hvdrec.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 2
"""Tasks that a helper has at a time: one in work, and those to go on with."""
HELD = 4
"""Results that may wait for their turn, for each worker."""
MOST_BY_DEFAULT, HEAD_START = 8, 1.0
"""How many workers there are where none asks for a number, and after how many seconds of work the
others are started then: each of them takes a second to begin, and memory of its own."""


class Workers:
    """This process and `helpers` others, which an executor reaches.

    For the first `head_start` seconds, from the first task on, this process works by itself.
    are_gone: set where helpers may have ended, so that nobody waits for them.
    """

    def __init__(
        self, executor: Executor | None = None, helpers: int = 0, head_start: float = 0.0
    ) -> None:
        self._executor, self.helpers = executor, helpers if executor is not None else 0
        self._head_start, self._began = head_start, None if head_start else 0.0
        self.are_gone = False

    def map(
        self, function: Callable[[Task], Result], tasks: Iterable[Task]
    ) -> Generator[Result, None, None]:
        """Yield what a function makes of each task, in their order.

        Tasks are taken as there is somebody to do them; this process does some itself while it
        would wait. The first error, by order, is raised here; tasks that have not begun are then
        dropped and those under way waited for, and so they are where the generator is closed: no
        helper is at work any more. Raises UserError where a helper's process has died.
        """
        left = iter(tasks)
        none = object()
        under_way: deque[Future[Result]] = deque()
        if self._began is None:
            self._began = time.monotonic()
        try:
            while True:
                busy = sum(not future.done() for future in under_way)
                alone = time.monotonic() - self._began < self._head_start
                while self._executor is not None and not alone and busy < AHEAD * self.helpers:
                    task = next(left, none)
                    if task is none:
                        break
                    under_way.append(self._executor.submit(function, task))  # type: ignore[arg-type]
                    busy += 1
                full = len(under_way) >= HELD * (self.helpers + 1)
                own = none if full or (under_way and under_way[0].done()) else next(left, none)
                if own is not none:
                    under_way.append(_done(function, own))  # type: ignore[arg-type]
                elif under_way:
                    yield under_way.popleft().result()
                else:
                    return
        except BrokenProcessPool:
            raise UserError(
                "a worker process has died, perhaps for lack of memory; give fewer --workers"
            ) from None
        finally:
            running = [future for future in under_way if not future.cancel()]
            if not self.are_gone:
                wait(running)


ALONE = Workers()
"""This process by itself."""


@contextmanager
def local_workers(count: int = 0) -> Iterator[Workers]:
    """Start processes on this machine, so that there are `count` workers with this one.

    0 takes one for each core, but no more than MOST_BY_DEFAULT, and starts them only if the work
    lasts. They are spawned: a fork would copy the locks of DuckDB's, Arrow's and onnxruntime's
    threads without the threads that hold them.
    """
    head_start = 0.0 if count else HEAD_START
    count = count or min(len(os.sched_getaffinity(0)), MOST_BY_DEFAULT)
    if count == 1:
        yield ALONE
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count - 1, context, _leave_interrupts) as executor:
        yield Workers(executor, count - 1, head_start)


def _leave_interrupts() -> None:
    """Let the first process alone answer Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _done(function: Callable[[Task], Result], task: Task) -> Future[Result]:
    """Do a task here, as a helper would."""
    future: Future[Result] = Future()
    try:
        future.set_result(function(task))
    except Exception as error:
        future.set_exception(error)
    return future
