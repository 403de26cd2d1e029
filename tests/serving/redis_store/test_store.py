"""Embeddings read from a real Redis server, which the tests start and fill themselves."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from hvdrec.scoring import Scorer
from hvdrec.scoring.errors import StoreError
from hvdrec.scoring.stores.redis.publish import publish
from hvdrec.scoring.stores.redis.store import open_stores
from hvdrec.scoring.stores.store import Store
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
    TEXT_KEYS,
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


def test_more_rows_than_one_bucket(
    server: RedisProcess, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvdrec.scoring.stores.redis.layout.BUCKET_ROWS", 100)
    monkeypatch.setattr("hvdrec.scoring.stores.redis.publish.COMMAND_ROWS", 30)
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
    assert answers(items)  # it answers: nobody has to wait


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
