"""Which version of a model is current on a Redis server, and what is told of it."""

from __future__ import annotations

from hvdrec.scoring.errors import StoreError
from hvdrec.scoring.stores.redis.layout import Names, VersionInfo, parse_meta
from hvdrec.scoring.stores.redis.server import RedisServer

TRIES = 4


def read_current(server: RedisServer, names: Names) -> VersionInfo:
    """Return the current version of a model; StoreError where there is none, or not whole."""
    name = ""
    for _ in range(TRIES):
        (current,) = server.run([("GET", names.current())])
        if current is None:
            raise StoreError(
                f"{server.label}: nothing is published under '{names.prefix}' for model "
                f"{names.model}; run hvdrec publish"
            )
        if name == current.decode(errors="replace"):
            break
        name = current.decode(errors="replace")
        (fields,) = server.run([("HGETALL", names.meta(name))])
        if not fields:
            continue  # replaced and expired in between
        try:
            return parse_meta(name, fields)
        except ValueError as error:
            raise unreadable(server, names, name, str(error)) from None
    raise not_whole(server, names, name)


def unreadable(server: RedisServer, names: Names, version: str, reason: str) -> StoreError:
    """Return the error for a version that does not fit."""
    return StoreError(
        f"{server.label}: version {version} of model {names.model} cannot be read ({reason}); "
        "run hvdrec publish"
    )


def not_whole(server: RedisServer, names: Names, version: str) -> StoreError:
    """Return the error for a version of which a part is missing."""
    return StoreError(
        f"{server.label}: version {version} of model {names.model} is not whole; see that the "
        "server does not evict (maxmemory-policy noeviction), and run hvdrec publish"
    )
