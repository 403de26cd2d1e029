"""Publications to a real Redis server: complete before they are read, and none left behind."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from hvdrec.scoring.bundle import read_bundle
from hvdrec.scoring.errors import BundleError, StoreError
from hvdrec.scoring.stores.redis.publish import LEASE_SECONDS, publish
from tests.serving.redis_store.process import RedisProcess
from tests.serving.redis_store.published import (
    all_keys,
    expected_persistent,
    fill,
    names_of,
    persistent,
    stores_of,
    wait_until,
)
from tests.stores import (
    STRING_KEYS,
    make_bundle,
)


def test_a_second_version_replaces_the_first(server: RedisProcess, bundle: Path) -> None:
    first = publish(fill(bundle, 1.0), server.url)
    assert asdict(first) | {"seconds": 0} == {
        "server": server.url,
        "model": read_bundle(bundle, verify=False).model,
        "version": first.version,
        "replaced": None,
        "users": len(STRING_KEYS),
        "items": len(STRING_KEYS),
        "seconds": 0,
        "dropped_models": (),
    }
    assert re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{8}", first.version)
    users, items = stores_of(server, bundle)
    assert persistent(server) == expected_persistent(bundle, first.version)
    second = publish(fill(bundle, 2.0), server.url, keep=50)
    assert second.replaced == first.version
    assert persistent(server) == expected_persistent(bundle, second.version)
    client, names = server.client(), names_of(bundle)
    old = [
        names.meta(first.version),
        *(names.bucket(first.version, s, 0) for s in ("user", "item")),
    ]
    assert 40_000 < client.pttl(old[0]) <= 50_000
    # The expiries are staggered: Redis blocks while it frees a bucket.
    assert np.diff([client.pexpiretime(key) for key in old]).tolist() == [100, 100]
    assert client.get(names.current()).decode() == second.version
    meta = client.hgetall(names.meta(second.version))
    assert meta[b"bundle"].decode() == read_bundle(bundle, verify=False).version
    assert meta[b"user.rows"].decode() == str(len(STRING_KEYS))
    for store in (users, items):
        assert set(store.lookup(STRING_KEYS)[0].ravel().tolist()) == {2.0}


def test_readers_continue_after_their_version_expired(server: RedisProcess, bundle: Path) -> None:
    first = publish(fill(bundle, 1.0), server.url)
    users, items = stores_of(server, bundle)
    assert users.lookup(["a"])[0][0, 0] == items.lookup(["a"])[0][0, 0] == 1.0
    publish(fill(bundle, 2.0), server.url, keep=1)
    client, names = server.client(), names_of(bundle)
    wait_until(lambda: not client.exists(names.bucket(first.version, "item", 0)))
    assert items.lookup(["a"])[0][0, 0] == users.lookup(["a"])[0][0, 0] == 2.0


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_publication_leaves_nothing(
    server: RedisProcess, bundle: Path, after: int, error: type[BaseException]
) -> None:
    first = publish(fill(bundle, 1.0), server.url)
    users, _ = stores_of(server, bundle)

    def interrupt(done: int, total: int) -> None:
        assert len(server.client().keys(f"{names_of(bundle).prefix}*")) == 4 + 4
        if done >= total * after / 2:
            raise error

    with pytest.raises(error):
        publish(fill(bundle, 2.0), server.url, progress=interrupt)
    assert all_keys(server) == expected_persistent(bundle, first.version)
    assert persistent(server) == expected_persistent(bundle, first.version)
    assert users.lookup(["a"])[0][0, 0] == 1.0


def test_a_lost_reply_to_the_switch(
    server: RedisProcess, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version may be current, so it stays; if it is not, it expires."""
    first = publish(fill(bundle, 1.0), server.url)
    execute, transactions = redis.client.Pipeline._execute_transaction, []

    def lose(*arguments: Any) -> Any:
        transactions.append(execute(*arguments))
        if len(transactions) == 2:  # the first one opens the buckets
            raise redis.ConnectionError("lost")
        return transactions[-1]

    monkeypatch.setattr(redis.client.Pipeline, "_execute_transaction", lose)
    with pytest.raises(StoreError) as caught:
        publish(fill(bundle, 2.0), server.url)
    version = server.client().get(names_of(bundle).current()).decode()
    assert version != first.version
    text = str(caught.value)
    assert text.startswith(f"{server.url}: cannot connect (lost); ")
    assert text.endswith(f"; version {version} may or may not be current: publish again")
    assert persistent(server) == expected_persistent(bundle, version)
    users, items = stores_of(server, bundle)
    assert users.lookup(["a"])[0][0, 0] == items.lookup(["a"])[0][0, 0] == 2.0


def test_a_killed_publication_expires(server: RedisProcess, bundle: Path) -> None:
    first = publish(fill(bundle, 1.0), server.url)
    program = (
        "import os, sys\n"
        "from hvdrec.scoring.stores.redis.publish import publish\n"
        "publish(*sys.argv[1:], progress=lambda done, total: os._exit(9))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(fill(bundle, 2.0)), server.url], check=False
    )
    assert result.returncode == 9
    client = server.client()
    assert persistent(server) == expected_persistent(bundle, first.version)
    left = all_keys(server) - persistent(server)
    assert len(left) == 3
    for key in left:
        assert 0 < client.pttl(key) <= (LEASE_SECONDS + 1) * 1000
    assert stores_of(server, bundle)[0].lookup(["a"])[0][0, 0] == 1.0


def test_a_long_publication_renews_its_expiry(
    server: RedisProcess, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("hvdrec.scoring.stores.redis.publish.time.monotonic", lambda: now[0])
    client, names = server.client(), names_of(bundle)

    def later(done: int, total: int) -> None:
        if now[0]:
            return
        now[0] = LEASE_SECONDS / 2
        for key in client.keys("*"):
            client.expire(key, 5)

    def check(done: int, total: int) -> None:
        later(done, total)
        if done == total:
            written = client.keys("*:meta") + client.keys("*:user:*")
            assert len(written) == 2
            assert all(client.ttl(key) > LEASE_SECONDS / 2 for key in written)

    publish(bundle, server.url, progress=check)
    assert client.get(names.current()) is not None


@pytest.mark.parametrize("damage", ["bucket", "field", "meta", "all"])
def test_rows_that_vanish_during_a_publication_are_detected(
    server: RedisProcess, bundle: Path, damage: str
) -> None:
    first = publish(fill(bundle, 1.0), server.url)
    client = server.client()

    def vanish(done: int, total: int) -> None:
        if done < total:
            return
        draft = [key for key in client.keys("*") if client.pttl(key) > 0]
        (users,) = [key for key in draft if b":user:" in key]
        if damage == "field":
            client.hdel(users, b"a")
        else:
            damaged = {"bucket": [users], "all": draft}
            client.delete(*damaged.get(damage, [key for key in draft if b"meta" in key]))

    with pytest.raises(
        StoreError, match=r"is incomplete; make sure that the server does not evict"
    ):
        publish(fill(bundle, 2.0), server.url, progress=vanish)
    assert all_keys(server) == expected_persistent(bundle, first.version)
    assert stores_of(server, bundle)[0].lookup(["a"])[0][0, 0] == 1.0


def test_rows_that_vanish_at_the_switch_are_detected(
    server: RedisProcess, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hvdrec.scoring.stores.redis import publish as module

    first = publish(fill(bundle, 1.0), server.url)
    client, keys_of = server.client(), module._keys_of

    def vanish(*arguments: Any) -> Any:
        draft = [key for key in client.keys("*") if client.pttl(key) > 0]
        if draft:
            client.delete(*draft)
        return keys_of(*arguments)

    # `switch` calls this after it has counted the rows and before the transaction.
    monkeypatch.setattr(module, "_keys_of", vanish)
    with pytest.raises(StoreError, match="is incomplete"):
        publish(fill(bundle, 2.0), server.url)
    assert all_keys(server) == expected_persistent(bundle, first.version)


def test_concurrent_publications(server: RedisProcess, tmp_path: Path) -> None:
    """All succeed, one is current and complete, and the rows of the others expire."""
    bundles = [fill(make_bundle(tmp_path / str(n)), float(n)) for n in range(6)]
    together = threading.Barrier(len(bundles))

    def work(bundle: Path) -> str:
        together.wait()
        return publish(bundle, server.url, keep=100).version

    with ThreadPoolExecutor(len(bundles)) as threads:
        versions = list(threads.map(work, bundles))
    current = server.client().get(names_of(bundles[0]).current()).decode()
    assert current in versions
    assert persistent(server) == expected_persistent(bundles[0], current)
    for store in stores_of(server, bundles[0]):
        embeddings = store.lookup(STRING_KEYS)[0]
        assert set(embeddings.ravel().tolist()) == {float(versions.index(current))}


def test_a_damaged_bundle_is_not_published(server: RedisProcess, bundle: Path) -> None:
    file = bundle / "users" / "embeddings.npy"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(BundleError, match="contents differ from the manifest"):
        publish(bundle, server.url)
    assert server.client().keys() == []


@pytest.mark.parametrize("keep", [0, -1, 0.5, "600", True, float("nan"), float("inf")])
def test_invalid_times_to_keep(server: RedisProcess, bundle: Path, keep: Any) -> None:
    with pytest.raises(StoreError, match="1 or more") as caught:
        publish(bundle, server.url, keep=keep)
    assert caught.value.field == "keep"
    assert caught.value.value is keep


def test_prefixes_separate_publications(server: RedisProcess, bundle: Path) -> None:
    publish(fill(bundle, 1.0), server.url, prefix="one")
    publish(fill(bundle, 2.0), server.url, prefix="two")
    for prefix, value in (("one", 1.0), ("two", 2.0)):
        users, _ = stores_of(server, bundle, prefix=prefix)
        assert users.lookup(["a"])[0][0, 0] == value
    with pytest.raises(StoreError, match=r": nothing is published under 'hvdrec' for model "):
        stores_of(server, bundle)[0].lookup(["a"])


def test_unread_models_are_dropped(
    server: RedisProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = []
    for number in range(5):
        path = make_bundle(tmp_path / str(number))
        ranker = path / "ranker.onnx"
        # Another producer name (field 2) changes the file, and thereby the model.
        ranker.write_bytes(ranker.read_bytes() + bytes([0x12, 1, 65 + number]))
        bundles.append(fill(path, float(number)))
    models = [names_of(path).model for path in bundles]
    assert len(set(models)) == 5
    client = server.client()
    for path in bundles[:4]:
        assert publish(path, server.url).dropped_models == ()  # all were read just now
    monkeypatch.setattr("hvdrec.scoring.stores.redis.publish.UNREAD_SECONDS", 0)
    publication = publish(bundles[4], server.url, keep=100)
    assert sorted(publication.dropped_models) == sorted(models[:3])
    kept = {f"{{{model}}}" for model in models[3:]} | {"tiny:models"}
    assert all(any(part in key for part in kept) for key in persistent(server))
    for path, value in zip(bundles, range(5), strict=True):
        assert stores_of(server, path)[0].lookup(["a"])[0][0, 0] == value
    # A dropped model that is published again does not expire.
    assert publish(bundles[4], server.url, keep=100).dropped_models == ()
    again = publish(bundles[0], server.url, keep=100)
    assert client.pttl(names_of(bundles[0]).meta(again.version)) == -1
    assert client.pttl(names_of(bundles[0]).current()) == -1
    client.delete(names_of(bundles[1]).current())
    publish(bundles[0], server.url)
    assert client.zscore("hvdrec:tiny:models", models[1]) is None
