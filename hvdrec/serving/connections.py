"""Limits on the open connections of a worker: their number, and how long each may wait."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import resource
from collections import defaultdict
from typing import Protocol

from hvdrec.serving.options import Options

SWEEP_SECONDS = 0.25
RESERVED_FILES = 64
"""Number of file descriptors reserved for bundles, stores and the listening socket."""


class Connection(Protocol):
    """The part of a connection that `Connections` uses."""

    deadline: float
    """Time, on the event loop's clock, at which `expire` is called; infinity while a response is
    being computed."""

    @property
    def address(self) -> str:
        """IP address of the client."""

    def expire(self) -> None:
        """End the connection because its deadline has passed."""

    def evict(self) -> None:
        """Close the connection at once, to make room for another."""

    def close_after_response(self) -> None:
        """Close the connection as soon as the request in progress is answered."""


class Connections:
    """Keeps the connections of one worker within the limits of its options.

    If a limit is reached, a new connection replaces the one with the earliest deadline. Usually
    this is a connection with a half-sent request, otherwise an idle one. A connection whose request
    is being answered is never replaced.
    """

    def __init__(self, options: Options) -> None:
        """Start without connections. A low limit on open files lowers ``max_connections``."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        spare = max(files - RESERVED_FILES, files // 2)
        self._most = min(options.max_connections, spare)
        self._most_per_address = options.max_per_address
        self._count = 0
        self._by_address: defaultdict[str, set[Connection]] = defaultdict(set)
        self.is_draining = False

    def add(self, connection: Connection) -> bool:
        """Count a new connection; return False if a limit is reached and no other can be closed."""
        group = self._by_address[_client(connection.address)]
        is_admitted = True
        if len(group) >= self._most_per_address:
            is_admitted = self._evict_one(group)
        elif self._count >= self._most:
            is_admitted = self._evict_one(set().union(*self._by_address.values()))
        # A refused connection counts until its client has read the refusal. Its short deadline
        # makes it the first to be evicted.
        self._by_address[_client(connection.address)].add(connection)
        self._count += 1
        return is_admitted

    def remove(self, connection: Connection) -> None:
        """Stop counting a connection that is closed."""
        client = _client(connection.address)
        group = self._by_address.get(client)
        if group is not None and connection in group:
            group.remove(connection)
            self._count -= 1
            if not group:
                del self._by_address[client]

    def drain(self) -> None:
        """From now on, close each connection after its next response."""
        self.is_draining = True
        for connection in self._all():
            connection.close_after_response()

    async def sweep(self) -> None:
        """End connections whose deadline has passed; runs until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now = loop.time()
            for connection in self._all():
                if connection.deadline <= now:
                    connection.expire()

    def _all(self) -> list[Connection]:
        return [connection for group in self._by_address.values() for connection in group]

    def _evict_one(self, group: set[Connection]) -> bool:
        first = min(group, key=lambda connection: connection.deadline)
        if first.deadline == math.inf:
            return False
        self.remove(first)
        first.evict()
        return True


def _client(address: str) -> str:
    """Return the part of an address that identifies a client: IPv4 address or /64 of IPv6."""
    if ":" not in address:
        return address
    number = ipaddress.IPv6Address(address.partition("%")[0])
    return str(number.ipv4_mapped or ipaddress.IPv6Network((int(number) >> 64 << 64, 64)))
