"""The ASGI application: routes, limits, and the way of a request to the scorer and back."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
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
from hvdrec.serving.bodies import read_body
from hvdrec.serving.description import Description
from hvdrec.serving.metrics import Metrics, remove_shared_folder
from hvdrec.serving.options import Options
from hvdrec.serving.problems import JSON, RETRY_SECONDS, Problem, unavailable
from hvdrec.serving.served import Served
from hvdrec.serving.threads import Threads, WaitedTooLong

LOG = logging.getLogger("hvdrec.serving")
VERSION_HEADER = "bundle-version"
TITLES = {
    400: "Not JSON",
    408: "The body did not come in time",
    413: "The body is too long",
    415: "The body is of another type",
    422: "A field cannot be what it is",
    503: "Overloaded, or not ready: try again",
}


class DirectRoute(APIRoute):
    """A route whose endpoint takes the request and returns the response, with nothing between."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the endpoint."""
        return self.endpoint


class Service:
    """One worker: a FastAPI application around the bundle that it serves."""

    def __init__(self, options: Options, served: Served, metrics: Metrics) -> None:
        self._options = options
        self._served = served
        self._metrics = metrics
        self._taken = 0
        self._stopping = threading.Event()
        self._described: tuple[Scorer, Description, bytes] | None = None
        self._page, self._page_headers = _page()
        self.app = app = FastAPI(
            title="hvdrec",
            version=__version__,
            description="Scores and recommends items from a bundle.",
            openapi_url=None,
            docs_url=None,  # its page would load scripts from elsewhere
            redoc_url=None,
            redirect_slashes=False,
            lifespan=self._lifespan,
            exception_handlers={
                Problem: _problem,
                HTTPException: _http_problem,
                Exception: _failed,
            },
        )
        app.router.route_class = DirectRoute
        read, scored = (503,), (400, 408, 413, 415, 422, 503)
        self._route("POST", "/v1/score", self.score, answers.ScoreAnswer, scored)
        self._route("POST", "/v1/recommend", self.recommend, answers.RecommendAnswer, scored)
        self._route("GET", "/v1/bundle", self.bundle, answers.BundleAnswer, read)
        self._route("GET", "/healthz", self.healthz, answers.StateAnswer)
        self._route("GET", "/readyz", self.readyz, answers.StateAnswer, read)
        for path, endpoint in (
            ("/", self.page),
            ("/metrics", self.metrics),
            ("/openapi.json", self.openapi),
        ):
            app.add_api_route(path, endpoint, include_in_schema=False)
        self.paths = frozenset(route.path for route in app.routes if hasattr(route, "path"))

    async def score(self, request: Request) -> Response:
        """Score items for a user in a scene; the answer keeps the order of the items."""
        return await self._scored(request, "/v1/score", work.score)

    async def recommend(self, request: Request) -> Response:
        """Retrieve and rank items for a user in a scene, best first."""
        return await self._scored(request, "/v1/recommend", work.recommend)

    async def bundle(self, request: Request) -> Response:
        """Tell what the bundle is and which fields a request may give."""
        scorer, description, _ = self._description()
        headers = {VERSION_HEADER: scorer.version}
        return Response(orjson.dumps(description.bundle), 200, headers, JSON)

    async def healthz(self, request: Request) -> Response:
        """Tell that the process is alive."""
        return Response(b'{"state":"alive"}', media_type=JSON)

    async def readyz(self, request: Request) -> Response:
        """Tell that the bundle is loaded and warm."""
        headers = {VERSION_HEADER: self._served.current.version}
        return Response(b'{"state":"ready"}', 200, headers, JSON)

    async def metrics(self, request: Request) -> Response:
        """Return the counters of all workers for Prometheus."""
        exposed = await asyncio.to_thread(self._metrics.exposed)
        return Response(exposed, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        """Return the OpenAPI document, with what the bundle's schema says of requests."""
        return Response(self._description()[2], media_type=JSON)

    async def page(self, request: Request) -> Response:
        """Return a page to try the bundle on."""
        return Response(self._page, 200, self._page_headers, "text/html")

    async def _scored(
        self,
        request: Request,
        route: str,
        answer: Callable[[Scorer, bytes, int], work.Answer],
    ) -> Response:
        """Answer a request from one scorer, once a thread has time for it."""
        options, metrics = self._options, self._metrics
        scorer = self._served.current
        if self._taken >= options.max_requests:
            raise unavailable(f"overloaded: {self._taken} requests are under way; try again")
        self._taken += 1
        metrics.in_flight.inc()
        try:
            body = await read_body(request, options.max_body, options.max_wait)
            answered = await self._threads.run(lambda: answer(scorer, body, options.max_candidates))
        except WaitedTooLong:
            text = f"overloaded: waited {options.max_wait:g} s to be scored; try again"
            raise unavailable(text) from None
        finally:
            self._taken -= 1
            metrics.in_flight.dec()
        metrics.candidates.labels(route).inc(answered.items)
        return Response(answered.content, 200, {VERSION_HEADER: scorer.version}, JSON)

    def _description(self) -> tuple[Scorer, Description, bytes]:
        """Return what is told about the bundle in use, made once for each."""
        scorer = self._served.current
        if self._described is None or self._described[0] is not scorer:
            description = Description(scorer, self._options)
            app = self.app
            document = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            document = description.complete(document)
            self._described = scorer, description, orjson.dumps(document)
        return self._described

    def _route(
        self,
        method: str,
        path: str,
        endpoint: Callable[[Request], Any],
        answer: type[Any],
        problems: tuple[int, ...] = (),
    ) -> None:
        version = {"schema": {"type": "string"}, "description": "What the bundle is."}
        headers = {VERSION_HEADER: version} if path != "/healthz" else {}
        retry = {"retry-after": {"schema": {"type": "integer"}, "description": "Seconds."}}
        responses: dict[int | str, dict[str, Any]] = {
            200: {"model": answer, "description": "The answer", "headers": headers}
        }
        for status in problems:
            responses[status] = {"model": answers.ErrorAnswer, "description": TITLES[status]}
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
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Load the bundle before requests come; one worker alone lets them come meanwhile."""
        self._threads = Threads(self._options.scoring_threads, self._options.max_wait)
        loading = asyncio.create_task(asyncio.to_thread(self._load))
        if self._options.workers > 1:
            await loading  # the others answer what this one cannot yet
        try:
            yield
        finally:
            self._stopping.set()
            await loading
            await self._threads.close()
            self._served.close()

    def _load(self) -> None:
        """Load the bundle, again and again until that works; one worker of many starts anew."""
        said = ""
        while not self._stopping.is_set():
            try:
                self._served.load()
                return
            except ScoringError as error:
                if str(error) != said:
                    said = str(error)
                    LOG.error("%s", error)
            except Exception:
                LOG.exception("the bundle cannot be loaded")
            self._stopping.wait(RETRY_SECONDS)
            if self._options.workers > 1:
                os._exit(1)


class Counted:
    """The application, with every request counted by its route and status."""

    def __init__(self, app: ASGIApp, paths: frozenset[str], metrics: Metrics) -> None:
        self._app = app
        self._paths = paths
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            path = scope["path"]
            route = path if path in self._paths else "other"
            self._metrics.answered(route, status, time.perf_counter() - started)


def make_app(options: Options) -> ASGIApp:
    """Return a worker's application."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("hvdrec").setLevel(logging.INFO)
    _end_with_parent()
    metrics = Metrics()
    service = Service(options, Served(options, metrics), metrics)
    return Counted(service.app, service.paths, metrics)


def _end_with_parent() -> None:
    """End this worker when the process that started it is gone, and with it who would end it."""
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
    """Return the router's own problems, an unknown path or method, in the one shape."""
    path = request.url.path
    texts = {404: f"{path}: no such path", 405: f"{request.method} {path}: no such method"}
    text = texts.get(error.status_code, str(error.detail))
    return Problem(error.status_code, text, headers=error.headers).response()


async def _failed(request: Request, error: Exception) -> Response:
    """Return what a client sees of an error of ours; the server logs the rest."""
    return Problem(500, "internal error").response()


def _page() -> tuple[bytes, dict[str, str]]:
    """Return the page, and headers that forbid it everything but itself and this service."""
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
        "content-security-policy": "; ".join(f"{name} {what}" for name, what in policy.items()),
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }
    return text.encode(), headers
