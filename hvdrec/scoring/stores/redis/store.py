"""Read embeddings of users and items from Redis, which many services can share."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.scoring.array_files import read_array
from hvdrec.scoring.bundle import BundleInfo
from hvdrec.scoring.errors import StoreError, shown
from hvdrec.scoring.stores.redis.layout import (
    MARK,
    PREFIX,
    SIDES,
    Names,
    VersionInfo,
    field_of,
    incomplete_version,
    parse_meta,
    unpack,
)
from hvdrec.scoring.stores.redis.server import Command, RedisServer

Array = NDArray[Any]
TRIES = 4
BLOCK_KEYS = 4096
"""Largest number of keys that one round trip looks up."""
REQUEST_SECONDS = 1.0
"""If a thread looks up items within this time after a user, both belong to the same request."""


def open_redis(
    url: str, bundle: BundleInfo, *, prefix: str = PREFIX, timeout: float = 0.1
) -> tuple[RedisStore, RedisStore]:
    """Open the stores that `publish` wrote for the bundle's model.

    Opening does not contact the server; the first lookup does.

    Args:
        url: ``redis://``, ``rediss://`` (TLS) or ``unix://``.
        bundle: The bundle that the scorer uses.
        prefix: Prefix of all Redis keys.
        timeout: Seconds to wait for a connection and for a reply.

    Returns:
        The store of users and the store of items.

    Raises:
        StoreError: The URL, prefix or timeout is not valid.
        BundleError: The bundle cannot be read.
    """
    expected = {
        side: (width, _key_type(bundle, side))
        for side, width in zip(SIDES, (bundle.user_width, bundle.item_width), strict=True)
    }
    reader = VersionReader(RedisServer(url, timeout), Names(prefix, bundle.model), expected)
    return RedisStore(reader, "user"), RedisStore(reader, "item")


class VersionReader:
    """Finds the current version of a model; the stores of users and of items share one reader."""

    def __init__(
        self, server: RedisServer, names: Names, expected: Mapping[str, tuple[int, str]]
    ) -> None:
        """Prepare to read; ``expected`` maps "user" and "item" to (width, type of keys)."""
        self.server = server
        self.names = names
        self.expected = expected
        self._current: VersionInfo | None = None
        self._thread = threading.local()

    def versions(self, side: str) -> Iterator[VersionInfo]:
        """Yield the version to read; a caller that finds it expired asks for the next one."""
        expired = ""
        for _ in range(TRIES):
            version = self._version(side)
            if version.name == expired:
                return
            yield version
            expired = version.name
            self._thread.of_user = None
            if self._current is version:
                self._current = None

    def notice(self, current: bytes | None) -> None:
        """Take note of the name of the current version: if it is new, the next request reads it."""
        known = self._current
        if known is not None and current is not None and current != known.name.encode():
            self._current = None

    def _version(self, side: str) -> VersionInfo:
        """Return the version to read; for items, the version from which the user was read."""
        now = time.monotonic()
        of_user: tuple[VersionInfo, float] | None = getattr(self._thread, "of_user", None)
        if side == "item" and of_user is not None and now < of_user[1]:
            return of_user[0]
        version = self._current
        if version is None:
            version = self._current = self._read_version()
        if side == "user":
            self._thread.of_user = (version, now + REQUEST_SECONDS)
        return version

    def _read_version(self) -> VersionInfo:
        """Read the metadata of the current version; StoreError if it contradicts the bundle."""
        name, label = "", self.server.label
        for _ in range(TRIES):
            (current,) = self.server.run([("GET", self.names.current())])
            if current is None:
                raise StoreError(
                    f"{label}: nothing is published under '{self.names.prefix}' for model "
                    f"{self.names.model}; run hvdrec publish"
                )
            if name == current.decode(errors="replace"):
                break
            name = current.decode(errors="replace")
            (fields,) = self.server.run([("HGETALL", self.names.meta(name))])
            if not fields:
                continue  # it was replaced and has expired since its name was read
            try:
                return self._checked(parse_meta(name, fields))
            except ValueError as error:
                raise StoreError(
                    f"{label}: version {name} of model {self.names.model} cannot be read "
                    f"({error}); run hvdrec publish"
                ) from None
        raise incomplete_version(label, self.names, name)

    def _checked(self, version: VersionInfo) -> VersionInfo:
        for side, (width, keys) in self.expected.items():
            info = version.sides[side]
            if (info.width, info.keys) != (width, keys):
                raise ValueError(
                    f"{side}s have {info.keys} keys and width {info.width}, the bundle has "
                    f"{keys} keys and width {width}"
                )
        return version


class RedisStore:
    """The `Store` of embeddings in Redis; opened by `open_redis`.

    A lookup takes one round trip and reads one version. The same round trip reads the name of the
    current version, so that the next lookup notices a new publication. A lookup of items reads the
    version from which the same thread has just read a user. After a failure, lookups fail at once
    for a short time (`CircuitBreaker`); they succeed again when the server answers.
    """

    def __init__(self, reader: VersionReader, side: str) -> None:
        """Read the embeddings of one ``side``, ``"user"`` or ``"item"``."""
        self._reader = reader
        self._side = side
        self._width, self._key_type = reader.expected[side]

    @property
    def dtype(self) -> str:
        """Type of the keys: ``"string"`` or ``"int"``."""
        return self._key_type

    @property
    def model(self) -> str:
        """`Scorer.model` of the bundle that computed the embeddings."""
        return self._reader.names.model

    def lookup(self, keys: Sequence[str | int | None]) -> tuple[Array, Array]:
        """Look up embeddings by key; see `Store.lookup`."""
        queried = [i for i, key in enumerate(keys) if key is not None]
        fields = [field_of(key) for key in keys if key is not None]
        embeddings = np.zeros((len(keys), self._width), dtype=np.float32)
        is_stored = np.zeros(len(keys), dtype=bool)
        if not queried:
            return embeddings, is_stored
        version, rows = self._rows(fields)
        info = version.sides[self._side]
        stored = [row for row in rows if row is not None]
        if set(map(len, stored)) - {info.row_dtype.itemsize}:
            raise self._damaged(version, fields, rows)
        if len(stored) < len(rows):
            queried = [i for i, row in zip(queried, rows, strict=True) if row is not None]
        is_stored[queried] = True
        embeddings[queried] = unpack(info, stored)
        return embeddings, is_stored

    def _rows(self, fields: Sequence[bytes]) -> tuple[VersionInfo, list[bytes | None]]:
        """Return a version and the row of each hash field in it; None for a missing field."""
        name = ""
        for version in self._reader.versions(self._side):
            name = version.name
            rows: list[bytes | None] = []
            for start in range(0, len(fields), BLOCK_KEYS):
                block = self._block(version, fields[start : start + BLOCK_KEYS])
                if block is None:
                    break
                rows += block
            else:
                return version, rows
        raise incomplete_version(self._reader.server.label, self._reader.names, name)

    def _block(self, version: VersionInfo, fields: Sequence[bytes]) -> list[bytes | None] | None:
        """Read the rows of hash fields in one round trip; None if the version has expired."""
        names, info = self._reader.names, version.sides[self._side]
        buckets: dict[int, list[int]] = {}
        for position, field in enumerate(fields):
            buckets.setdefault(info.bucket_of(field), []).append(position)
        commands: list[Command] = []
        for number, positions in buckets.items():
            bucket = names.bucket(version.name, self._side, number)
            commands.append(("HMGET", bucket, MARK, *[fields[i] for i in positions]))
        commands.append(("GET", names.current()))
        *replies, current = self._reader.server.run(commands)
        self._reader.notice(current)
        rows: list[bytes | None] = [None] * len(fields)
        for positions, (mark, *values) in zip(buckets.values(), replies, strict=True):
            if mark is None:
                return None
            for position, value in zip(positions, values, strict=True):
                rows[position] = value
        return rows

    def _damaged(
        self, version: VersionInfo, fields: Sequence[bytes], rows: Sequence[bytes | None]
    ) -> StoreError:
        """Build the error for the first row that has the wrong length."""
        size = version.sides[self._side].row_dtype.itemsize
        pairs = zip(fields, rows, strict=True)
        field, row = next(pair for pair in pairs if pair[1] is not None and len(pair[1]) != size)
        return StoreError(
            f"{self._reader.server.label}: {self._side} {shown(field.decode())} in version "
            f"{version.name} of model {self.model} has {len(row or b'')} bytes, expected {size}; "
            "run hvdrec publish"
        )


def _key_type(info: BundleInfo, side: str) -> str:
    return "string" if read_array(info.path, f"{side}s/keys.npy").dtype.kind == "S" else "int"
