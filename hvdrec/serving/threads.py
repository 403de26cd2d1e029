"""Threads that score, so that the event loop stays free to take, refuse and answer requests."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class WaitedTooLong(Exception):
    """A call for which no thread had time."""


class _Call:
    __slots__ = ("abandoned", "begun", "future", "work")

    def __init__(self, work: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        self.work = work
        self.future = future
        self.begun = False
        self.abandoned = False


class Threads:
    """A fixed number of threads that take calls from one event loop, first come, first served.

    What `concurrent.futures` would do takes several times as long for each call.
    """

    def __init__(self, count: int, max_wait: float) -> None:
        """Start ``count`` threads; a call that none has begun after ``max_wait`` seconds fails."""
        self._loop = asyncio.get_running_loop()
        self._max_wait = max_wait
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"hvdrec-score-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    async def run(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns, or raise what it raises; WaitedTooLong."""
        call = _Call(work, self._loop.create_future())
        self._calls.put(call)
        timer = self._loop.call_later(self._max_wait, _give_up, call)
        try:
            result: T = await call.future
            return result
        finally:
            timer.cancel()
            call.abandoned = True

    async def close(self) -> None:
        """End the threads, after the calls that are waiting."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if not call.abandoned:
                call.begun = True
                self._answer(call)
            # What a call holds goes with it, not with the next one: a scorer that was replaced.
            del call

    def _answer(self, call: _Call) -> None:
        result: Any = None
        failure: BaseException | None = None
        try:
            result = call.work()
        except BaseException as error:
            failure = error
        try:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(_settle, call.future, result, failure)
        finally:
            del failure  # its traceback holds this frame


def _settle(future: asyncio.Future[Any], result: Any, failure: BaseException | None) -> None:
    if future.done():
        return
    if failure is None:
        future.set_result(result)
    else:
        future.set_exception(failure)


def _give_up(call: _Call) -> None:
    if not call.begun and not call.future.done():
        call.abandoned = True
        call.future.set_exception(WaitedTooLong())
