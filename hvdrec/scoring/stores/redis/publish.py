"""Writing embeddings to Redis for `hvdrec.scoring.stores.redis.store` to read.

A bundle becomes a new version. Its rows are written beside those that are read, with an expiry
that is renewed while the writing goes on; when all are in, one transaction makes the version the
current one, lets it stay, and lets the one before expire. Whatever ends a publication before that
leaves readers what they had, and its rows expire. Several may publish at once: the last one stays.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.scoring.bundle import BundleInfo, check_unchanged, read_bundle
from hvdrec.scoring.errors import StoreError, shown
from hvdrec.scoring.stores.redis.layout import (
    BUCKET_ROWS,
    MARK,
    PREFIX,
    SIDES,
    Names,
    SideInfo,
    VersionInfo,
    buckets_for,
    field_of,
    meta_fields,
    models_key,
    pack,
    parse_meta,
)
from hvdrec.scoring.stores.redis.server import Command, RedisServer, WatchError
from hvdrec.scoring.stores.redis.versions import not_whole
from hvdrec.scoring.stores.store import EmbeddingStore
from hvdrec.scoring.verify import verify_arrays

Array = NDArray[Any]
LEASE_SECONDS = 900.0
"""Rows of a version that is not current yet expire after this long without a sign of life."""
STAGGER_SECONDS = 0.1
"""Buckets expire one after another: Redis frees each in one go, and answers nobody meanwhile."""
COMMAND_ROWS = 1024
BLOCK_COMMANDS = 10_000
TRIES = 20
MODELS_KEPT = 2
UNREAD_SECONDS = 3600


@dataclass(frozen=True)
class Publication:
    """What was published."""

    server: str
    model: str
    version: str
    replaced: str | None
    """The version that was current before and now expires."""
    users: int
    items: int
    seconds: float
    dropped_models: tuple[str, ...]
    """Models of the same bundle name that nobody reads any more and that now expire."""


def publish(
    bundle: str | Path,
    url: str,
    *,
    prefix: str = PREFIX,
    keep: float = 600.0,
    timeout: float = 30.0,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Publication:
    """Write a bundle's users and items to Redis as a new version and make it the current one.

    keep: seconds until the version before expires, both take memory until then; timeout: for each
    answer of the server; progress: told the rows that are in, and of how many. A new model (a
    retrained bundle) is published beside the one before, for services that still read that: of one
    bundle name the two newest models stay, older ones go once nobody has read them for an hour.
    Raises BundleError for a bundle that is not whole, StoreError for what the server says.
    """
    started = time.monotonic()
    if not isinstance(keep, int | float) or isinstance(keep, bool) or not 1 <= keep <= 1e9:
        raise StoreError(f"keep = {shown(keep)}: must be seconds, 1 or more")
    server = RedisServer(url, timeout)
    info = read_bundle(Path(bundle), verify=True)
    names = Names(prefix, info.model)
    stores = {
        side: EmbeddingStore(info, side, width)
        for side, width in zip(SIDES, (info.user_width, info.item_width), strict=True)
    }
    verify_arrays(info)
    check_unchanged(info)
    now = time.gmtime()
    version = VersionInfo(
        name=f"{time.strftime('%Y%m%dT%H%M%SZ', now)}-{secrets.token_hex(4)}",
        bundle=info.version,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", now),
        sides={side: _side_info(store) for side, store in stores.items()},
    )
    draft = _Draft(server, names, version)
    with draft.dropped_on_failure():
        draft.open()
        done, total = 0, sum(map(len, stores.values()))
        for side, store in stores.items():
            for rows in draft.write(side, store):
                done += rows
                progress(done, total)
        # Before the switch: who drops unread models at the same time sees that this one is wanted.
        _register(server, prefix, info)
        replaced = draft.switch(keep)
    _register(server, prefix, info)
    return Publication(
        server=server.label,
        model=info.model,
        version=version.name,
        replaced=replaced,
        users=len(stores["user"]),
        items=len(stores["item"]),
        seconds=time.monotonic() - started,
        dropped_models=_drop_unread(server, prefix, info, keep),
    )


class _Draft:
    """A version while it is written."""

    def __init__(self, server: RedisServer, names: Names, version: VersionInfo) -> None:
        self._server = server
        self._names = names
        self._version = version
        self._meta = meta_fields(version)
        self._keys = names.all_of(version)
        self._sizes = dict.fromkeys(self._keys, 1)
        self._sizes[self._keys[0]] = len(self._meta)
        self._renewed = 0.0
        self._is_switching = False

    @contextmanager
    def dropped_on_failure(self) -> Iterator[None]:
        """Remove what was written if what is done here fails; if that fails, too, it expires."""
        try:
            yield
        except BaseException as error:
            if not self._is_switching:
                with suppress(StoreError):
                    self._run([("UNLINK", key) for key in self._keys])
            elif isinstance(error, StoreError):
                raise StoreError(
                    f"{error}; whether version {self._version.name} is current now is not known: "
                    "publish again"
                ) from None
            raise

    def open(self) -> None:
        """Make every bucket, with its mark and an expiry, and the metadata."""
        self._renewed = time.monotonic()
        with self._server.guarded() as client:
            pipeline = client.pipeline(transaction=True)
            for key in self._keys:
                pipeline.hset(key, mapping={MARK: 1} if key != self._keys[0] else self._meta)
            _expire(pipeline, self._keys, LEASE_SECONDS)
            pipeline.execute()

    def write(self, side: str, store: EmbeddingStore) -> Iterator[int]:
        """Write one side's rows, a bucket in a round trip; give the number of rows of each."""
        info = self._version.sides[side]
        numbers = np.fromiter(map(info.bucket_of, _fields(store.keys)), np.int32, len(store))
        order = np.argsort(numbers, kind="stable")
        bounds = np.searchsorted(numbers[order], np.arange(info.buckets + 1))
        for number in range(info.buckets):
            rows = order[bounds[number] : bounds[number + 1]]
            key = self._names.bucket(self._version.name, side, number)
            commands: list[Command] = []
            for start in range(0, len(rows), COMMAND_ROWS):
                part = rows[start : start + COMMAND_ROWS]
                scales = None if store.scales is None else store.scales[part]
                packed = pack(info, store.embeddings[part], scales)
                pairs = zip(_fields(store.keys[part]), packed, strict=True)
                commands.append(("HSET", key, *chain.from_iterable(pairs)))
            self._server.run([*commands, ("PEXPIRE", key, int(LEASE_SECONDS * 1000))])
            self._sizes[key] += len(rows)
            self._renew()
            yield len(rows)

    def switch(self, keep: float) -> str | None:
        """Make the version the current one and return the one before, which then expires.

        StoreError where not every row is there.
        """
        current = self._names.current()
        with self._server.guarded() as client, client.pipeline(transaction=True) as pipeline:
            for _ in range(TRIES):
                # What changes from here on makes the transaction fail.
                pipeline.watch(current, *self._keys)
                self._check_whole()
                name = pipeline.get(current)
                before = _keys_of(pipeline, self._names, name)
                pipeline.multi()
                pipeline.set(current, self._version.name)
                for key in self._keys:
                    pipeline.persist(key)
                _expire(pipeline, before, keep)
                self._is_switching = True
                try:
                    pipeline.execute()
                except WatchError:
                    self._is_switching = False
                else:
                    return None if name is None else str(name.decode(errors="replace"))
        raise StoreError(f"{self._server.label}: others publish all the time; try again")

    def _check_whole(self) -> None:
        sizes = self._run([("HLEN", key) for key in self._keys])
        if sizes != list(self._sizes.values()):
            raise not_whole(self._server, self._names, self._version.name)

    def _renew(self) -> None:
        """Put off the expiry of all keys, now and then."""
        if time.monotonic() - self._renewed > LEASE_SECONDS / 4:
            self._renewed = time.monotonic()
            self._run([("PEXPIRE", key, int(LEASE_SECONDS * 1000)) for key in self._keys])

    def _run(self, commands: Sequence[Command]) -> list[Any]:
        replies: list[Any] = []
        for start in range(0, len(commands), BLOCK_COMMANDS):
            replies += self._server.run(commands[start : start + BLOCK_COMMANDS])
        return replies


def _side_info(store: EmbeddingStore) -> SideInfo:
    return SideInfo(
        rows=len(store),
        width=store.embeddings.shape[1],
        dtype=store.embeddings.dtype.name,
        keys=store.dtype,
        buckets=buckets_for(len(store)),
    )


def _fields(keys: Array) -> Iterator[bytes]:
    """Give the fields of a bundle's keys, int64 [n] or bytes [n]."""
    for start in range(0, len(keys), BUCKET_ROWS):
        part = keys[start : start + BUCKET_ROWS].tolist()
        yield from part if keys.dtype.kind == "S" else map(field_of, part)


def _expire(pipeline: Any, keys: Sequence[str], seconds: float) -> None:
    for number, key in enumerate(keys):
        pipeline.pexpire(key, int((seconds + number * STAGGER_SECONDS) * 1000))


def _keys_of(pipeline: Any, names: Names, version: bytes | None) -> list[str]:
    """Return the keys of a version, as far as they can be told."""
    if version is None:
        return []
    name = version.decode(errors="replace")
    try:
        return names.all_of(parse_meta(name, pipeline.hgetall(names.meta(name))))
    except ValueError:
        return [names.meta(name)]


def _register(server: RedisServer, prefix: str, info: BundleInfo) -> None:
    """Take note that a model of the bundle's name is published now."""
    server.run([("ZADD", models_key(prefix, info.name), time.time(), info.model)])


def _drop_unread(
    server: RedisServer, prefix: str, info: BundleInfo, keep: float
) -> tuple[str, ...]:
    """Let models expire that are older than the newest and that nobody reads; return them.

    What cannot be dropped now is left for the next publication.
    """
    dropped: list[str] = []
    with suppress(StoreError):
        registry = models_key(prefix, info.name)
        (members,) = server.run([("ZREVRANGE", registry, MODELS_KEPT, -1)])
        for model in (member.decode(errors="replace") for member in members):
            names = Names(prefix, model)
            score, unread = server.run(
                [("ZSCORE", registry, model), ("OBJECT", "IDLETIME", names.current())]
            )
            if unread is None:
                server.run([("ZREM", registry, model)])
            elif unread >= UNREAD_SECONDS and _drop(server, names, registry, score, keep):
                dropped.append(model)
    return tuple(dropped)


def _drop(server: RedisServer, names: Names, registry: str, score: Any, keep: float) -> bool:
    """Let a model expire, unless it is published again meanwhile or expires already."""
    current = names.current()
    with server.guarded() as client, client.pipeline(transaction=True) as pipeline:
        pipeline.watch(current)
        if pipeline.pttl(current) != -1:
            return False
        if server.run([("ZSCORE", registry, names.model)]) != [score]:
            return False
        keys = _keys_of(pipeline, names, pipeline.get(current))
        pipeline.multi()
        _expire(pipeline, [current, *keys], keep)
        try:
            pipeline.execute()
        except WatchError:
            return False
    return True
