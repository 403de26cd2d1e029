"""Publish a bundle's embeddings to Redis, where `hvdrec.scoring.stores.redis.store` reads them.

A publication writes a new version beside the current one. The new rows have an expiry, which the
publisher renews while it writes. Then one transaction makes the new version current, removes its
expiry and lets the previous version expire. If a publication fails before this transaction, readers
keep the previous version, and the new rows expire. Publications may run concurrently: the version
of the one that finishes last stays current.
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
from hvdrec.scoring.stores.arrays import ArrayStore
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
    incomplete_version,
    meta_fields,
    models_key,
    pack,
    parse_meta,
)
from hvdrec.scoring.stores.redis.server import Command, RedisServer, WatchError
from hvdrec.scoring.verify import verify_arrays

Array = NDArray[Any]
LEASE_SECONDS = 900.0
"""Rows that are being written expire this long after the last renewal."""
STAGGER_SECONDS = 0.1
"""Time between the expiries of two buckets. Redis blocks while it frees a bucket; in between it can
answer requests."""
COMMAND_ROWS = 1024
BLOCK_COMMANDS = 10_000
TRIES = 20
MODELS_KEPT = 2
UNREAD_SECONDS = 3600


@dataclass(frozen=True)
class Publication:
    """The result of `publish`.

    Attributes:
        server: URL of the server, without the password.
        model: `BundleInfo.model` of the published bundle.
        version: Name of the new version.
        replaced: The previous version, which now expires; None if there was none.
        users: Number of users.
        items: Number of items.
        seconds: Duration.
        dropped_models: Models that were published before from bundles of the same name. They now
            expire, because no service has read them lately.
    """

    server: str
    model: str
    version: str
    replaced: str | None
    users: int
    items: int
    seconds: float
    dropped_models: tuple[str, ...]


def publish(
    bundle: str | Path,
    url: str,
    *,
    prefix: str = PREFIX,
    keep: float = 600.0,
    timeout: float = 30.0,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Publication:
    """Write a bundle's users and items to Redis and make them the current version.

    The embeddings of a new model (a retrained bundle) are stored beside the embeddings of the
    previous model, which other services may still read. Among bundles with the same name, the two
    newest models stay. An older one expires when nobody has read it for an hour.

    Args:
        bundle: Directory of the bundle; it is verified first.
        url: ``redis://``, ``rediss://`` (TLS) or ``unix://``.
        prefix: Prefix of all Redis keys.
        keep: Seconds until the previous version expires; until then both take memory.
        timeout: Seconds to wait for each reply.
        progress: Called with the number of rows written and the total.

    Raises:
        BundleError: The bundle is missing or damaged.
        StoreError: The server fails or refuses a command, or an argument is not valid.
    """
    started = time.monotonic()
    if not isinstance(keep, int | float) or isinstance(keep, bool) or not 1 <= keep <= 1e9:
        raise StoreError(
            f"keep = {shown(keep)}: must be seconds, 1 or more", field="keep", value=keep
        )
    server = RedisServer(url, timeout)
    info, stores = _verified(Path(bundle))
    names = Names(prefix, info.model)
    draft = _Draft(server, names, _new_version(info, stores))
    with draft.dropped_on_failure():
        draft.open()
        done, total = 0, sum(map(len, stores.values()))
        for side, store in stores.items():
            for rows in draft.write(side, store):
                done += rows
                progress(done, total)
        # Register before the switch, so that a concurrent `_drop_unread` does not drop this model.
        _register(server, prefix, info)
        replaced = draft.switch(keep)
    _register(server, prefix, info)
    return Publication(
        server=server.label,
        model=info.model,
        version=draft.version.name,
        replaced=replaced,
        users=len(stores["user"]),
        items=len(stores["item"]),
        seconds=time.monotonic() - started,
        dropped_models=_drop_unread(server, prefix, info, keep),
    )


def _verified(bundle: Path) -> tuple[BundleInfo, dict[str, ArrayStore]]:
    info = read_bundle(bundle, verify=True)
    stores = {
        side: ArrayStore(info, side, width)
        for side, width in zip(SIDES, (info.user_width, info.item_width), strict=True)
    }
    verify_arrays(info)
    check_unchanged(info)
    return info, stores


class _Draft:
    """A version that is being written."""

    def __init__(self, server: RedisServer, names: Names, version: VersionInfo) -> None:
        self.version = version
        self._server = server
        self._names = names
        self._meta = meta_fields(version)
        self._keys = names.all_of(version)
        self._sizes = dict.fromkeys(self._keys, 1)
        self._sizes[self._keys[0]] = len(self._meta)
        self._renewed = 0.0
        self._is_switching = False

    @contextmanager
    def dropped_on_failure(self) -> Iterator[None]:
        """Delete the written Redis keys if the ``with`` body fails; any that remain expire."""
        try:
            yield
        except BaseException as error:
            if not self._is_switching:
                with suppress(StoreError):
                    self._run([("UNLINK", key) for key in self._keys])
            elif isinstance(error, StoreError):
                raise StoreError(
                    f"{error}; version {self.version.name} may or may not be current: publish again"
                ) from None
            raise

    def open(self) -> None:
        """Create the metadata and every bucket; set `MARK` and an expiry for each bucket."""
        self._renewed = time.monotonic()
        with self._server.guarded() as client:
            pipeline = client.pipeline(transaction=True)
            for key in self._keys:
                pipeline.hset(key, mapping={MARK: 1} if key != self._keys[0] else self._meta)
            _expire(pipeline, self._keys, LEASE_SECONDS)
            pipeline.execute()

    def write(self, side: str, store: ArrayStore) -> Iterator[int]:
        """Write the rows of ``side``, one bucket per round trip; yield each bucket's row count."""
        info = self.version.sides[side]
        numbers = np.fromiter(map(info.bucket_of, _fields(store.keys)), np.int32, len(store))
        order = np.argsort(numbers, kind="stable")
        bounds = np.searchsorted(numbers[order], np.arange(info.buckets + 1))
        for number in range(info.buckets):
            rows = order[bounds[number] : bounds[number + 1]]
            key = self._names.bucket(self.version.name, side, number)
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
        """Make the version current and let the previous one expire after ``keep`` seconds.

        Returns the name of the previous version. Raises StoreError if rows are missing.
        """
        current = self._names.current()
        with self._server.guarded() as client, client.pipeline(transaction=True) as pipeline:
            for _ in range(TRIES):
                # If one of these keys changes from now on, the transaction fails.
                pipeline.watch(current, *self._keys)
                self._check_complete()
                name = pipeline.get(current)
                previous = _keys_of(pipeline, self._names, name)
                pipeline.multi()
                pipeline.set(current, self.version.name)
                for key in self._keys:
                    pipeline.persist(key)
                _expire(pipeline, previous, keep)
                self._is_switching = True
                try:
                    pipeline.execute()
                except WatchError:
                    self._is_switching = False
                else:
                    return None if name is None else str(name.decode(errors="replace"))
        raise StoreError(f"{self._server.label}: other publications keep interfering; try again")

    def _check_complete(self) -> None:
        sizes = self._run([("HLEN", key) for key in self._keys])
        if sizes != list(self._sizes.values()):
            raise incomplete_version(self._server.label, self._names, self.version.name)

    def _renew(self) -> None:
        """Renew the expiry of all keys if a quarter of `LEASE_SECONDS` has passed."""
        if time.monotonic() - self._renewed > LEASE_SECONDS / 4:
            self._renewed = time.monotonic()
            self._run([("PEXPIRE", key, int(LEASE_SECONDS * 1000)) for key in self._keys])

    def _run(self, commands: Sequence[Command]) -> list[Any]:
        replies: list[Any] = []
        for start in range(0, len(commands), BLOCK_COMMANDS):
            replies += self._server.run(commands[start : start + BLOCK_COMMANDS])
        return replies


def _new_version(info: BundleInfo, stores: dict[str, ArrayStore]) -> VersionInfo:
    now = time.gmtime()
    sides = {
        side: SideInfo(
            rows=len(store),
            width=store.embeddings.shape[1],
            dtype=store.embeddings.dtype.name,
            keys=store.dtype,
            buckets=buckets_for(len(store)),
        )
        for side, store in stores.items()
    }
    name = f"{time.strftime('%Y%m%dT%H%M%SZ', now)}-{secrets.token_hex(4)}"
    return VersionInfo(name, info.version, time.strftime("%Y-%m-%dT%H:%M:%SZ", now), sides)


def _fields(keys: Array) -> Iterator[bytes]:
    """Yield the hash field of each key in a bundle's array of keys, int64 [n] or bytes [n]."""
    for start in range(0, len(keys), BUCKET_ROWS):
        part = keys[start : start + BUCKET_ROWS].tolist()
        yield from part if keys.dtype.kind == "S" else map(field_of, part)


def _expire(pipeline: Any, keys: Sequence[str], seconds: float) -> None:
    for number, key in enumerate(keys):
        pipeline.pexpire(key, int((seconds + number * STAGGER_SECONDS) * 1000))


def _keys_of(pipeline: Any, names: Names, version: bytes | None) -> list[str]:
    """Return the Redis keys of a version; if the metadata is damaged, only the metadata's key."""
    if version is None:
        return []
    name = version.decode(errors="replace")
    try:
        return names.all_of(parse_meta(name, pipeline.hgetall(names.meta(name))))
    except ValueError:
        return [names.meta(name)]


def _register(server: RedisServer, prefix: str, info: BundleInfo) -> None:
    """Record the bundle's model and the time of publication under the bundle's name."""
    server.run([("ZADD", models_key(prefix, info.name), time.time(), info.model)])


def _drop_unread(
    server: RedisServer, prefix: str, info: BundleInfo, keep: float
) -> tuple[str, ...]:
    """Set an expiry on old models that nobody reads; return these models.

    A failure is ignored, since the next publication tries again.
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
    """Let a model expire, unless it has an expiry already or is being published again."""
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
