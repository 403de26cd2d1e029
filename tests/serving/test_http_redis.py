"""A service whose embeddings come from a Redis server that goes down and comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hvdrec.scoring import Scorer
from hvdrec.scoring.stores.redis.publish import publish
from tests.serving.conftest import PATIENT
from tests.serving.launch import Running, serving, wait_for
from tests.serving.redis_store.process import RedisProcess
from tests.serving.test_http_wrong import check

ONE: dict[str, Any] = {"user": "1", "items": ["10", "20", "none"], "scene": {"hour": 21}}


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path)
    process.start()
    yield process
    process.kill()


def answered(running: Running) -> httpx.Response | None:
    """Return the answer to a request; None for 503, as Redis may take longer than 0.1 s."""
    answer = httpx.post(f"{running.url}/v1/score", json=ONE, timeout=60)
    if answer.status_code == 503:
        check(answer, 503, None)
        assert answer.headers["retry-after"] == "1"
        return None
    assert answer.status_code == 200, answer.text
    return answer


def test_redis_goes_down_and_comes_back(bundle: Path, redis: RedisProcess, scorer: Scorer) -> None:
    publish(bundle, redis.url)
    expected = scorer.score("1", ["10", "20", "none"], {"hour": 21}).tolist()
    with serving(bundle, *PATIENT, "--store", redis.url) as running:
        answer = wait_for(lambda: answered(running))
        assert answer.json()["scores"] == pytest.approx(expected)

        redis.kill()
        answer = wait_for(lambda: refused(running))
        assert f"127.0.0.1:{redis.port}" in check(answer, 503, None)
        # The process stays healthy.
        assert httpx.get(f"{running.url}/healthz").status_code == 200
        counted = 'hvdrec_requests_total{route="/v1/score",status="503"}'
        assert counted in httpx.get(f"{running.url}/metrics").text

        redis.start()
        publish(bundle, redis.url)
        answer = wait_for(lambda: answered(running))
        assert answer.json()["scores"] == pytest.approx(expected)
        assert running.stop() == 0


def refused(running: Running) -> httpx.Response | None:
    answer = httpx.post(f"{running.url}/v1/score", json=ONE, timeout=60)
    return answer if answer.status_code == 503 else None


def test_redis_that_is_not_up_yet(bundle: Path, redis: RedisProcess) -> None:
    redis.kill()
    with serving(bundle, *PATIENT, "--redis", redis.url, is_awaited=False) as running:
        assert wait_for(lambda: answers(f"{running.url}/healthz", 200))
        assert answers(f"{running.url}/readyz", 503)
        redis.start()
        publish(bundle, redis.url)
        wait_for(lambda: answers(f"{running.url}/readyz", 200))
        assert wait_for(lambda: answered(running))


def answers(url: str, status: int) -> bool:
    try:
        return httpx.get(url).status_code == status
    except httpx.TransportError:
        return False
