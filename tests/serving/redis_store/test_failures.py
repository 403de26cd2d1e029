"""Redis killed, restarted, frozen, full or locked, and versions switched under load."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hvdrec.scoring import Scorer
from hvdrec.scoring.bundle import read_bundle
from hvdrec.scoring.errors import StoreError
from hvdrec.scoring.stores.redis.publish import publish
from hvdrec.scoring.stores.redis.store import open_redis
from tests.serving.redis_store.process import SECONDS, RedisProcess
from tests.serving.redis_store.published import (
    PATIENT,
    all_keys,
    answers,
    error_line,
    expected_persistent,
    fill,
    stores_of,
    wait_until,
)
from tests.stores import (
    STRING_KEYS,
    check_lookup,
    expected_rows,
    make_bundle,
)


def test_versions_switched_under_load(
    server: RedisProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No lookup fails, and a user and its items come from the same version."""
    # Holds on a busy machine too.
    monkeypatch.setattr("hvdrec.scoring.stores.redis.store.REQUEST_SECONDS", SECONDS)
    bundles = [fill(make_bundle(tmp_path / str(n)), float(n)) for n in range(3)]
    publish(bundles[0], server.url, keep=SECONDS)
    users, items = stores_of(server, bundles[0])
    stop, seen, wrong = threading.Event(), set(), []
    rounds = [0] * 4

    def read(thread: int) -> None:
        while not stop.is_set():
            user, has_user = users.lookup(["a"])
            ranked, has_items = items.lookup(STRING_KEYS)
            values = set(user.ravel().tolist()) | set(ranked.ravel().tolist())
            if len(values) != 1 or not has_user.all() or not has_items.all():
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


def test_a_server_killed_and_restarted_under_load(tmp_path: Path, module_bundle: Path) -> None:
    """Only StoreError is raised, results stay correct, and lookups recover by themselves."""
    server = RedisProcess(tmp_path, "--dbfilename", "kept.rdb")
    server.start()
    publish(module_bundle, server.url)
    server.client().save()
    users, items = stores_of(server, module_bundle, timeout=5.0)
    scorer = Scorer.load(module_bundle, users=users, items=items)
    expected = Scorer.load(module_bundle).score("a", STRING_KEYS).tolist()
    rows = expected_rows(module_bundle, "item")
    stop, lines = threading.Event(), set()
    answered, failed = [0] * 4, [0] * 4

    def query(thread: int) -> None:
        while not stop.is_set():
            try:
                check_lookup(items, rows, [*rows, None])
                assert scorer.score("a", STRING_KEYS).tolist() == expected
                answered[thread] += 1
            except StoreError as error:
                assert len(str(error).splitlines()) == 1
                assert str(error).startswith(server.url)
                lines.add(re.sub(r"next attempt in .*", "", str(error)))
                failed[thread] += 1

    def everyone(counts: list[int]) -> None:
        before = list(counts)
        wait_until(
            lambda: (
                all(now > was for now, was in zip(counts, before, strict=True))
                or any(each.done() for each in queries)
            )
        )

    try:
        with ThreadPoolExecutor(len(failed)) as threads:
            queries = [threads.submit(query, thread) for thread in range(len(failed))]
            for _ in range(3):
                everyone(answered)
                server.kill()
                everyone(failed)
                server.start()
                everyone(answered)
            stop.set()
            for each in queries:
                each.result()
    finally:
        stop.set()
        server.kill()
    assert any("cannot connect (Error 111" in line for line in lines), lines


def test_a_server_that_does_not_reply(tmp_path: Path, module_bundle: Path) -> None:
    server = RedisProcess(tmp_path)
    server.start()
    try:
        publish(module_bundle, server.url)
        users, _ = stores_of(server, module_bundle, timeout=0.2)
        rows = expected_rows(module_bundle, "user")
        wait_until(lambda: answers(users))
        server.freeze()
        with pytest.raises(StoreError) as caught:
            users.lookup(["a"])
        assert str(caught.value).startswith(f"{server.url}: no reply within 0.2 s; ")
        wait_until(lambda: re.search(r"; next attempt in \d\.\d\d s$", error_line(users)))
        server.thaw()
        wait_until(lambda: answers(users))
        check_lookup(users, rows, list(rows))
    finally:
        server.kill()


def test_a_server_that_lost_its_data(tmp_path: Path, module_bundle: Path) -> None:
    server = RedisProcess(tmp_path)
    server.start()
    try:
        publish(module_bundle, server.url)
        users, _ = stores_of(server, module_bundle)
        assert answers(users)
        server.client().flushall()
        with pytest.raises(StoreError, match=r"nothing is published .*; run hvdrec publish$"):
            users.lookup(["a"])
        publish(module_bundle, server.url)
        assert answers(users)

        def kill(done: int, total: int) -> None:
            server.kill()

        with pytest.raises(StoreError, match=f"^{server.url}: cannot connect "):
            publish(module_bundle, server.url, progress=kill)
    finally:
        server.kill()


def test_passwords_are_checked_and_never_shown(tmp_path: Path, module_bundle: Path) -> None:
    server = RedisProcess(tmp_path, "--requirepass", "right-one")
    server.start()
    try:
        info = read_bundle(module_bundle, verify=False)
        with_password = server.url.replace("://", "://:{}@")
        publish(module_bundle, with_password.format("right-one"))
        assert answers(open_redis(with_password.format("right-one"), info, timeout=PATIENT)[0])
        for url in (with_password.format("wrong-one"), server.url):
            users, _ = open_redis(url, info, timeout=PATIENT)
            with pytest.raises(StoreError) as caught:
                users.lookup(["a"])
            assert str(caught.value).startswith(f"{server.url}: the server refuses the user or ")
            assert "-one" not in str(caught.value)
            with pytest.raises(StoreError, match="refuses the user or password"):
                publish(module_bundle, url)
    finally:
        server.kill()


def test_a_full_server_keeps_the_current_version(server: RedisProcess, bundle: Path) -> None:
    first = publish(fill(bundle, 1.0), server.url)
    client = server.client()
    try:
        with pytest.raises(StoreError) as caught:
            publish(bundle, server.url, progress=lambda *_: client.config_set("maxmemory", 1))
        assert re.match(
            f"{server.url}: the server refuses .* \\(.*maxmemory.*\\); give the server more",
            str(caught.value),
        )
        assert all_keys(server) == expected_persistent(bundle, first.version)
        assert answers(stores_of(server, bundle)[0])
    finally:
        client.config_set("maxmemory", 0)


def test_a_replica_can_be_read_but_not_written(
    server: RedisProcess, tmp_path: Path, module_bundle: Path
) -> None:
    publish(module_bundle, server.url)
    replica = RedisProcess(tmp_path, "--replicaof", "127.0.0.1", str(server.port))
    replica.start()
    try:
        users, _ = stores_of(replica, module_bundle)
        wait_until(lambda: answers(users))
        with pytest.raises(StoreError, match=r"replica: publish to its primary$"):
            publish(module_bundle, replica.url)
    finally:
        replica.kill()
