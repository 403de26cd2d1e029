"""End all ranks of a job when one rank fails, dies, is suspended or loses its host or network.

Without this, the other ranks would wait for that rank in their next collective, with MPI forever.
So each rank keeps a TCP connection to rank 0 and sends a sign of life over it every few seconds. A
rank that fails sends a message. A broken connection means that a rank has ended. Silence for too
long means that it is suspended or unreachable. The rank that notices the problem reports it in one
line and ends; then all others end.

Horovod's stall shutdown does not help here: when a rank was suspended (SIGSTOP), jobs hung, with
Gloo and with MPI, because Horovod's coordinator itself waits for that rank.
"""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, TypeVar

import psutil

from hvdrec.errors import SharedError, UserError
from hvdrec.parallel import ranks
from hvdrec.parallel.ranks import World

T = TypeVar("T")

BEATS = 10
"""How many signs of life a rank sends in the time after which a silent rank counts as lost."""
CONNECT_SECONDS = LEAVE_SECONDS = 3.0
FOLLOW_SECONDS = 3.0
"""Time that a rank with nothing to report waits before it ends, so that the rank with a report ends
first: launchers name the first rank that ends."""
REPORT_SECONDS, MAX_REPORTS = 5.0, 4
LOOPBACK = "127.0.0.1"
ALIVE, LEAVING, FAILED, END = b"alive\n", b"leaving\n", b"failed\n", b"end\n"
SILENT = b"?"
"""Used in place of a message if a rank sends none in time."""


@contextmanager
def watched() -> Iterator[None]:
    """Run a block on all ranks of the job; if it fails on one rank, end all of them.

    All ranks must enter the block. If it fails on one rank, that rank prints the error and exits,
    with code 2 for a UserError and 1 otherwise, and all other ranks end soon after. SharedError is
    raised as usual, because all ranks raise it. In a job of one rank, all errors are raised.
    """
    world = ranks.current()
    if world.size == 1:
        yield
        return
    watchdog = _start(world)
    with _report_sigterm(watchdog):
        try:
            yield
        except SharedError:
            raise
        except Exception as error:
            _fail(error, world, watchdog)
        finally:
            if watchdog is not None:
                watchdog.leave()


@dataclass(frozen=True)
class _Endpoint:
    """The addresses and port where rank 0 listens, and the secret that a rank sends to connect."""

    addresses: list[str]
    port: int
    token: str


class _Watchdog:
    """The thread that sends this rank's signs of life and receives those of other ranks."""

    def __init__(self, world: World, silence: float) -> None:
        self._world = world
        self._silence = silence
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._left: set[int] = set()
        self._is_leaving = False
        self._last_beat, self._woke = self._loop.time(), -math.inf
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def listen(self, address: str, token: str) -> int:
        """Accept connections of the other ranks and return the port.

        With an empty address, it listens on all addresses of this host.
        """

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._accept(reader, writer, token)

        async def serve() -> int:
            server = await asyncio.start_server(
                accept, address or None, 0, family=socket.AF_INET, backlog=1024
            )
            return int(server.sockets[0].getsockname()[1])

        return self._call(serve())

    def connect(self, endpoint: _Endpoint) -> bool:
        """Connect to the first address of rank 0 that answers; return False if no address does."""

        async def try_all() -> bool:
            for address in endpoint.addresses:
                with suppress(OSError):
                    await asyncio.wait_for(self._connect(address, endpoint), CONNECT_SECONDS)
                    return True
            return False

        return self._call(try_all())

    def leave(self) -> None:
        """Tell the other ranks that this rank ends normally, wait until they end, too, and stop."""
        with suppress(OSError):
            self._call(self._leave())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def end_others(self) -> None:
        """Tell the other ranks to end, after this rank has reported why."""
        with suppress(OSError):
            self._call(self._send(END if self._world.is_first else FAILED))

    def _call(self, action: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(action, self._loop).result()

    # The methods below run in the thread.

    async def _accept(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str
    ) -> None:
        with suppress(OSError, ValueError):
            words = (await asyncio.wait_for(reader.readline(), CONNECT_SECONDS)).decode().split()
            if len(words) == 2 and secrets.compare_digest(words[0], token):
                writer.write(ALIVE)
                self._watch(int(words[1]), reader, writer)
                return
        writer.close()

    async def _connect(self, address: str, endpoint: _Endpoint) -> None:
        reader, writer = await asyncio.open_connection(address, endpoint.port)
        writer.write(f"{endpoint.token} {self._world.rank}\n".encode())
        if await reader.readline() != ALIVE:
            writer.close()
            raise OSError("another program listens there")
        self._watch(0, reader, writer)

    def _watch(self, rank: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers[rank] = writer
        self._last_beat = self._loop.time()
        for work in (self._beat(writer), self._listen_to(rank, reader)):
            task = self._loop.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _beat(self, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while True:
                await asyncio.sleep(self._silence / BEATS)
                if self._was_silent():
                    self._woke = self._loop.time()
                self._last_beat = self._loop.time()
                writer.write(ALIVE)

    def _was_silent(self) -> bool:
        """Return True if this rank was suspended until now; the other ranks have then ended."""
        now = self._loop.time()
        return now - self._last_beat > 0.9 * self._silence or now - self._woke < FOLLOW_SECONDS

    async def _listen_to(self, rank: int, reader: asyncio.StreamReader) -> None:
        """Read a rank's messages until it leaves; end the job if it fails, ends or falls silent."""
        message = ALIVE
        while message == ALIVE:
            message = await self._receive(reader)
        if message not in (LEAVING, FAILED, END, SILENT):
            # The launcher may be ending all ranks. With this pause, it ends this rank before the
            # rank reports the other one as lost.
            await asyncio.sleep(0.1)
        where = self._world.describe(rank)
        if message == LEAVING or self._is_leaving:
            self._left.add(rank)
        elif message in (FAILED, END) or self._was_silent():
            await self._end(None)
        elif message == SILENT:
            await self._end(
                f"{where}: no sign of life for {self._silence:g} s; it is stopped, or its host or "
                "network is down"
            )
        else:
            await self._end(f"{where}: ended without an error message; it was killed or it crashed")

    async def _receive(self, reader: asyncio.StreamReader) -> bytes:
        """Return the next message; b"" if the connection has ended, SILENT if none came in time."""
        for _ in range(2):  # twice: after a suspension of this rank, a message may be unread
            try:
                return await asyncio.wait_for(reader.readline(), self._silence / 2)
            except TimeoutError as error:
                if error.errno is not None:  # a timeout of the network, not of `wait_for`
                    break
            except OSError:
                return b""
        return SILENT

    async def _send(self, message: bytes) -> None:
        """Send a message to all ranks that have not left; wait at most a second for slow ones."""
        for rank, writer in self._writers.items():
            if rank not in self._left:
                writer.write(message)
        drains = (writer.drain() for writer in self._writers.values())
        with suppress(TimeoutError):  # a broken connection is a result of `gather`, not an error
            await asyncio.wait_for(asyncio.gather(*drains, return_exceptions=True), 1.0)

    async def _leave(self) -> None:
        self._is_leaving = True
        await self._send(LEAVING)
        # Closing a connection too early would discard the other rank's last message.
        deadline = self._loop.time() + LEAVE_SECONDS
        while len(self._left) < len(self._writers) and self._loop.time() < deadline:
            await asyncio.sleep(0.01)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers.values():
            writer.close()

    async def _end(self, report: str | None) -> NoReturn:
        """Print the report, if there is one, and end this process; rank 0 also ends the others."""
        if report is not None:
            if not self._world.is_first:
                await asyncio.sleep(report_delay(self._world))
            _report(report)
        if self._world.is_first:
            await self._send(END)
        if report is None:
            await asyncio.sleep(FOLLOW_SECONDS)
        os._exit(1)


def report_delay(world: World) -> float:
    """Return how many seconds a rank waits before it reports the loss of rank 0.

    Without a delay, every host would report the loss. With delays that differ between hosts, the
    launcher ends the job before the second host reports, so only one line appears.
    """
    reporters = [world.hosts.index(host, 1) for host in dict.fromkeys(world.hosts[1:])]
    turn = reporters.index(world.rank) if world.rank in reporters else MAX_REPORTS
    return REPORT_SECONDS * min(turn, MAX_REPORTS)


def _start(world: World) -> _Watchdog | None:
    """Connect all ranks to rank 0; return None if the watchdog is disabled."""
    silence = float(ranks.broadcast_object(ranks.silence_seconds()))
    if silence == 0:
        return None
    watchdog = _Watchdog(world, silence)
    endpoint: _Endpoint | None = None
    if world.is_first:
        is_local = world.local_size == world.size
        token = secrets.token_hex(16)
        port = watchdog.listen(LOOPBACK if is_local else "", token)
        endpoint = _Endpoint([LOOPBACK] if is_local else _addresses(), port, token)
    first = _Endpoint(**ranks.broadcast_object(asdict(endpoint) if endpoint else None))
    is_connected = world.is_first or watchdog.connect(first)
    flags = ranks.gather_objects(is_connected)
    lost = [rank for rank, flag in enumerate(flags) if not flag]
    if lost and world.is_first:
        where = f"{', '.join(first.addresses)}, port {first.port}"
        print(
            f"hvdrec: warning: {world.describe(*lost)} cannot connect to {world.describe(0)} "
            f"({where}); if they fall silent, the job will hang",
            file=sys.stderr,
            flush=True,
        )
    return watchdog


def _addresses() -> list[str]:
    """Return this host's addresses: first that of Horovod's network interface, loopback last."""
    preferred = os.environ.get("HOROVOD_GLOO_IFACE", "")
    keyed = [
        (name != preferred, address.address == LOOPBACK, address.address)
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
    ]
    return [address for *_, address in sorted(keyed)]


@contextmanager
def _report_sigterm(watchdog: _Watchdog | None) -> Iterator[None]:
    """On SIGTERM, tell the other ranks that the launcher ends this one, so none reports it lost."""

    def end(number: int, frame: Any) -> None:
        if watchdog is not None:
            watchdog.end_others()
        os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(error: Exception, world: World, watchdog: _Watchdog | None) -> NoReturn:
    """Report an error of this rank, and end this rank and all others."""
    if type(error).__name__ == "HorovodInternalError" and watchdog is not None:
        # A collective fails if another rank has ended. The watchdog knows which one and why.
        time.sleep(FOLLOW_SECONDS)
    is_mistake = isinstance(error, UserError)
    if not is_mistake:
        traceback.print_exception(error)
    text = str(error) if is_mistake else f"{type(error).__name__}: {error}"
    _report(f"{world.describe(world.rank)}: {text}")
    if watchdog is not None:
        watchdog.end_others()
    os._exit(2 if is_mistake else 1)


def _report(line: str) -> None:
    # sys.stderr is not used, because another thread may hold its lock.
    os.write(2, f"hvdrec: error: {' '.join(line.split())}\n".encode())
