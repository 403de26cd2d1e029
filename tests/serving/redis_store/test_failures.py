"""Redis stopped, started, frozen, full and forbidden, and versions switched under load."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hvdrec.scoring import Scorer
from hvdrec.scoring.errors import StoreError
from hvdrec.scoring.stores.redis.publish import publish
from hvdrec.scoring.stores.redis.store import open_stores
from tests.serving.redis_store.process import SECONDS, RedisProcess
from tests.serving.redis_store.published import (
    PATIENT,
    answers,
    error_line,
    everything,
    expected_lasting,
    fill,
    stores_of,
    wait_until,
)
from tests.stores import (
    TEXT_KEYS,
    check_lookup,
    expected_rows,
    make_bundle,
)


def test_versions_switched_under_load(
    server: RedisProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every answer is of one version, a user's and its items' of the same; none fails."""
    # However busy the machine is.
    monkeypatch.setattr("hvdrec.scoring.stores.redis.store.REQUEST_SECONDS", SECONDS)
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
        wait_until(lambda: answers(users))
        server.freeze()
        with pytest.raises(StoreError) as caught:
            users.lookup(["a"])
        assert str(caught.value) == (
            f"{server.url}: did not answer within 0.2 s; look at its load, or give it more time"
        )
        wait_until(
            lambda: re.search(r"more time; it is asked again in \d\.\d\d s$", error_line(users))
        )
        server.thaw()
        wait_until(lambda: answers(users))
        check_lookup(users, rows, list(rows))
    finally:
        server.kill()


def test_a_server_that_lost_everything(tmp_path: Path, whole_bundle: Path) -> None:
    server = RedisProcess(tmp_path)
    server.start()
    try:
        publish(whole_bundle, server.url)
        users, _ = stores_of(server, whole_bundle)
        assert answers(users)
        server.client().flushall()
        with pytest.raises(StoreError, match=r"nothing is published .*; run hvdrec publish$"):
            users.lookup(["a"])
        publish(whole_bundle, server.url)
        assert answers(users)

        def kill(done: int, total: int) -> None:
            server.kill()

        with pytest.raises(StoreError, match=f"^{server.url}: cannot be reached "):
            publish(whole_bundle, server.url, progress=kill)
    finally:
        server.kill()


def test_passwords_are_checked_and_never_shown(tmp_path: Path, whole_bundle: Path) -> None:
    server = RedisProcess(tmp_path, "--requirepass", "right-one")
    server.start()
    try:
        given = server.url.replace("://", "://:{}@")
        publish(whole_bundle, given.format("right-one"))
        assert answers(open_stores(given.format("right-one"), whole_bundle, timeout=PATIENT)[0])
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
        assert answers(stores_of(server, bundle)[0])
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
        wait_until(lambda: answers(users))
        with pytest.raises(StoreError, match=r"it is a replica: publish to its primary$"):
            publish(whole_bundle, replica.url)
    finally:
        replica.kill()
