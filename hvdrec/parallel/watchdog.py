"""A job ends as a whole: when a rank fails, ends, is stopped or loses its host or network.

The others wait for that rank in their next collective, under MPI for ever. So each rank keeps a
connection to the first one, over which both say every few seconds that they are there. Who fails
says so; whose connection breaks has ended; who is silent is stopped or cut off. The rank that
notices tells it in one line and ends; the others follow.
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
from hvdrec.parallel.ranks import World, silence_seconds

T = TypeVar("T")

SIGNS = 10
"""Signs of life within the time after which a rank counts as lost."""
CONNECT_SECONDS = LEAVE_SECONDS = 3.0
FOLLOW_SECONDS = 3.0
"""How long a rank that need not tell why the job ends waits: launchers show the first end."""
TURN_SECONDS, TURNS = 5.0, 4
LOOPBACK = "127.0.0.1"
ALIVE, LEAVING, FAILED, END = b"alive\n", b"leaving\n", b"failed\n", b"end\n"
SILENT = b"?"
"""What is heard of a rank that says nothing."""


@contextmanager
def watched() -> Iterator[None]:
    """Let the block end on all ranks of the job, or the job end.

    Every rank enters it. An exception that one rank alone meets is told on standard error and ends
    the process there, with 2 for a user's mistake and 1 for anything else, and all other ranks soon
    after; SharedError passes, as every rank has it, and so does everything in a process alone.
    """
    world = ranks.current()
    if world.size == 1:
        yield
        return
    watch = _start(world)
    with _ended_by_launcher(watch):
        try:
            yield
        except SharedError:
            raise
        except Exception as error:
            _fail(error, world, watch)
        finally:
            if watch is not None:
                watch.leave()


@dataclass(frozen=True)
class _Offer:
    """Where the first rank listens, and what those who may connect know."""

    addresses: list[str]
    port: int
    token: str


class _Watch:
    """The thread that says that this rank is there, and hears whether the others are."""

    def __init__(self, world: World, silence: float) -> None:
        self._world = world
        self._silence = silence
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._left: set[int] = set()
        self._is_leaving = False
        self._beaten, self._woke = self._loop.time(), -math.inf
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def listen(self, address: str, token: str) -> int:
        """Let the other ranks in at an address (empty: all of this host); return the port."""

        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._greet(reader, writer, token)

        async def serve() -> int:
            server = await asyncio.start_server(
                greet, address or None, 0, family=socket.AF_INET, backlog=1024
            )
            return int(server.sockets[0].getsockname()[1])

        return self._call(serve())

    def connect(self, offer: _Offer) -> bool:
        """Connect to the first rank at the first of its addresses that answers, if one does."""

        async def try_all() -> bool:
            for address in offer.addresses:
                with suppress(OSError):
                    await asyncio.wait_for(self._connect(address, offer), CONNECT_SECONDS)
                    return True
            return False

        return self._call(try_all())

    def leave(self) -> None:
        """Tell the others that this rank ends as it should, hear it of them, and stop."""
        with suppress(OSError):
            self._call(self._leave())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def tell_failed(self) -> None:
        """Tell the others to end: this rank has told why."""
        with suppress(OSError):
            self._call(self._say(END if self._world.is_first else FAILED))

    def _call(self, action: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(action, self._loop).result()

    # Everything below runs in the thread.

    async def _greet(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str
    ) -> None:
        """Let in who knows the token."""
        with suppress(OSError, ValueError):
            words = (await asyncio.wait_for(reader.readline(), CONNECT_SECONDS)).decode().split()
            if len(words) == 2 and secrets.compare_digest(words[0], token):
                writer.write(ALIVE)
                self._begin(int(words[1]), reader, writer)
                return
        writer.close()

    async def _connect(self, address: str, offer: _Offer) -> None:
        reader, writer = await asyncio.open_connection(address, offer.port)
        writer.write(f"{offer.token} {self._world.rank}\n".encode())
        if await reader.readline() != ALIVE:
            writer.close()
            raise OSError("another program listens there")
        self._begin(0, reader, writer)

    def _begin(self, rank: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers[rank] = writer
        self._beaten = self._loop.time()
        for work in (self._beat(writer), self._hear(rank, reader)):
            task = self._loop.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _beat(self, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while True:
                await asyncio.sleep(self._silence / SIGNS)
                if self._was_silent():
                    self._woke = self._loop.time()
                self._beaten = self._loop.time()
                writer.write(ALIVE)

    def _was_silent(self) -> bool:
        """Return whether this rank was the silent one until just now: for that the others end."""
        now = self._loop.time()
        return now - self._beaten > 0.9 * self._silence or now - self._woke < FOLLOW_SECONDS

    async def _hear(self, rank: int, reader: asyncio.StreamReader) -> None:
        """Hear a rank until it leaves; end the job when it fails, ends or falls silent."""
        word = ALIVE
        while word == ALIVE:
            word = await self._next_word(reader)
        if word not in (LEAVING, FAILED, END, SILENT):
            # Whoever ends all ranks at once ends this one, too, before it complains.
            await asyncio.sleep(0.1)
        where = self._world.describe(rank)
        if word == LEAVING or self._is_leaving:
            self._left.add(rank)
        elif word in (FAILED, END) or self._was_silent():
            await self._end(None)
        elif word == SILENT:
            await self._end(
                f"{where}: no sign of life for {self._silence:g} s; it is stopped, or its host or "
                "network is down"
            )
        else:
            await self._end(
                f"{where}: ended without an error message; it was killed, or it crashed"
            )

    async def _next_word(self, reader: asyncio.StreamReader) -> bytes:
        """Return what is said next, b"" where the connection has ended."""
        for _ in range(2):  # who was stopped itself has not listened: once more
            try:
                return await asyncio.wait_for(reader.readline(), self._silence / 2)
            except TimeoutError as error:
                if error.errno is not None:  # of the network, not of the wait
                    break
            except OSError:
                return b""
        return SILENT

    async def _say(self, word: bytes) -> None:
        """Send a word to all who are there; who does not take it soon goes without."""
        for rank, writer in self._writers.items():
            if rank not in self._left:
                writer.write(word)
        drains = [asyncio.ensure_future(writer.drain()) for writer in self._writers.values()]
        if drains:
            await asyncio.wait(drains, timeout=1.0)

    async def _leave(self) -> None:
        self._is_leaving = True
        await self._say(LEAVING)
        # A connection that is closed too early would take the other's last word with it.
        until = self._loop.time() + LEAVE_SECONDS
        while len(self._left) < len(self._writers) and self._loop.time() < until:
            await asyncio.sleep(0.01)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers.values():
            writer.close()

    async def _end(self, line: str | None) -> NoReturn:
        """End this process and, on the first rank, the others; a line tells why."""
        if self._world.is_first:
            if line is not None:
                _tell(line)
            await self._say(END)
        elif line is not None:
            await asyncio.sleep(report_delay(self._world))
            _tell(line)
        if line is None:
            await asyncio.sleep(FOLLOW_SECONDS)
        os._exit(1)


def report_delay(world: World) -> float:
    """Return how long a rank that has lost the first one waits before it tells so.

    One rank of each host would speak for all, one host after the other: the launcher ends the job
    before it is the next one's turn.
    """
    speakers = [world.hosts.index(host, 1) for host in dict.fromkeys(world.hosts[1:])]
    turn = speakers.index(world.rank) if world.rank in speakers else TURNS
    return TURN_SECONDS * min(turn, TURNS)


def _start(world: World) -> _Watch | None:
    """Connect all ranks to the first one; None where nothing is to be watched."""
    silence = float(ranks.broadcast_object(silence_seconds()))
    if silence == 0:
        return None
    watch = _Watch(world, silence)
    offer: _Offer | None = None
    if world.is_first:
        one_host = world.local_size == world.size
        token = secrets.token_hex(16)
        port = watch.listen(LOOPBACK if one_host else "", token)
        offer = _Offer([LOOPBACK] if one_host else _addresses(), port, token)
    offered = _Offer(**ranks.broadcast_object(asdict(offer) if offer else None))
    connected = world.is_first or watch.connect(offered)
    lost = [rank for rank, found in enumerate(ranks.gather_objects(connected)) if not found]
    if lost and world.is_first:
        who, where = world.describe(*lost), ", ".join(offered.addresses)
        print(
            f"hvdrec: warning: {who} cannot connect to {world.describe(0)} ({where}, port "
            f"{offered.port}): should they fall silent, nobody will notice",
            file=sys.stderr,
            flush=True,
        )
    return watch


def _addresses() -> list[str]:
    """Return this host's addresses, that of Horovod's interface first."""
    first = os.environ.get("HOROVOD_GLOO_IFACE", "")
    interfaces = psutil.net_if_addrs().items()
    found = [
        (name != first, address.address == LOOPBACK, address.address)
        for name, addresses in interfaces
        for address in addresses
        if address.family == socket.AF_INET
    ]
    return [address for *_, address in sorted(found)]


@contextmanager
def _ended_by_launcher(watch: _Watch | None) -> Iterator[None]:
    """Let a rank that its launcher ends say so, so that nobody wonders why it has gone."""

    def end(number: int, frame: Any) -> None:
        if watch is not None:
            watch.tell_failed()
        os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(error: Exception, world: World, watch: _Watch | None) -> NoReturn:
    """Tell what this rank alone has met, and end it and all others."""
    if type(error).__name__ == "HorovodInternalError" and watch is not None:
        # A collective fails when another rank has ended: the watch will know which one, and why.
        time.sleep(FOLLOW_SECONDS)
    if not isinstance(error, UserError):
        traceback.print_exception(error)
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    _tell(f"{world.describe(world.rank)}: {text}")
    if watch is not None:
        watch.tell_failed()
    os._exit(2 if isinstance(error, UserError) else 1)


def _tell(line: str) -> None:
    # Not through sys.stderr, which another thread may hold.
    os.write(2, f"hvdrec: error: {' '.join(line.split())}\n".encode())
