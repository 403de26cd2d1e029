"""The end of a worker: first unready, then no new connections, then requests in progress."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEAT_SECONDS = 0.1
"""Signals closer than this are one: programs such as timeout signal a process and its group."""

SETTLE_SECONDS = 0.2
"""Time to accept the last connections and to read their requests."""
WORKER_SETTLE_SECONDS = 1.0
"""The same for one of several workers: uvicorn's parent process looks for signals every 0.5 s."""
SO_ATTACH_FILTER = 26  # Linux; Python has no name for it


class StopSignals:
    """Tells a first signal to stop from a second."""

    def __init__(self) -> None:
        """Start with no signal."""
        self._first: float | None = None

    def is_first(self) -> bool:
        """Note a signal; return True if it is the first."""
        if self._first is None:
            self._first = time.monotonic()
            return True
        return False

    def is_second(self) -> bool:
        """Return True if a signal now is one more than the first."""
        return self._first is not None and time.monotonic() - self._first > REPEAT_SECONDS


def drop_new_connections(listener: socket.socket) -> None:
    """Drop what reaches a listening socket, so that none is reset when it closes after a moment.

    The kernel completes connections that the process has not accepted yet, and resets them when the
    socket is closed. A filter that accepts no packet keeps further ones from being completed; their
    clients find the port closed when they try again after a second.
    """
    if sys.platform != "linux":
        return
    program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # return 0
    with contextlib.suppress(OSError):
        listener.setsockopt(
            socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program))
        )


@contextmanager
def drained_before_stop(
    drain: Callable[[], None], seconds: float, listener: socket.socket | None
) -> Iterator[None]:
    """Call ``drain`` on a signal to stop, and the handler before this one ``seconds`` later.

    ``listener`` is closed to new connections shortly before; None if the parent process does so.
    A second signal ends the process at once, unless it is one of several workers: a terminal or a
    service manager signals all of them, and their parent decides.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # cannot handle signals here
        return
    loop = asyncio.get_running_loop()
    previous: dict[int, Any] = {int(number): signal.getsignal(number) for number in SIGNALS}
    is_worker = multiprocessing.parent_process() is not None
    signals = StopSignals()

    def begin(number: int) -> None:
        drain()
        settle = WORKER_SETTLE_SECONDS
        if listener is not None:
            settle = SETTLE_SECONDS
            loop.call_later(seconds, drop_new_connections, listener)
        stop = previous[number]
        if callable(stop):
            loop.call_later(seconds + settle, stop, number, None)

    def handle(number: int, frame: FrameType | None) -> None:
        if signals.is_first():
            loop.call_soon_threadsafe(begin, number)
        elif signals.is_second() and not is_worker:
            os._exit(128 + number)

    for number in previous:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
