"""Stop a worker in steps: report unready, accept no connections, finish requests in progress."""

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
"""Signals within this time count as one: some programs, such as ``timeout``, send a signal to a
process and again to its process group."""

SETTLE_SECONDS = 0.2
"""Time that a single worker takes to accept the last connections and to read their requests."""
WORKER_SETTLE_SECONDS = 1.0
"""The same time for one of several workers. It is longer because uvicorn's parent process looks for
signals only every 0.5 s."""
SO_ATTACH_FILTER = 26  # the value in Linux; Python does not define it


class StopSignals:
    """Distinguishes the first signal to stop from a second one."""

    def __init__(self) -> None:
        """Start before the first signal."""
        self._first: float | None = None

    def is_first(self) -> bool:
        """Record a signal; return True if it is the first."""
        if self._first is None:
            self._first = time.monotonic()
            return True
        return False

    def is_second(self) -> bool:
        """Return True if a signal that arrives now counts as a second one."""
        return self._first is not None and time.monotonic() - self._first > REPEAT_SECONDS


def drop_new_connections(listener: socket.socket) -> None:
    """Ignore new connections to a listening socket that is closed a moment later.

    The kernel establishes connections before the process accepts them. When the socket is closed,
    the kernel resets connections that were established but not accepted. A filter that drops every
    packet keeps the kernel from establishing more of them. The clients' kernels try again after a
    second and find the port closed.
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
    """Delay the stop of the server while the ``with`` body runs, so that clients can leave first.

    On a signal to stop, ``drain`` is called at once. The handler that was installed before, which
    stops the server, is called ``seconds`` later. A second signal ends the process at once. One of
    several workers ignores the second signal: a terminal or a service manager signals all
    processes, and the workers' parent process decides.

    Args:
        drain: Function that starts to close connections.
        seconds: Delay of the stop.
        listener: Listening socket, which ignores new connections shortly before the stop; None if
            the parent process takes care of it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
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
