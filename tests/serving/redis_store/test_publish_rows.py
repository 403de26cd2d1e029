"""Single embeddings in a real Redis server, between two publications."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdrec.scoring import RequestError
from hvdrec.scoring.errors import StoreError
from hvdrec.scoring.stores.redis.publish import publish
from hvdrec.scoring.stores.redis.publish_rows import publish_rows
from hvdrec.scoring.stores.redis.versions import read_current
from tests.serving.redis_store.process import RedisProcess
from tests.serving.redis_store.published import (
    expected_lasting,
    lasting,
    names_of,
    stores_of,
    wait_until,
)
from tests.stores import (
    TEXT_KEYS,
    WIDTH,
    check_lookup,
    expected_rows,
    make_bundle,
)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_single_rows_are_added_and_replaced(
    server: RedisProcess, tmp_path: Path, dtype: str
) -> None:
    bundle = make_bundle(tmp_path / "bundle", dtype=dtype)
    first = publish(bundle, server.url)
    users, items = stores_of(server, bundle)
    rows, before = expected_rows(bundle, "user"), expected_rows(bundle, "item")
    # 127 steps of 0.25 and their multiples are exact in every dtype.
    values = np.array([[31.75, -2.0, 0.5], [0.0, 0.0, 0.0], [-31.75, 1.0, 8.25]], np.float32)
    version = publish_rows(server.url, first.model, "user", ["a", "fresh", "ключ"], values)
    assert version == first.version
    rows |= dict(zip(["a", "fresh", "ключ"], values.tolist(), strict=True))
    check_lookup(users, rows, [*rows, "unknown", None])
    assert len(users) == len(TEXT_KEYS) + 1
    check_lookup(items, before, [*before, "fresh"])
    assert publish(bundle, server.url).replaced == first.version
    users.lookup(["a"])
    check_lookup(users, expected_rows(bundle, "user"), ["a", "fresh"])


def test_single_rows_that_cannot_be(server: RedisProcess, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", key_dtype="int", dtype="float16")
    url, model = server.url, names_of(bundle).model
    row = np.zeros((1, WIDTH), np.float32)
    with pytest.raises(StoreError, match="nothing is published"):
        publish_rows(url, model, "user", [1], row)
    publish(bundle, url)
    cases: list[tuple[str, Any, Any, str]] = [
        ("users", [1], row, "side = 'users': must be one of [user, item]"),
        ("user", [1, 2], row, "2 keys and embeddings of shape (1, 3): must be a row for each"),
        ("user", [1], row[0], "1 keys and embeddings of shape (3,)"),
        ("user", [1], row[:, :2], "float32 of shape (1, 2), expected float32 of (1, 3)"),
        ("user", [1], row.astype(int), "embeddings are int64 of shape (1, 3), expected"),
        ("user", [1], row + np.nan, "hold numbers that are not finite"),
        ("user", [1], row + 1e5, "hold numbers too large for the version's float16"),
        ("user", ["1"], row, "key of a user = '1': the key is an integer, not str; pass 1"),
        ("item", [None], row, "key of a item = None: must not be missing"),
        ("user", [2**63], row, "does not fit 64 bits"),
    ]
    for side, keys, values, reason in cases:
        with pytest.raises(RequestError) as caught:
            publish_rows(url, model, side, keys, values)
        assert reason in str(caught.value)
    check_lookup(stores_of(server, bundle)[0], expected_rows(bundle, "user"), [0, 1, 2, 100])


def test_single_rows_do_not_revive_what_was_evicted(server: RedisProcess, bundle: Path) -> None:
    done = publish(bundle, server.url)
    server.client().delete(names_of(bundle).bucket(done.version, "user", 0))
    row = np.ones((1, WIDTH), np.float32)
    with pytest.raises(StoreError, match="is not whole"):
        publish_rows(server.url, done.model, "user", ["a"], row)
    users, _ = stores_of(server, bundle)
    with pytest.raises(StoreError, match="is not whole"):
        users.lookup(["a"])


def test_single_rows_go_to_the_version_that_came_in_between(
    server: RedisProcess, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = publish(bundle, server.url)
    others = [bundle]

    def overtaken(*arguments: Any) -> Any:
        found = read_current(*arguments)
        if others:
            publish(others.pop(), server.url)
        return found

    monkeypatch.setattr("hvdrec.scoring.stores.redis.publish_rows.read_current", overtaken)
    row = np.ones((1, WIDTH), np.float32)
    version = publish_rows(server.url, first.model, "user", ["fresh"], row)
    assert version != first.version
    client, names = server.client(), names_of(bundle)
    assert client.get(names.current()).decode() == version
    assert not client.hexists(names.bucket(first.version, "user", 0), "fresh")
    check_lookup(stores_of(server, bundle)[0], {"fresh": [1.0] * WIDTH}, ["fresh"])


def test_single_rows_while_versions_are_switched(server: RedisProcess, bundle: Path) -> None:
    """All rows of one call are in one version, and none in a version that would never expire."""
    model, stop = publish(bundle, server.url).model, threading.Event()
    keys = [f"fresh {n}" for n in range(2500)]  # three transactions
    values = np.ones((len(keys), WIDTH), np.float32)
    answers: list[str] = []

    def push() -> None:
        while not stop.is_set():
            answers.append(publish_rows(server.url, model, "user", keys, values))

    with ThreadPoolExecutor(1) as threads:
        pushing = threads.submit(push)
        for _ in range(6):
            before = len(answers)
            wait_until(lambda before=before: len(answers) > before or pushing.done())  # type: ignore[misc]
            publish(bundle, server.url)
        stop.set()
        pushing.result()
    assert len(set(answers)) > 2
    client, names = server.client(), names_of(bundle)
    for version in set(answers):
        fields = client.hmget(names.bucket(version, "user", 0), keys)
        assert None not in fields
    current = client.get(names.current()).decode()
    assert lasting(server) == expected_lasting(bundle, current)
