"""Embeddings of users and items in Redis, shared by many services and updated between bundles.

users, items = open_stores("redis://host:6379/0", "bundle/")
scorer = Scorer.load("bundle/", users=users, items=items)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.scoring.bundle import BundleInfo, read_array, read_bundle
from hvdrec.scoring.errors import StoreError, shown
from hvdrec.scoring.stores.redis.layout import (
    MARK,
    PREFIX,
    SIDES,
    Names,
    VersionInfo,
    field_of,
    unpack,
)
from hvdrec.scoring.stores.redis.server import Command, RedisServer
from hvdrec.scoring.stores.redis.versions import TRIES, not_whole, read_current, unreadable

Array = NDArray[Any]
BLOCK_KEYS = 4096
"""Keys of one round trip."""
REQUEST_SECONDS = 1.0
"""Items looked up so soon after a user, by the same thread, are of the same request."""


def open_stores(
    url: str, bundle: str | Path | BundleInfo, *, prefix: str = PREFIX, timeout: float = 0.1
) -> tuple[RedisStore, RedisStore]:
    """Return the stores of users and of items that `publish` wrote for the bundle's model.

    url: redis://, rediss:// (TLS) or unix://; timeout: seconds to wait for a connection and for an
    answer. Connects at the first look-up: a server that is down then is no error here. Raises
    StoreError for a URL that cannot be, BundleError for a bundle that cannot be read.
    """
    info = bundle if isinstance(bundle, BundleInfo) else read_bundle(Path(bundle), verify=False)
    expected = {
        side: Expected(width, _key_type(info, side))
        for side, width in zip(SIDES, (info.user_width, info.item_width), strict=True)
    }
    published = Published(RedisServer(url, timeout), Names(prefix, info.model), expected)
    return RedisStore(published, "user"), RedisStore(published, "item")


@dataclass(frozen=True)
class Expected:
    """What the bundle says of one side."""

    width: int
    keys: str
    """Type of a key: "string" or "int"."""


class Published:
    """What is published for one model; users and items are read through one of it."""

    def __init__(self, server: RedisServer, names: Names, expected: Mapping[str, Expected]) -> None:
        self.server = server
        self.names = names
        self.expected = expected
        self._known: VersionInfo | None = None
        self._thread = threading.local()

    def versions(self, side: str) -> Iterator[VersionInfo]:
        """Give the version to read and, while it turns out to have gone, what took its place."""
        lost = ""
        for _ in range(TRIES):
            version = self._version(side)
            if version.name == lost:
                return
            yield version
            lost = version.name
            self._thread.of_user = None
            if self._known is version:
                self._known = None

    def _version(self, side: str) -> VersionInfo:
        """Return the current version as far as it is known; for items, that of their user."""
        now = time.monotonic()
        of_user: tuple[VersionInfo, float] | None = getattr(self._thread, "of_user", None)
        if side == "item" and of_user is not None and now < of_user[1]:
            return of_user[0]
        version = self._known
        if version is None:
            version = self._known = self._read_version()
        if side == "user":
            self._thread.of_user = (version, now + REQUEST_SECONDS)
        return version

    def notice(self, current: bytes | None) -> None:
        """Take note of which version is current now; the next request reads that."""
        known = self._known
        if known is not None and current is not None and current != known.name.encode():
            self._known = None

    def _read_version(self) -> VersionInfo:
        version = read_current(self.server, self.names)
        for side, expected in self.expected.items():
            found = version.sides[side]
            if Expected(found.width, found.keys) != expected:
                reason = (
                    f"{side}s have {found.keys} keys and width {found.width}, the bundle has "
                    f"{expected.keys} keys and width {expected.width}"
                )
                raise unreadable(self.server, self.names, version.name, reason)
        return version


class RedisStore:
    """Users' or items' embeddings in Redis: a `Store`, made by `open_stores`.

    A look-up is one round trip, and of one version. The same trip tells which version is current,
    so the next look-up reads what was published meanwhile; items follow the user that the same
    thread has just looked up. After a failure look-ups fail at once for a moment (`Pause`), and
    go on by themselves when the server answers again.
    """

    def __init__(self, published: Published, side: str) -> None:
        self._published = published
        self._side = side
        self._expected = published.expected[side]

    @property
    def dtype(self) -> str:
        """Return the type of a key: "string" or "int"."""
        return self._expected.keys

    @property
    def model(self) -> str:
        """Return the model that the embeddings were made for (`Scorer.model`)."""
        return self._published.names.model

    def __len__(self) -> int:
        """Return the number of stored embeddings; asks the server, so it may raise StoreError."""
        names, name = self._published.names, ""
        for version in self._published.versions(self._side):
            name = version.name
            buckets = range(version.sides[self._side].buckets)
            keys = [names.bucket(name, self._side, number) for number in buckets]
            sizes: list[int] = self._published.server.run([("HLEN", key) for key in keys])
            if all(sizes):
                return sum(sizes) - len(sizes)  # without the marks
        raise not_whole(self._published.server, names, name)

    def __bool__(self) -> bool:
        """Return True: it is a store, whatever it holds."""
        return True

    def lookup(self, keys: Sequence[str | int | None]) -> tuple[Array, Array]:
        """Return embeddings float32 [k, width], zeros where a key is not stored, and bool [k].

        Raises StoreError where the server cannot answer, or holds what cannot be.
        """
        asked = [place for place, key in enumerate(keys) if key is not None]
        fields = [field_of(key) for key in keys if key is not None]
        embeddings = np.zeros((len(keys), self._expected.width), dtype=np.float32)
        found = np.zeros(len(keys), dtype=bool)
        if not asked:
            return embeddings, found
        version, rows = self._rows(fields)
        info = version.sides[self._side]
        stored = [row for row in rows if row is not None]
        if set(map(len, stored)) - {info.row_dtype.itemsize}:
            raise self._damaged(version, fields, rows)
        if len(stored) < len(rows):
            asked = [place for place, row in zip(asked, rows, strict=True) if row is not None]
        found[asked] = True
        embeddings[asked] = unpack(info, stored)
        return embeddings, found

    def _rows(self, fields: Sequence[bytes]) -> tuple[VersionInfo, list[bytes | None]]:
        """Return the rows of keys, None for one that is not stored, all of the version returned."""
        name = ""
        for version in self._published.versions(self._side):
            name = version.name
            rows: list[bytes | None] = []
            for start in range(0, len(fields), BLOCK_KEYS):
                block = self._block(version, fields[start : start + BLOCK_KEYS])
                if block is None:
                    break
                rows += block
            else:
                return version, rows
        raise not_whole(self._published.server, self._published.names, name)

    def _block(self, version: VersionInfo, fields: Sequence[bytes]) -> list[bytes | None] | None:
        """Return the rows of keys in one round trip; None where the version has gone."""
        names, info = self._published.names, version.sides[self._side]
        buckets: dict[int, list[int]] = {}
        for place, field in enumerate(fields):
            buckets.setdefault(info.bucket_of(field), []).append(place)
        commands: list[Command] = [
            (
                "HMGET",
                names.bucket(version.name, self._side, number),
                MARK,
                *[fields[place] for place in places],
            )
            for number, places in buckets.items()
        ]
        commands.append(("GET", names.current()))
        *replies, current = self._published.server.run(commands)
        self._published.notice(current)
        rows: list[bytes | None] = [None] * len(fields)
        for places, (mark, *values) in zip(buckets.values(), replies, strict=True):
            if mark is None:
                return None
            for place, value in zip(places, values, strict=True):
                rows[place] = value
        return rows

    def _damaged(
        self, version: VersionInfo, fields: Sequence[bytes], rows: Sequence[bytes | None]
    ) -> StoreError:
        size = version.sides[self._side].row_dtype.itemsize
        field, row = next(
            (field, row)
            for field, row in zip(fields, rows, strict=True)
            if row is not None and len(row) != size
        )
        return StoreError(
            f"{self._published.server.label}: {self._side} {shown(field.decode())} in version "
            f"{version.name} of model {self.model} has {len(row)} bytes, expected {size}; run "
            "hvdrec publish"
        )


def _key_type(info: BundleInfo, side: str) -> str:
    return "string" if read_array(info.path, f"{side}s/keys.npy").dtype.kind == "S" else "int"
