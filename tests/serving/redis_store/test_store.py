"""Embeddings read from a real Redis server that the tests start and fill."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from hvdrec.scoring import Scorer
from hvdrec.scoring.errors import StoreError
from hvdrec.scoring.stores import Store
from hvdrec.scoring.stores.redis.publish import publish
from hvdrec.scoring.stores.redis.store import open_redis
from tests.bundles import write_bundle
from tests.other_bundle import put, write_other_bundle
from tests.serving.redis_store.process import SECONDS, RedisProcess
from tests.serving.redis_store.published import (
    PATIENT,
    answers,
    names_of,
    stores_of,
    wait_until,
)
from tests.stores import (
    STRING_KEYS,
    WIDTH,
    StoreSuite,
    check_lookup,
    expected_rows,
    rewrite_side,
)


class TestRedis(StoreSuite):
    @pytest.fixture(scope="class")
    @classmethod
    def open_store(cls, process: RedisProcess) -> StoreSuite.OpenStore:
        def opened(bundle: Path, side: str) -> Store:
            publish(bundle, process.url)
            return stores_of(process, bundle)[side == "item"]

        return opened


def test_rows_in_many_buckets(
    server: RedisProcess, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvdrec.scoring.stores.redis.layout.BUCKET_ROWS", 100)
    monkeypatch.setattr("hvdrec.scoring.stores.redis.publish.COMMAND_ROWS", 30)
    keys = [f"user {n}" for n in range(5000)]
    values = np.random.default_rng(0).standard_normal((len(keys), WIDTH))
    rewrite_side(bundle, "user", keys, values, "int8")
    progress: list[tuple[int, int]] = []
    publish(bundle, server.url, progress=lambda done, total: progress.append((done, total)))
    assert progress[-1] == (5000 + len(STRING_KEYS),) * 2
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    users, _ = stores_of(server, bundle)
    check_lookup(users, expected_rows(bundle, "user"), [*keys, "user 5000", None])
    assert len(server.client().keys("*:user:*")) == 50


def test_scores_equal_those_of_the_bundles_own_embeddings(
    server: RedisProcess, tmp_path: Path
) -> None:
    for key_dtype in ("string", "int"):
        path = write_bundle(tmp_path / key_dtype, key_dtype=key_dtype)
        publish(path, server.url)
        users, items = stores_of(server, path)
        local, remote = Scorer.load(path), Scorer.load(path, users=users, items=items)
        key: type = str if key_dtype == "string" else int
        known = [key(number) for number in (10, 20, 30, 40, 99)]
        entries = [*known, None, {"item_id": key(10), "genres": ["War"]}]
        scene = {"hour": 21, "place": "home"}
        for user in (key(1), key(2), key(77), None, {"age": 30.0, "history": [key(10)]}):
            expected = local.score(user, entries, scene)
            assert remote.score(user, entries, scene).tolist() == expected.tolist()
            assert remote.recommend(user, scene, k=3) == local.recommend(user, scene, k=3)
        requests = [(key(1), known, scene), (key(2), known[:2], None)]
        pairs = zip(remote.score_many(requests), local.score_many(requests), strict=True)
        for scores, expected in pairs:
            assert scores.tolist() == expected.tolist()


def test_a_watched_scorer_takes_a_new_model_once_its_embeddings_are_published(
    server: RedisProcess, tmp_path: Path
) -> None:
    bundles = [write_bundle(tmp_path / "ours"), write_other_bundle(tmp_path / "other")]
    expected = [Scorer.load(path).score("1", ["10", "20"]).tolist() for path in bundles]
    path = tmp_path / "served"
    put(bundles[0], path)
    publish(path, server.url)
    stores = partial(open_redis, server.url, timeout=PATIENT)
    with Scorer.watch(path, interval=SECONDS, stores=stores) as scorer:
        put(bundles[1], path)
        assert not scorer.look()
        assert isinstance(scorer.last_error, StoreError)
        assert "nothing is published" in str(scorer.last_error)
        assert scorer.score("1", ["10", "20"]).tolist() == expected[0]
        publish(path, server.url)
        wait_until(scorer.look)  # a failed store is tried again after a while
        assert scorer.score("1", ["10", "20"]).tolist() == expected[1]


def test_a_redis_key_of_the_wrong_type(server: RedisProcess, bundle: Path) -> None:
    publication = publish(bundle, server.url)
    key = names_of(bundle).bucket(publication.version, "user", 0)
    client = server.client()
    client.set(key, "text")
    users, items = stores_of(server, bundle)
    with pytest.raises(StoreError) as caught:
        users.lookup(["a"])
    assert str(caught.value).startswith(f"{server.url}: the server refuses HMGET {key} (WRONGTYPE ")
    assert str(caught.value).endswith("; run hvdrec publish")
    assert answers(items)  # a refusal is a reply: the circuit breaker stays closed


def test_stores_work_in_a_forked_process(server: RedisProcess, bundle: Path) -> None:
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
