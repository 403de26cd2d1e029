"""Embeddings in a real Redis server, which the tests start, stop and fill themselves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from hvdrec.scoring import RequestError, Scorer
from hvdrec.scoring.bundle import read_bundle
from hvdrec.scoring.errors import BundleError, StoreError
from hvdrec.scoring.publish import LEASE_SECONDS, publish
from hvdrec.scoring.publish_rows import publish_rows
from hvdrec.scoring.redis_layout import Names
from hvdrec.scoring.redis_store import RedisStore, open_stores
from hvdrec.scoring.redis_versions import read_current
from hvdrec.scoring.store import Store
from tests.bundles import write_bundle
from tests.other_bundle import put, write_other_bundle
from tests.serving.redis_process import SECONDS, RedisProcess
from tests.stores import (
    TEXT_KEYS,
    WIDTH,
    StoreSuite,
    check_lookup,
    expected_rows,
    make_bundle,
    rewrite_side,
)

PATIENT = 30.0


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path_factory.mktemp("redis"))
    process.start()
    yield process
    process.kill()


@pytest.fixture
def server(process: RedisProcess) -> RedisProcess:
    """The same server for all tests, empty for each."""
    process.client().flushall()
    return process


@pytest.fixture(scope="module")
def whole_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "whole")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def stores_of(server: RedisProcess, bundle: Path, **options: Any) -> tuple[RedisStore, RedisStore]:
    return open_stores(server.url, bundle, **{"timeout": PATIENT, **options})


def names_of(bundle: Path) -> Names:
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
    names = names_of(bundle)
    buckets = {names.bucket(version, side, 0) for side in ("user", "item")}
    return {names.current(), names.meta(version), *buckets, "hvdrec:tiny:models"}


def wait_until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class TestRedis(StoreSuite):
    @pytest.fixture(scope="class")
    @classmethod
    def open_store(cls, process: RedisProcess) -> StoreSuite.OpenStore:
        def opened(bundle: Path, side: str) -> Store:
            publish(bundle, process.url)
            return stores_of(process, bundle)[side == "item"]

        return opened


def test_more_rows_than_one_bucket(
    server: RedisProcess, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvdrec.scoring.redis_layout.BUCKET_ROWS", 100)
    monkeypatch.setattr("hvdrec.scoring.publish.COMMAND_ROWS", 30)
    keys = [f"user {n}" for n in range(5000)]
    values = np.random.default_rng(0).standard_normal((len(keys), WIDTH))
    rewrite_side(bundle, "user", keys, values, "int8")
    told: list[tuple[int, int]] = []
    publish(bundle, server.url, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (5000 + len(TEXT_KEYS),) * 2
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    users, _ = stores_of(server, bundle)
    assert len(users) == 5000
    check_lookup(users, expected_rows(bundle, "user"), [*keys, "user 5000", None])
    assert len(server.client().keys("*:user:*")) == 50


def test_scores_are_those_of_the_bundles_own_arrays(server: RedisProcess, tmp_path: Path) -> None:
    for key_dtype in ("string", "int"):
        path = write_bundle(tmp_path / key_dtype, key_dtype=key_dtype)
        publish(path, server.url)
        users, items = stores_of(server, path)
        own, shared = Scorer.load(path), Scorer.load(path, users=users, items=items)
        made: type = str if key_dtype == "string" else int
        known = [made(key) for key in (10, 20, 30, 40, 99)]
        entries = [*known, None, {"item_id": made(10), "genres": ["War"]}]
        scene = {"hour": 21, "place": "home"}
        for user in (made(1), made(2), made(77), None, {"age": 30.0, "history": [made(10)]}):
            expected = own.score(user, entries, scene)
            assert shared.score(user, entries, scene).tolist() == expected.tolist()
            assert shared.recommend(user, scene, k=3) == own.recommend(user, scene, k=3)
        requests = [(made(1), known, scene), (made(2), known[:2], None)]
        for ours, theirs in zip(shared.score_many(requests), own.score_many(requests), strict=True):
            assert ours.tolist() == theirs.tolist()


def test_a_new_model_is_taken_when_its_embeddings_are_published(
    server: RedisProcess, tmp_path: Path
) -> None:
    bundles = [write_bundle(tmp_path / "ours"), write_other_bundle(tmp_path / "other")]
    expected = [Scorer.load(path).score("1", ["10", "20"]).tolist() for path in bundles]
    path = tmp_path / "served"
    put(bundles[0], path)
    publish(path, server.url)
    stores = partial(open_stores, server.url, timeout=PATIENT)
    with Scorer.watch(path, interval=SECONDS, stores=stores) as scorer:
        put(bundles[1], path)
        assert not scorer.look()
        assert isinstance(scorer.last_error, StoreError)
        assert "nothing is published" in str(scorer.last_error)
        assert scorer.score("1", ["10", "20"]).tolist() == expected[0]
        publish(path, server.url)
        wait_until(scorer.look)  # a store that could not answer is asked again, at leisure
        assert scorer.score("1", ["10", "20"]).tolist() == expected[1]


# ------------------------------------------------------------------------------ what is published


def test_a_second_version_replaces_the_first(server: RedisProcess, bundle: Path) -> None:
    first = publish(fill(bundle, 1.0), server.url)
    assert asdict(first) | {"seconds": 0} == {
        "server": server.url,
        "model": read_bundle(bundle, verify=False).model,
        "version": first.version,
        "replaced": None,
        "users": len(TEXT_KEYS),
        "items": len(TEXT_KEYS),
        "seconds": 0,
        "dropped_models": (),
    }
    assert re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{8}", first.version)
    users, items = stores_of(server, bundle)
    assert lasting(server) == expected_lasting(bundle, first.version)
    second = publish(fill(bundle, 2.0), server.url, keep=50)
    assert second.replaced == first.version
    assert lasting(server) == expected_lasting(bundle, second.version)
    client, names = server.client(), names_of(bundle)
    old = [
        names.meta(first.version),
        *(names.bucket(first.version, s, 0) for s in ("user", "item")),
    ]
    assert 40_000 < client.pttl(old[0]) <= 50_000
    # Not all in one moment: each is freed in one go.
    assert np.diff([client.pexpiretime(key) for key in old]).tolist() == [100, 100]
    assert client.get(names.current()).decode() == second.version
    meta = client.hgetall(names.meta(second.version))
    assert meta[b"bundle"].decode() == read_bundle(bundle, verify=False).version
    assert meta[b"user.rows"].decode() == str(len(TEXT_KEYS))
    for store in (users, items):
        assert set(store.lookup(TEXT_KEYS)[0].ravel().tolist()) == {2.0}


def test_readers_go_on_when_their_version_has_expired(server: RedisProcess, bundle: Path) -> None:
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
    assert everything(server) == expected_lasting(bundle, first.version)
    assert lasting(server) == expected_lasting(bundle, first.version)
    assert users.lookup(["a"])[0][0, 0] == 1.0


def test_no_answer_to_the_switch(
    server: RedisProcess, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version may be current then, so it stays; and if it is not, it expires."""
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
    assert str(caught.value) == (
        f"{server.url}: cannot be reached (lost); check that it runs and that the address is right"
        f"; whether version {version} is current now is not known: publish again"
    )
    assert lasting(server) == expected_lasting(bundle, version)
    users, items = stores_of(server, bundle)
    assert users.lookup(["a"])[0][0, 0] == items.lookup(["a"])[0][0, 0] == 2.0


def test_a_killed_publication_expires(server: RedisProcess, bundle: Path) -> None:
    first = publish(fill(bundle, 1.0), server.url)
    program = (
        "import os, sys\n"
        "from hvdrec.scoring.publish import publish\n"
        "publish(*sys.argv[1:], progress=lambda done, total: os._exit(9))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(fill(bundle, 2.0)), server.url], check=False
    )
    assert done.returncode == 9
    client = server.client()
    assert lasting(server) == expected_lasting(bundle, first.version)
    left = everything(server) - lasting(server)
    assert len(left) == 3
    for key in left:
        assert 0 < client.pttl(key) <= (LEASE_SECONDS + 1) * 1000
    assert stores_of(server, bundle)[0].lookup(["a"])[0][0, 0] == 1.0


def test_a_long_publication_puts_its_expiry_off(
    server: RedisProcess, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("hvdrec.scoring.publish.time.monotonic", lambda: now[0])
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
            ours = client.keys("*:meta") + client.keys("*:user:*")
            assert len(ours) == 2
            assert all(client.ttl(key) > LEASE_SECONDS / 2 for key in ours)

    publish(bundle, server.url, progress=check)
    assert client.get(names.current()) is not None


@pytest.mark.parametrize("damage", ["bucket", "field", "meta", "all"])
def test_rows_that_vanish_meanwhile_are_noticed(
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
            found = {"bucket": [users], "all": draft}
            client.delete(*found.get(damage, [key for key in draft if b"meta" in key]))

    with pytest.raises(StoreError, match=r"is not whole; see that the server does not evict"):
        publish(fill(bundle, 2.0), server.url, progress=vanish)
    assert everything(server) == expected_lasting(bundle, first.version)
    assert stores_of(server, bundle)[0].lookup(["a"])[0][0, 0] == 1.0


def test_rows_that_vanish_at_the_switch_are_noticed(
    server: RedisProcess, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hvdrec.scoring import publish as module

    first = publish(fill(bundle, 1.0), server.url)
    client, keys_of = server.client(), module._keys_of

    def vanish(*arguments: Any) -> Any:
        draft = [key for key in client.keys("*") if client.pttl(key) > 0]
        if draft:
            client.delete(*draft)
        return keys_of(*arguments)

    # Called after the rows were counted, before the transaction.
    monkeypatch.setattr(module, "_keys_of", vanish)
    with pytest.raises(StoreError, match="is not whole"):
        publish(fill(bundle, 2.0), server.url)
    assert everything(server) == expected_lasting(bundle, first.version)


def test_publications_at_the_same_time(server: RedisProcess, tmp_path: Path) -> None:
    """All succeed, one is current and whole, and nothing of the others stays for good."""
    bundles = [fill(make_bundle(tmp_path / str(n)), float(n)) for n in range(6)]
    together = threading.Barrier(len(bundles))

    def work(bundle: Path) -> str:
        together.wait()
        return publish(bundle, server.url, keep=100).version

    with ThreadPoolExecutor(len(bundles)) as threads:
        versions = list(threads.map(work, bundles))
    current = server.client().get(names_of(bundles[0]).current()).decode()
    assert current in versions
    assert lasting(server) == expected_lasting(bundles[0], current)
    for store in stores_of(server, bundles[0]):
        found = store.lookup(TEXT_KEYS)[0]
        assert set(found.ravel().tolist()) == {float(versions.index(current))}


def test_a_damaged_bundle_is_not_published(server: RedisProcess, bundle: Path) -> None:
    file = bundle / "users" / "embeddings.npy"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(BundleError, match="contents differ from the manifest"):
        publish(bundle, server.url)
    assert server.client().keys() == []


@pytest.mark.parametrize("keep", [0, -1, 0.5, "600", True, float("nan"), float("inf")])
def test_a_time_to_keep_that_cannot_be(server: RedisProcess, bundle: Path, keep: Any) -> None:
    with pytest.raises(StoreError, match=r"^keep = .*: must be seconds, 1 or more$"):
        publish(bundle, server.url, keep=keep)


def test_prefixes_do_not_meet(server: RedisProcess, bundle: Path) -> None:
    publish(fill(bundle, 1.0), server.url, prefix="one")
    publish(fill(bundle, 2.0), server.url, prefix="two")
    for prefix, value in (("one", 1.0), ("two", 2.0)):
        users, _ = stores_of(server, bundle, prefix=prefix)
        assert users.lookup(["a"])[0][0, 0] == value
    with pytest.raises(StoreError, match=r": nothing is published under 'hvdrec' for model "):
        stores_of(server, bundle)[0].lookup(["a"])


def test_models_that_nobody_reads_are_dropped(
    server: RedisProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = []
    for number in range(5):
        path = make_bundle(tmp_path / str(number))
        ranker = path / "ranker.onnx"
        # Another name of the producer (field 2) makes other bytes, and so another model.
        ranker.write_bytes(ranker.read_bytes() + bytes([0x12, 1, 65 + number]))
        bundles.append(fill(path, float(number)))
    models = [names_of(path).model for path in bundles]
    assert len(set(models)) == 5
    client = server.client()
    for path in bundles[:4]:
        assert publish(path, server.url).dropped_models == ()  # all were read a moment ago
    monkeypatch.setattr("hvdrec.scoring.publish.UNREAD_SECONDS", 0)
    done = publish(bundles[4], server.url, keep=100)
    assert sorted(done.dropped_models) == sorted(models[:3])
    kept = {f"{{{model}}}" for model in models[3:]} | {"tiny:models"}
    assert all(any(part in key for part in kept) for key in lasting(server))
    for path, value in zip(bundles, range(5), strict=True):
        assert stores_of(server, path)[0].lookup(["a"])[0][0, 0] == value
    # It expires once; published again, it stays.
    assert publish(bundles[4], server.url, keep=100).dropped_models == ()
    again = publish(bundles[0], server.url, keep=100)
    assert client.pttl(names_of(bundles[0]).meta(again.version)) == -1
    assert client.pttl(names_of(bundles[0]).current()) == -1
    client.delete(names_of(bundles[1]).current())
    publish(bundles[0], server.url)
    assert client.zscore("hvdrec:tiny:models", models[1]) is None


# ------------------------------------------------------------------------------------ single rows


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

    monkeypatch.setattr("hvdrec.scoring.publish_rows.read_current", overtaken)
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


# --------------------------------------------------------------------------------- under load


def test_versions_switched_under_load(
    server: RedisProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every answer is of one version, a user's and its items' of the same; none fails."""
    # However busy the machine is.
    monkeypatch.setattr("hvdrec.scoring.redis_store.REQUEST_SECONDS", SECONDS)
    bundles = [fill(make_bundle(tmp_path / str(n)), float(n)) for n in range(3)]
    publish(bundles[0], server.url, keep=SECONDS)
    users, items = stores_of(server, bundles[0])
    stop, seen, wrong = threading.Event(), set(), []
    rounds = [0] * 4

    def read(thread: int) -> None:
        while not stop.is_set():
            user, found = users.lookup(["a"])
            ranked, there = items.lookup(TEXT_KEYS)
            values = set(user.ravel().tolist()) | set(ranked.ravel().tolist())
            if len(values) != 1 or not found.all() or not there.all():
                wrong.append(values)
            seen.update(values)
            rounds[thread] += 1

    with ThreadPoolExecutor(len(rounds)) as threads:
        reading = [threads.submit(read, thread) for thread in range(len(rounds))]
        for number in range(1, 25):
            before = list(rounds)
            publish(bundles[number % 3], server.url, keep=SECONDS)
            wait_until(
                lambda before=before: (
                    all(now > was + 1 for now, was in zip(rounds, before, strict=True))  # type: ignore[misc]
                    or any(each.done() for each in reading)
                )
            )
        stop.set()
        for each in reading:
            each.result()
    assert wrong == []
    assert seen == {0.0, 1.0, 2.0}


def test_stopped_and_started_again_under_load(tmp_path: Path, whole_bundle: Path) -> None:
    """Errors are StoreError alone, answers stay right, and service comes back by itself."""
    server = RedisProcess(tmp_path, "--dbfilename", "kept.rdb")
    server.start()
    publish(whole_bundle, server.url)
    server.client().save()
    users, items = open_stores(server.url, whole_bundle, timeout=5.0)
    scorer = Scorer.load(whole_bundle, users=users, items=items)
    expected = Scorer.load(whole_bundle).score("a", TEXT_KEYS).tolist()
    rows = expected_rows(whole_bundle, "item")
    stop, lines = threading.Event(), set()
    answered, failed = [0] * 4, [0] * 4

    def ask(thread: int) -> None:
        while not stop.is_set():
            try:
                check_lookup(items, rows, [*rows, None])
                assert scorer.score("a", TEXT_KEYS).tolist() == expected
                answered[thread] += 1
            except StoreError as error:
                assert len(str(error).splitlines()) == 1
                assert str(error).startswith(server.url)
                lines.add(re.sub(r"asked again in .*", "", str(error)))
                failed[thread] += 1

    def everyone(counts: list[int]) -> None:
        before = list(counts)
        wait_until(
            lambda: (
                all(now > was for now, was in zip(counts, before, strict=True))
                or any(each.done() for each in asking)
            )
        )

    try:
        with ThreadPoolExecutor(len(failed)) as threads:
            asking = [threads.submit(ask, thread) for thread in range(len(failed))]
            for _ in range(3):
                everyone(answered)
                server.kill()
                everyone(failed)
                server.start()
                everyone(answered)
            stop.set()
            for each in asking:
                each.result()
    finally:
        stop.set()
        server.kill()
    assert any("cannot be reached (Error 111" in line for line in lines), lines


def test_a_server_that_does_not_answer(tmp_path: Path, whole_bundle: Path) -> None:
    server = RedisProcess(tmp_path)
    server.start()
    try:
        publish(whole_bundle, server.url)
        users, _ = open_stores(server.url, whole_bundle, timeout=0.2)
        rows = expected_rows(whole_bundle, "user")
        wait_until(lambda: _answers(users))
        server.freeze()
        with pytest.raises(StoreError) as caught:
            users.lookup(["a"])
        assert str(caught.value) == (
            f"{server.url}: did not answer within 0.2 s; look at its load, or give it more time"
        )
        wait_until(lambda: re.search(r"more time; it is asked again in \d\.\d\d s$", _line(users)))
        server.thaw()
        wait_until(lambda: _answers(users))
        check_lookup(users, rows, list(rows))
    finally:
        server.kill()


def _answers(store: RedisStore) -> bool:
    return _line(store) == ""


def _line(store: RedisStore) -> str:
    """Return the line of a look-up's error; nothing where it is answered."""
    try:
        assert store.lookup(["a"])[1].all()
    except StoreError as error:
        return str(error)
    return ""


def test_a_server_that_lost_everything(tmp_path: Path, whole_bundle: Path) -> None:
    server = RedisProcess(tmp_path)
    server.start()
    try:
        publish(whole_bundle, server.url)
        users, _ = stores_of(server, whole_bundle)
        assert _answers(users)
        server.client().flushall()
        with pytest.raises(StoreError, match=r"nothing is published .*; run hvdrec publish$"):
            users.lookup(["a"])
        publish(whole_bundle, server.url)
        assert _answers(users)

        def kill(done: int, total: int) -> None:
            server.kill()

        with pytest.raises(StoreError, match=f"^{server.url}: cannot be reached "):
            publish(whole_bundle, server.url, progress=kill)
    finally:
        server.kill()


# --------------------------------------------------------------------------- what servers refuse


def test_passwords_are_checked_and_never_shown(tmp_path: Path, whole_bundle: Path) -> None:
    server = RedisProcess(tmp_path, "--requirepass", "right-one")
    server.start()
    try:
        given = server.url.replace("://", "://:{}@")
        publish(whole_bundle, given.format("right-one"))
        assert _answers(open_stores(given.format("right-one"), whole_bundle, timeout=PATIENT)[0])
        for url in (given.format("wrong-one"), server.url):
            users, _ = open_stores(url, whole_bundle, timeout=PATIENT)
            with pytest.raises(StoreError) as caught:
                users.lookup(["a"])
            assert str(caught.value).startswith(f"{server.url}: refuses the user or the password")
            assert "-one" not in str(caught.value)
            with pytest.raises(StoreError, match="refuses the user or the password"):
                publish(whole_bundle, url)
    finally:
        server.kill()


def test_a_full_server_keeps_what_it_has(server: RedisProcess, bundle: Path) -> None:
    first = publish(fill(bundle, 1.0), server.url)
    client = server.client()
    try:
        with pytest.raises(StoreError) as caught:
            publish(bundle, server.url, progress=lambda *_: client.config_set("maxmemory", 1))
        assert re.match(
            f"{server.url}: refuses .* \\(.*maxmemory.*\\); give it more memory", str(caught.value)
        )
        assert everything(server) == expected_lasting(bundle, first.version)
        assert _answers(stores_of(server, bundle)[0])
    finally:
        client.config_set("maxmemory", 0)


def test_a_replica_is_read_but_not_written(
    server: RedisProcess, tmp_path: Path, whole_bundle: Path
) -> None:
    publish(whole_bundle, server.url)
    replica = RedisProcess(tmp_path, "--replicaof", "127.0.0.1", str(server.port))
    replica.start()
    try:
        users, _ = stores_of(replica, whole_bundle)
        wait_until(lambda: _answers(users))
        with pytest.raises(StoreError, match=r"it is a replica: publish to its primary$"):
            publish(whole_bundle, replica.url)
    finally:
        replica.kill()


def test_a_key_of_another_type(server: RedisProcess, bundle: Path) -> None:
    done = publish(bundle, server.url)
    key = names_of(bundle).bucket(done.version, "user", 0)
    client = server.client()
    client.set(key, "text")
    users, items = stores_of(server, bundle)
    with pytest.raises(StoreError) as caught:
        users.lookup(["a"])
    assert str(caught.value).startswith(f"{server.url}: refuses HMGET {key} (WRONGTYPE ")
    assert str(caught.value).endswith("; something else has written there; run hvdrec publish")
    assert _answers(items)  # it answers: nobody has to wait


def test_stores_live_on_in_a_forked_process(server: RedisProcess, bundle: Path) -> None:
    publish(bundle, server.url)
    users, _ = stores_of(server, bundle)
    rows = expected_rows(bundle, "user")
    check_lookup(users, rows, list(rows))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for _ in range(50):
                check_lookup(users, rows, list(rows))
            status = 0
        finally:
            os._exit(status)
    for _ in range(50):
        check_lookup(users, rows, list(rows))
    assert os.waitpid(child, 0)[1] == 0
