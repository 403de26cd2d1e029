"""Helpers that inspect what is published on a Redis server and read it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hvdrec.scoring.bundle import read_bundle
from hvdrec.scoring.errors import StoreError
from hvdrec.scoring.stores.redis.layout import Names
from hvdrec.scoring.stores.redis.store import RedisStore, open_redis
from tests.serving.redis_store.process import SECONDS, RedisProcess
from tests.stores import (
    STRING_KEYS,
    WIDTH,
    rewrite_side,
)

PATIENT = 30.0


def stores_of(server: RedisProcess, bundle: Path, **options: Any) -> tuple[RedisStore, RedisStore]:
    """Open stores with a timeout long enough for a busy machine."""
    info = read_bundle(bundle, verify=False)
    return open_redis(server.url, info, **{"timeout": PATIENT, **options})


def names_of(bundle: Path) -> Names:
    """Return the names of the Redis keys of a bundle's model."""
    return Names("hvdrec", read_bundle(bundle, verify=False).model)


def fill(bundle: Path, value: float) -> Path:
    """Set all embeddings of a bundle to one value; its model stays the same."""
    for side in ("user", "item"):
        values = np.full((len(STRING_KEYS), WIDTH), value)
        rewrite_side(bundle, side, STRING_KEYS, values, "float32")
    return bundle


def all_keys(server: RedisProcess) -> set[str]:
    """Return all keys."""
    return {key.decode() for key in server.client().keys("*")}


def persistent(server: RedisProcess) -> set[str]:
    """Return the keys that never expire."""
    client = server.client()
    return {key for key in all_keys(server) if client.pttl(key) == -1}


def expected_persistent(bundle: Path, version: str) -> set[str]:
    """Return the keys without expiry when a version is current."""
    names = names_of(bundle)
    buckets = {names.bucket(version, side, 0) for side in ("user", "item")}
    return {names.current(), names.meta(version), *buckets, "hvdrec:tiny:models"}


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds; fail after a minute."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def answers(store: RedisStore) -> bool:
    """Return True if a lookup succeeds."""
    return error_line(store) == ""


def error_line(store: RedisStore) -> str:
    """Return the error text of a lookup; empty if it succeeds."""
    try:
        assert store.lookup(["a"])[1].all()
    except StoreError as error:
        return str(error)
    return ""
