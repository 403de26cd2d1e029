"""The ASGI application: routes, limits on requests, and calls of the scorer."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import lru_cache
from importlib import resources
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hvdrec import __version__
from hvdrec.scoring import Scorer
from hvdrec.scoring.errors import ScoringError
from hvdrec.serving import answers, work
from hvdrec.serving.bodies import BodyMemory, read_body
from hvdrec.serving.connections import Connections
from hvdrec.serving.description import add_requests, describe
from hvdrec.serving.metrics import Metrics, remove_shared_folder
from hvdrec.serving.options import Options
from hvdrec.serving.problems import JSON, RETRY_SECONDS, Problem, unavailable
from hvdrec.serving.served import ServedBundle
from hvdrec.serving.stopping import drained_before_stop
from hvdrec.serving.threads import ScoringThreads, WaitedTooLong

LOG = logging.getLogger("hvdrec.serving")
VERSION_HEADER = "bundle-version"
PROBLEMS = {
    400: "The body is not valid JSON",
    408: "The body did not arrive in time",
    413: "The body is too long",
    415: "The content type or encoding is not supported",
    422: "A field is invalid",
    503: "Overloaded or not ready; try again",
}


class DirectRoute(APIRoute):
    """A FastAPI route that skips FastAPI's validation: the endpoint itself parses the request."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the endpoint without the code that FastAPI usually wraps around it."""
        return self.endpoint


class Service:
    """The FastAPI application of one worker process: `app`, and the `paths` of its routes."""

    def __init__(
        self,
        options: Options,
        served: ServedBundle,
        metrics: Metrics,
        listener: socket.socket | None = None,
    ) -> None:
        """Create the routes; the application loads the bundle when it starts."""
        self._listener = listener
        self._options = options
        self._served = served
        self._metrics = metrics
        self._connections = Connections(options)
        self._memory = BodyMemory(options.max_requests * options.max_body)
        self._in_progress = 0
        self._stopping = threading.Event()
        self._described = lru_cache(maxsize=1)(self._describe)
        self._page, self._page_headers = _page()
        self.app = app = FastAPI(
            title="hvdrec",
            version=__version__,
            description="Scores and recommends items from a bundle.",
            openapi_url=None,
            docs_url=None,  # its page loads scripts from other hosts
            redoc_url=None,
            redirect_slashes=False,
            lifespan=self._lifespan,
            exception_handlers={
                Problem: _problem,
                HTTPException: _http_problem,
                Exception: _internal_error,
            },
        )
        app.router.route_class = DirectRoute
        read, scored = (503,), (400, 408, 413, 415, 422, 503)
        self._route("POST", "/v1/score", self.score, answers.ScoreAnswer, scored)
        self._route("POST", "/v1/recommend", self.recommend, answers.RecommendAnswer, scored)
        self._route("GET", "/v1/bundle", self.bundle, answers.BundleAnswer, read)
        self._route("GET", "/healthz", self.healthz, answers.StateAnswer)
        self._route("GET", "/readyz", self.readyz, answers.StateAnswer, read)
        app.add_api_route("/", self.page, include_in_schema=False)
        app.add_api_route("/metrics", self.metrics, include_in_schema=False)
        app.add_api_route("/openapi.json", self.openapi, include_in_schema=False)
        self.paths = frozenset(route.path for route in app.routes if hasattr(route, "path"))

    async def score(self, request: Request) -> Response:
        """Score items for a user in a scene; the response keeps the order of the items."""
        return await self._scored(request, "/v1/score", work.score)

    async def recommend(self, request: Request) -> Response:
        """Retrieve and rank items for a user in a scene, best first."""
        return await self._scored(request, "/v1/recommend", work.recommend)

    async def bundle(self, request: Request) -> Response:
        """Describe the bundle and the fields that a request may give."""
        scorer = self._served.current
        return Response(self._described(scorer)[0], 200, {VERSION_HEADER: scorer.version}, JSON)

    async def healthz(self, request: Request) -> Response:
        """Report that the process is alive."""
        return Response(b'{"state":"alive"}', media_type=JSON)

    async def readyz(self, request: Request) -> Response:
        """Report that the bundle is loaded and warm, and that the service is not stopping."""
        if self._connections.is_draining:
            raise unavailable("the service is stopping")
        headers = {VERSION_HEADER: self._served.current.version}
        return Response(b'{"state":"ready"}', 200, headers, JSON)

    async def metrics(self, request: Request) -> Response:
        """Return the metrics of all workers for Prometheus."""
        text = await asyncio.to_thread(self._metrics.exposition)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        """Return the OpenAPI document, with request schemas for this bundle."""
        return Response(self._described(self._served.current)[1], media_type=JSON)

    async def page(self, request: Request) -> Response:
        """Return a web page to try out the bundle."""
        return Response(self._page, 200, self._page_headers, "text/html")

    async def _scored(self, request: Request, path: str, route: work.Route) -> Response:
        """Compute the response in a scoring thread as soon as one is free."""
        options, metrics = self._options, self._metrics
        scorer = self._served.current
        self._check_load()
        metrics.in_flight.inc()
        try:
            body = await read_body(request, options.max_body, options.max_wait, self._memory)
            # Count a request only when its body is complete. Otherwise clients that stop sending
            # would use up the limit.
            self._check_load()
            self._in_progress += 1
            try:
                most = options.max_candidates
                result = await self._threads.run(lambda: work.answer(route, scorer, body, most))
            finally:
                self._in_progress -= 1
        except WaitedTooLong:
            text = f"overloaded: no thread was free within {options.max_wait:g} s; try again"
            raise unavailable(text) from None
        finally:
            metrics.in_flight.dec()
        metrics.candidates.labels(path).inc(result.items)
        return Response(result.content, 200, {VERSION_HEADER: scorer.version}, JSON)

    def _check_load(self) -> None:
        if self._in_progress >= self._options.max_requests:
            raise unavailable(f"overloaded: {self._in_progress} requests in progress; try again")

    def _describe(self, scorer: Scorer) -> tuple[bytes, bytes]:
        """Build the response of `/v1/bundle` and the OpenAPI document for a scorer's bundle."""
        bundle, app = describe(scorer, self._options), self.app
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        add_requests(document, scorer, bundle)
        return orjson.dumps(bundle.model_dump()), orjson.dumps(document)

    def _route(
        self,
        method: str,
        path: str,
        endpoint: Callable[[Request], Any],
        answer: type[Any],
        problems: tuple[int, ...] = (),
    ) -> None:
        version = {"schema": {"type": "string"}, "description": "Version of the bundle."}
        headers = {VERSION_HEADER: version} if path != "/healthz" else {}
        retry = {"retry-after": {"schema": {"type": "integer"}, "description": "Seconds."}}
        responses: dict[int | str, dict[str, Any]] = {
            200: {"model": answer, "description": "The answer", "headers": headers}
        }
        for status in problems:
            responses[status] = {"model": answers.ErrorAnswer, "description": PROBLEMS[status]}
            if status == 503:
                responses[status]["headers"] = retry
        self.app.add_api_route(
            path,
            endpoint,
            methods=[method],
            response_model=None,
            responses=responses,
            operation_id=endpoint.__name__,
        )

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        """Load the bundle. A single worker accepts requests during the load and answers 503."""
        self._threads = ScoringThreads(self._options.scoring_threads, self._options.max_wait)
        loading = asyncio.create_task(asyncio.to_thread(self._load))
        sweeping = asyncio.create_task(self._connections.sweep())
        drain, seconds = self._connections.drain, self._options.drain
        try:
            with drained_before_stop(drain, seconds, self._listener):
                if self._options.workers > 1:
                    await loading  # accept no requests: the other workers answer them
                    if self._connections.is_draining:
                        os._exit(0)  # connections accepted now would be closed at once
                yield {"connections": self._connections}  # `GuardedProtocol` reads it
        finally:
            sweeping.cancel()
            self._stopping.set()
            await loading
            await self._threads.close()
            self._served.close()

    def _load(self) -> None:
        """Load the bundle; after an error try again. One of several workers exits instead."""
        logged = ""
        while not self._stopping.is_set():
            try:
                self._served.load()
                return
            except ScoringError as error:
                if str(error) != logged:
                    logged = str(error)
                    LOG.error("%s", error)
            except Exception:
                LOG.exception("the bundle cannot be loaded")
            self._stopping.wait(RETRY_SECONDS)
            if self._options.workers > 1:
                os._exit(1)  # the parent process starts another worker


class CountedApp:
    """ASGI middleware that counts requests by route and status.

    It passes a HEAD request on as GET. uvicorn then sends only the headers of the response.
    """

    def __init__(self, app: ASGIApp, paths: frozenset[str], metrics: Metrics) -> None:
        """Count the requests of ``app`` in ``metrics``; all unknown paths count as one route."""
        self._app = app
        self._paths = paths
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # a copy, since uvicorn reads the original
        started = time.perf_counter()
        status = 500

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            path = scope["path"]
            route = path if path in self._paths else "other"
            self._metrics.answered(route, status, time.perf_counter() - started)


def make_app(options: Options, listener: socket.socket | None = None) -> ASGIApp:
    """Build the application of a worker process.

    Args:
        options: Settings of the service.
        listener: The listening socket if this is the only worker, otherwise None. The worker closes
            this socket when the worker stops.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("hvdrec").setLevel(logging.INFO)
    _exit_with_parent()
    metrics = Metrics()
    service = Service(options, ServedBundle(options, metrics), metrics, listener)
    return CountedApp(service.app, service.paths, metrics)


def _exit_with_parent() -> None:
    """Stop this worker when its parent process dies; nothing else would stop it then."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        remove_shared_folder()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="hvdrec-parent", daemon=True).start()


async def _problem(request: Request, problem: Problem) -> Response:
    return problem.response()


async def _http_problem(request: Request, error: HTTPException) -> Response:
    """Answer the router's errors (unknown path, wrong method) in the JSON form of other errors."""
    path = request.url.path
    texts = {404: f"{path}: unknown path", 405: f"{path}: method {request.method} is not allowed"}
    text = texts.get(error.status_code, str(error.detail))
    headers = dict(error.headers or {})
    if headers.get("Allow") == "GET":
        headers["Allow"] = "GET, HEAD"
    return Problem(error.status_code, text, headers=headers).response()


async def _internal_error(request: Request, error: Exception) -> Response:
    """Answer 500 without details of an internal error, which the server logs."""
    return Problem(500, "internal error").response()


def _page() -> tuple[bytes, dict[str, str]]:
    """Read the web page; build headers that forbid it to contact anything but this service."""
    text = resources.files("hvdrec.serving").joinpath("page.html").read_text(encoding="utf-8")
    hashes = {}
    for tag in ("script", "style"):
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(p.encode()).digest()).decode() for p in parts)
        hashes[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = {
        "default-src": "'none'",
        "script-src": hashes["script"],
        "style-src": hashes["style"],
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }
    return text.encode(), headers
