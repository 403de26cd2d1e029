"""Adding and replacing single embeddings in Redis, between two publications."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.scoring.errors import RequestError, StoreError, choices, shown
from hvdrec.scoring.graph_inputs import key_value
from hvdrec.scoring.stores.redis.layout import (
    MARK,
    PREFIX,
    SIDES,
    Names,
    SideInfo,
    VersionInfo,
    compressed,
    field_of,
    pack,
)
from hvdrec.scoring.stores.redis.server import RedisServer, WatchError
from hvdrec.scoring.stores.redis.versions import not_whole, read_current

Array = NDArray[Any]
BLOCK_ROWS = 1024
TRIES = 20


def publish_rows(
    url: str,
    model: str,
    side: str,
    keys: Sequence[str | int],
    embeddings: Array,
    *,
    prefix: str = PREFIX,
    timeout: float = 30.0,
) -> str:
    """Add or replace embeddings within the current version of a model and return its name.

    For users and items that are newer than the bundle: ``keys`` with ``embeddings`` float [k,
    width], for example `Scorer.embed_user` of raw features, and `Scorer.model`. They stay until
    the next version, which holds what its bundle holds; if that comes in between, all of them are
    in it. Raises RequestError for keys or embeddings that cannot be, StoreError for what the
    server says.
    """
    if side not in SIDES:
        raise RequestError(f"side = {shown(side)}: must be one of {choices(SIDES)}")
    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2 or len(keys) != len(embeddings):
        raise RequestError(
            f"{len(keys)} keys and embeddings of shape {embeddings.shape}: must be a row for each"
        )
    server, names = RedisServer(url, timeout), Names(prefix, model)
    for _ in range(TRIES):
        version = read_current(server, names)
        fields = [_field(key, version.sides[side], side) for key in keys]
        rows = _packed(version.sides[side], embeddings)
        blocks = (slice(i, i + BLOCK_ROWS) for i in range(0, len(fields), BLOCK_ROWS))
        if all(_replace(server, names, version, side, fields[b], rows[b]) for b in blocks):
            return version.name
    raise StoreError(f"{server.label}: versions are replaced all the time; try again")


def _field(key: Any, info: SideInfo, side: str) -> bytes:
    plain = key_value(key, info.keys, f"key of a {side}")
    if plain is None:
        raise RequestError(f"key of a {side} = {shown(key)}: must not be missing")
    return field_of(plain)


def _packed(info: SideInfo, embeddings: Array) -> list[bytes]:
    """Return new embeddings as they are stored; RequestError for what cannot be."""
    if embeddings.dtype.kind != "f" or embeddings.shape != (len(embeddings), info.width):
        raise RequestError(
            f"embeddings are {embeddings.dtype} of shape {embeddings.shape}, expected float32 of "
            f"({len(embeddings)}, {info.width})"
        )
    if not np.isfinite(embeddings).all():
        raise RequestError("embeddings hold numbers that are not finite")
    with np.errstate(over="ignore"):
        stored, scales = compressed(info, embeddings.astype(np.float32))
    if not np.isfinite(stored).all():
        raise RequestError(f"embeddings hold numbers too large for the version's {info.dtype}")
    return pack(info, stored, scales)


def _replace(
    server: RedisServer,
    names: Names,
    version: VersionInfo,
    side: str,
    fields: Sequence[bytes],
    rows: Sequence[bytes],
) -> bool:
    """Write rows into a version in one transaction; False where it is not current any more."""
    pairs: dict[str, list[bytes]] = {}
    for field, row in zip(fields, rows, strict=True):
        number = version.sides[side].bucket_of(field)
        pairs.setdefault(names.bucket(version.name, side, number), []).extend((field, row))
    with server.guarded() as client, client.pipeline(transaction=True) as pipeline:
        pipeline.watch(names.current())
        if pipeline.get(names.current()) != version.name.encode():
            return False
        pipeline.multi()
        for key in pairs:
            pipeline.hexists(key, MARK)
        for key, items in pairs.items():
            pipeline.hset(key, items=items)
        try:
            replies = pipeline.execute()
        except WatchError:
            return False
    if not all(replies[: len(pairs)]):
        raise not_whole(server, names, version.name)
    return True
