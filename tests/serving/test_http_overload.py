"""A service with more to do than it can: refusals, never a crash. In this process, step by step."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from hvdrec.scoring import BundleError, RequestError, Scorer, StoreError
from hvdrec.serving.app import Counted, Service
from hvdrec.serving.metrics import Metrics
from hvdrec.serving.options import Options
from hvdrec.serving.problems import unavailable
from tests.serving.test_http_wrong import check

JSON = {"content-type": "application/json"}
ONE: dict[str, Any] = {"user": "1", "items": ["10"]}


class SlowScorer:
    """A scorer whose answers wait until they are let go, or fail with an error of choice."""

    def __init__(self, scorer: Scorer, version: str = "slow") -> None:
        self.info = scorer.info
        self.version = version
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Event()
        self.fails: Exception | None = None
        self.answer = np.array([0.5], dtype=np.float32)

    def score(self, user: Any, items: Any, scene: Any) -> np.ndarray:
        self.begun.release()
        assert self.may_end.wait(60)
        if self.fails is not None:
            raise self.fails
        return self.answer


@dataclass
class FakeServed:
    """What is served: a scorer, or none yet."""

    scorer: SlowScorer | None
    loaded: threading.Event = field(default_factory=threading.Event)
    load_errors: list[Exception] = field(default_factory=list)

    @property
    def current(self) -> Any:
        if self.scorer is None:
            raise unavailable("the bundle is being loaded; try again")
        return self.scorer

    def load(self) -> None:
        if self.load_errors:
            raise self.load_errors.pop(0)
        self.loaded.set()

    def close(self) -> None:
        pass


@asynccontextmanager
async def started(served: FakeServed, **limits: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Run a service in this process, with limits of choice."""
    settings: dict[str, Any] = {"threads": 1, "max_wait": 60.0, **limits}
    metrics = Metrics()
    service = Service(Options(Path("unused"), **settings), served, metrics)  # type: ignore[arg-type]
    app = Counted(service.app, service.paths, metrics)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        service.app.router.lifespan_context(service.app),
        httpx.AsyncClient(transport=transport, base_url="http://here") as client,
    ):
        yield client


async def in_flight(client: httpx.AsyncClient, count: int) -> None:
    """Wait until so many requests are under way."""
    line = f"hvdrec_requests_in_flight {float(count)}\n"
    while line not in (await client.get("/metrics")).text:
        await asyncio.sleep(0)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def test_more_requests_than_it_takes(scorer: Scorer) -> None:
    async def test() -> None:
        slow = SlowScorer(scorer)
        async with started(FakeServed(slow), max_requests=3) as client:
            taken = [asyncio.create_task(client.post("/v1/score", json=ONE)) for _ in range(3)]
            await in_flight(client, 3)
            for path in ("/v1/score", "/v1/recommend"):
                answer = await client.post(path, json={"user": "1"})
                text = check(answer, 503, None)
                assert text == "overloaded: 3 requests are under way; try again"
                assert answer.headers["retry-after"] == "1"
            # What does not score is answered all the same.
            for path in ("/healthz", "/readyz", "/metrics"):
                assert (await client.get(path)).status_code == 200
            slow.may_end.set()
            for task in taken:
                assert (await task).json() == {"scores": [0.5]}
            assert (await client.post("/v1/score", json=ONE)).status_code == 200
            metrics = (await client.get("/metrics")).text
            counted = 'hvdrec_requests_total{route="/v1/score",status="503"} 1.0'
            assert counted in metrics
            assert "hvdrec_requests_in_flight 0.0" in metrics

    run(test)


def test_a_request_that_waits_too_long(scorer: Scorer) -> None:
    async def test() -> None:
        slow = SlowScorer(scorer)
        async with started(FakeServed(slow), max_wait=0.05) as client:
            first = asyncio.create_task(client.post("/v1/score", json=ONE))
            while not slow.begun.acquire(blocking=False):
                await asyncio.sleep(0)
            answer = await client.post("/v1/score", json=ONE)
            text = check(answer, 503, None)
            assert text == "overloaded: waited 0.05 s to be scored; try again"
            assert answer.headers["retry-after"] == "1"
            # One that has begun is not given up, however long it takes.
            slow.may_end.set()
            assert (await first).status_code == 200
            # And nobody computes what was given up.
            assert not slow.begun.acquire(blocking=False)

    run(test)


def test_before_the_bundle_is_loaded(scorer: Scorer) -> None:
    async def test() -> None:
        served = FakeServed(None)
        async with started(served) as client:
            for answer in (
                await client.get("/readyz"),
                await client.get("/v1/bundle"),
                await client.post("/v1/score", json=ONE),
            ):
                assert check(answer, 503, None) == "the bundle is being loaded; try again"
                assert answer.headers["retry-after"] == "1"
            assert (await client.get("/healthz")).status_code == 200
            served.scorer = SlowScorer(scorer)
            assert (await client.get("/readyz")).headers["bundle-version"] == "slow"

    run(test)


def test_a_store_that_does_not_answer_at_first(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        monkeypatch.setattr("hvdrec.serving.app.RETRY_SECONDS", 0.001)
        served = FakeServed(None, load_errors=[StoreError("down"), StoreError("down")])
        async with started(served):
            assert await asyncio.to_thread(served.loaded.wait, 60)
        assert [record.message for record in caplog.records] == ["down"]

    run(test)


def test_the_end_of_a_service_that_never_came_to_load() -> None:
    async def test() -> None:
        async with started(FakeServed(None, load_errors=[BundleError("gone")] * 1000)) as client:
            assert (await client.get("/healthz")).status_code == 200

    run(test)


@pytest.mark.parametrize(
    ("error", "status", "text", "name"),
    [
        (StoreError("redis: no\nanswer"), 503, "redis: no answer", None),
        (BundleError("user_tower.onnx: gone"), 503, "the bundle cannot be read", None),
        (RequestError("hour = 'x': must be an integer"), 422, "hour = 'x'", "scene.hour"),
        (RequestError("something else"), 422, "something else", None),
        (RuntimeError("secret"), 500, "internal error", None),
        (MemoryError(), 500, "internal error", None),
    ],
)
def test_errors_of_scoring(
    scorer: Scorer, error: Exception, status: int, text: str, name: str | None
) -> None:
    async def test() -> None:
        slow = SlowScorer(scorer)
        slow.fails = error
        slow.may_end.set()
        async with started(FakeServed(slow)) as client:
            answer = await client.post("/v1/score", json=ONE)
            assert check(answer, status, name).startswith(text)
            assert "secret" not in answer.text
            assert ("retry-after" in answer.headers) == (status == 503)
            slow.fails = None
            assert (await client.post("/v1/score", json=ONE)).status_code == 200

    run(test)


def test_a_score_that_is_no_number(scorer: Scorer) -> None:
    async def test() -> None:
        slow = SlowScorer(scorer)
        slow.answer = np.array([0.5, np.nan], dtype=np.float32)
        slow.may_end.set()
        async with started(FakeServed(slow)) as client:
            text = check(await client.post("/v1/score", json=ONE), 422, None)
            assert text.startswith("the score is not finite")

    run(test)


def test_a_request_keeps_the_scorer_it_began_with(scorer: Scorer) -> None:
    async def test() -> None:
        old, new = SlowScorer(scorer, "old"), SlowScorer(scorer, "new")
        new.answer = np.array([0.75], dtype=np.float32)
        new.may_end.set()
        served = FakeServed(old)
        async with started(served, threads=2) as client:
            first = asyncio.create_task(client.post("/v1/score", json=ONE))
            while not old.begun.acquire(blocking=False):
                await asyncio.sleep(0)
            served.scorer = new
            second = await client.post("/v1/score", json=ONE)
            assert (second.json(), second.headers["bundle-version"]) == ({"scores": [0.75]}, "new")
            old.may_end.set()
            answer = await first
            assert (answer.json(), answer.headers["bundle-version"]) == ({"scores": [0.5]}, "old")

    run(test)


def test_a_body_that_does_not_come(scorer: Scorer) -> None:
    async def never() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async def test() -> None:
        async with started(FakeServed(SlowScorer(scorer)), max_wait=0.05) as client:
            answer = await client.post("/v1/score", content=never(), headers=JSON)
            assert check(answer, 408, "body") == "body: did not come within 0.05 s"
            assert answer.headers["connection"] == "close"
            await in_flight(client, 0)

    run(test)
