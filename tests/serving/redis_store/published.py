"""What the tests of Redis ask of a server, of what was published there, and of its readers."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hvdrec.scoring.bundle import read_bundle
from hvdrec.scoring.errors import StoreError
from hvdrec.scoring.stores.redis.layout import Names
from hvdrec.scoring.stores.redis.store import RedisStore, open_stores
from tests.serving.redis_store.process import SECONDS, RedisProcess
from tests.stores import (
    TEXT_KEYS,
    WIDTH,
    rewrite_side,
)

PATIENT = 30.0


def stores_of(server: RedisProcess, bundle: Path, **options: Any) -> tuple[RedisStore, RedisStore]:
    """Return stores that wait long, for a machine that is busy."""
    return open_stores(server.url, bundle, **{"timeout": PATIENT, **options})


def names_of(bundle: Path) -> Names:
    """Return the names of the keys of a bundle's model."""
    return Names("hvdrec", read_bundle(bundle, verify=False).model)


def fill(bundle: Path, value: float) -> Path:
    """Give all embeddings of a bundle one value; its model stays the same."""
    for side in ("user", "item"):
        values = np.full((len(TEXT_KEYS), WIDTH), value)
        rewrite_side(bundle, side, TEXT_KEYS, values, "float32")
    return bundle


def everything(server: RedisProcess) -> set[str]:
    """Return all keys."""
    return {key.decode() for key in server.client().keys("*")}


def lasting(server: RedisProcess) -> set[str]:
    """Return the keys that never expire."""
    client = server.client()
    return {key for key in everything(server) if client.pttl(key) == -1}


def expected_lasting(bundle: Path, version: str) -> set[str]:
    """Return the keys that are there for good when a version is current."""
    names = names_of(bundle)
    buckets = {names.bucket(version, side, 0) for side in ("user", "item")}
    return {names.current(), names.meta(version), *buckets, "hvdrec:tiny:models"}


def wait_until(is_so: Callable[[], object]) -> None:
    """Wait until something is so; a failure after a minute."""
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def answers(store: RedisStore) -> bool:
    """Return whether a look-up is answered."""
    return error_line(store) == ""


def error_line(store: RedisStore) -> str:
    """Return the line of a look-up's error; nothing where it is answered."""
    try:
        assert store.lookup(["a"])[1].all()
    except StoreError as error:
        return str(error)
    return ""
