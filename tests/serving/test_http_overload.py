"""An overloaded or failing service refuses requests and never crashes; run in this process."""

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
from hvdrec.serving.app import CountedApp, Service
from hvdrec.serving.metrics import Metrics
from hvdrec.serving.options import Options
from hvdrec.serving.problems import unavailable
from tests.serving.test_http_wrong import check

JSON = {"content-type": "application/json"}
ONE: dict[str, Any] = {"user": "1", "items": ["10"]}


class SlowScorer:
    """A scorer whose calls block until `may_finish` is set, or raise `error`."""

    def __init__(self, scorer: Scorer, version: str = "slow") -> None:
        self.info = scorer.info
        self.version = version
        self.started = threading.Semaphore(0)
        self.may_finish = threading.Event()
        self.error: Exception | None = None
        self.answer = np.array([0.5], dtype=np.float32)

    def score(self, user: Any, items: Any, scene: Any) -> np.ndarray:
        self.started.release()
        assert self.may_finish.wait(60)
        if self.error is not None:
            raise self.error
        return self.answer


@dataclass
class FakeServedBundle:
    """A `ServedBundle` with a given scorer, or none yet."""

    scorer: SlowScorer | None
    loaded: threading.Event = field(default_factory=threading.Event)
    load_errors: list[Exception] = field(default_factory=list)

    @property
    def current(self) -> Any:
        if self.scorer is None:
            raise unavailable("the bundle is loading; try again")
        return self.scorer

    def load(self) -> None:
        if self.load_errors:
            raise self.load_errors.pop(0)
        self.loaded.set()

    def close(self) -> None:
        pass


@asynccontextmanager
async def running(served: FakeServedBundle, **limits: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Run a service in this process."""
    settings: dict[str, Any] = {"threads": 1, "max_wait": 60.0, **limits}
    metrics = Metrics()
    service = Service(Options(Path("unused"), **settings), served, metrics)  # type: ignore[arg-type]
    app = CountedApp(service.app, service.paths, metrics)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        service.app.router.lifespan_context(service.app),
        httpx.AsyncClient(transport=transport, base_url="http://here") as client,
    ):
        yield client


async def in_flight(client: httpx.AsyncClient, count: int) -> None:
    """Wait until a number of requests is in progress."""
    line = f"hvdrec_requests_in_flight {float(count)}\n"
    while line not in (await client.get("/metrics")).text:
        await asyncio.sleep(0)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def test_too_many_requests_are_refused(scorer: Scorer) -> None:
    async def test() -> None:
        slow = SlowScorer(scorer)
        async with running(FakeServedBundle(slow), max_requests=3) as client:
            tasks = [asyncio.create_task(client.post("/v1/score", json=ONE)) for _ in range(3)]
            await in_flight(client, 3)
            for path in ("/v1/score", "/v1/recommend"):
                answer = await client.post(path, json={"user": "1"})
                text = check(answer, 503, None)
                assert text == "overloaded: 3 requests in progress; try again"
                assert answer.headers["retry-after"] == "1"
            # Routes that do not score still answer.
            for path in ("/healthz", "/readyz", "/metrics"):
                assert (await client.get(path)).status_code == 200
            slow.may_finish.set()
            for task in tasks:
                assert (await task).json() == {"scores": [0.5]}
            assert (await client.post("/v1/score", json=ONE)).status_code == 200
            metrics = (await client.get("/metrics")).text
            counted = 'hvdrec_requests_total{route="/v1/score",status="503"} 1.0'
            assert counted in metrics
            assert "hvdrec_requests_in_flight 0.0" in metrics

    run(test)


def test_a_request_that_waits_too_long_is_refused(scorer: Scorer) -> None:
    async def test() -> None:
        slow = SlowScorer(scorer)
        async with running(FakeServedBundle(slow), max_wait=0.05) as client:
            first = asyncio.create_task(client.post("/v1/score", json=ONE))
            while not slow.started.acquire(blocking=False):
                await asyncio.sleep(0)
            answer = await client.post("/v1/score", json=ONE)
            text = check(answer, 503, None)
            assert text == "overloaded: no thread was free within 0.05 s; try again"
            assert answer.headers["retry-after"] == "1"
            # A request that has started is completed, however long it takes.
            slow.may_finish.set()
            assert (await first).status_code == 200
            # The refused request is never computed.
            assert not slow.started.acquire(blocking=False)

    run(test)


def test_requests_before_the_bundle_is_loaded(scorer: Scorer) -> None:
    async def test() -> None:
        served = FakeServedBundle(None)
        async with running(served) as client:
            for answer in (
                await client.get("/readyz"),
                await client.get("/v1/bundle"),
                await client.post("/v1/score", json=ONE),
            ):
                assert check(answer, 503, None) == "the bundle is loading; try again"
                assert answer.headers["retry-after"] == "1"
            assert (await client.get("/healthz")).status_code == 200
            served.scorer = SlowScorer(scorer)
            assert (await client.get("/readyz")).headers["bundle-version"] == "slow"

    run(test)


def test_loading_is_retried_while_the_store_is_down(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        monkeypatch.setattr("hvdrec.serving.app.RETRY_SECONDS", 0.001)
        served = FakeServedBundle(None, load_errors=[StoreError("down"), StoreError("down")])
        async with running(served):
            assert await asyncio.to_thread(served.loaded.wait, 60)
        assert [record.message for record in caplog.records] == ["down"]

    run(test)


def test_a_service_that_never_loads_shuts_down() -> None:
    async def test() -> None:
        async with running(
            FakeServedBundle(None, load_errors=[BundleError("gone")] * 1000)
        ) as client:
            assert (await client.get("/healthz")).status_code == 200

    run(test)


@pytest.mark.parametrize(
    ("error", "status", "text", "name"),
    [
        (StoreError("redis: no\nanswer"), 503, "redis: no answer", None),
        (BundleError("user_tower.onnx: gone"), 503, "the bundle cannot be read", None),
        (RequestError("hour = 'x'", field="scene.hour"), 422, "hour = 'x'", "scene.hour"),
        (RequestError("something else"), 422, "something else", None),
        (RuntimeError("secret"), 500, "internal error", None),
        (MemoryError(), 500, "internal error", None),
    ],
)
def test_scoring_errors_become_responses(
    scorer: Scorer, error: Exception, status: int, text: str, name: str | None
) -> None:
    async def test() -> None:
        slow = SlowScorer(scorer)
        slow.error = error
        slow.may_finish.set()
        async with running(FakeServedBundle(slow)) as client:
            answer = await client.post("/v1/score", json=ONE)
            assert check(answer, status, name).startswith(text)
            assert "secret" not in answer.text
            assert ("retry-after" in answer.headers) == (status == 503)
            slow.error = None
            assert (await client.post("/v1/score", json=ONE)).status_code == 200

    run(test)


def test_a_score_that_is_not_finite(scorer: Scorer) -> None:
    async def test() -> None:
        slow = SlowScorer(scorer)
        slow.answer = np.array([0.5, np.nan], dtype=np.float32)
        slow.may_finish.set()
        async with running(FakeServedBundle(slow)) as client:
            text = check(await client.post("/v1/score", json=ONE), 422, None)
            assert text.startswith("the score is not finite")

    run(test)


def test_a_request_keeps_its_scorer_during_a_reload(scorer: Scorer) -> None:
    async def test() -> None:
        old, new = SlowScorer(scorer, "old"), SlowScorer(scorer, "new")
        new.answer = np.array([0.75], dtype=np.float32)
        new.may_finish.set()
        served = FakeServedBundle(old)
        async with running(served, threads=2) as client:
            first = asyncio.create_task(client.post("/v1/score", json=ONE))
            while not old.started.acquire(blocking=False):
                await asyncio.sleep(0)
            served.scorer = new
            second = await client.post("/v1/score", json=ONE)
            assert (second.json(), second.headers["bundle-version"]) == ({"scores": [0.75]}, "new")
            old.may_finish.set()
            answer = await first
            assert (answer.json(), answer.headers["bundle-version"]) == ({"scores": [0.5]}, "old")

    run(test)


def test_a_body_that_does_not_arrive(scorer: Scorer) -> None:
    async def never() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async def test() -> None:
        async with running(FakeServedBundle(SlowScorer(scorer)), max_wait=0.05) as client:
            answer = await client.post("/v1/score", content=never(), headers=JSON)
            assert check(answer, 408, "body") == "body: did not arrive within 0.05 s"
            assert answer.headers["connection"] == "close"
            await in_flight(client, 0)

    run(test)


def test_bodies_that_are_being_received_share_a_limit_of_memory(scorer: Scorer) -> None:
    is_enough = asyncio.Event()

    async def large() -> AsyncIterator[bytes]:
        yield b" " * 90
        await is_enough.wait()

    async def test() -> None:
        slow = SlowScorer(scorer)
        slow.may_finish.set()
        # Two bodies of 100 bytes may be held at a time.
        async with running(FakeServedBundle(slow), max_requests=2, max_body=100) as client:
            held = [
                asyncio.create_task(client.post("/v1/score", content=large(), headers=JSON))
                for _ in range(2)
            ]
            await in_flight(client, 2)
            answer = await client.post("/v1/score", json=ONE)
            assert "too many bodies" in check(answer, 503, None)
            is_enough.set()
            for task in held:
                assert (await task).status_code == 400
            assert (await client.post("/v1/score", json=ONE)).status_code == 200

    run(test)
