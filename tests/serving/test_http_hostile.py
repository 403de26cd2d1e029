"""Clients that send too much, too slowly or never read disturb no other client."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.serving.launch import Running, serving

ONE: dict[str, Any] = {"user": "1", "items": ["10"]}
BODY = json.dumps(ONE).encode()
POST = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
GET = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
MOST, PER_ADDRESS, WAIT = 60, 50, 0.6


@pytest.fixture(scope="module")
def strict(bundle: Path) -> Iterator[Running]:
    """Serve with short limits."""
    limits = {
        "max-header": 2000,
        "header-wait": WAIT,
        "max-connections": MOST,
        "max-per-address": PER_ADDRESS,
        "max-requests": 8,
        "max-body": 4000,
        "max-wait": 20,
    }
    options = [text for name, value in limits.items() for text in (f"--{name}", str(value))]
    with serving(bundle, *options) as running:
        yield running


def connect(running: Running, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", running.port), 60, source_address=(source, 0))


def answer_to(connection: socket.socket, *parts: bytes) -> bytes:
    """Send all that the service takes and return all that it sends until it closes."""
    received = b""
    with contextlib.suppress(ConnectionError):
        for part in parts:
            connection.sendall(part)
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            received += part
    connection.close()
    return received


def is_answered(running: Running, source: str = "127.0.0.2") -> bool:
    """Return True if another client of another address gets a score."""
    request = POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY
    return answer_to(connect(running, source), request).startswith(b"HTTP/1.1 200 ")


def problem_of(response: bytes, status: int) -> str:
    """Check an error response and return its text."""
    head, _, body = response.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), response
    assert b"connection: close" in head.lower()
    problem = json.loads(body)
    assert problem["status"] == status
    return str(problem["error"])


@pytest.mark.parametrize(
    "parts",
    [
        [b"GET /healthz HTTP/1.1\r\n", *([b"a: b\r\n" * 1000] * 2000)],
        [b"GET /healthz HTTP/1.1\r\na: ", *([b"x" * 10_000] * 2000)],
        [b"GET /", *([b"x" * 10_000] * 2000)],
        [b"GET /healthz HTTP/1.1\r\nhost: x\r\na: " + b"x" * 2000 + b"\r\n\r\n"],
        [GET, GET, b"GET /healthz HTTP/1.1\r\na: ", b"x" * 1000, b"x" * 10_000],
    ],
    ids=["many", "one", "path", "complete", "after others"],
)
def test_a_header_that_is_too_long(strict: Running, parts: list[bytes]) -> None:
    memory = psutil.Process(strict.process.pid).memory_info().rss
    response = answer_to(connect(strict), *parts)
    if len(parts) < 100:  # the others are cut off while they still send
        before, _, last = response.rpartition(b"HTTP/1.1 ")
        assert before.count(b"HTTP/1.1 200 ") == parts.count(GET)
        assert "more than 2000 bytes" in problem_of(b"HTTP/1.1 " + last, 431)
    assert psutil.Process(strict.process.pid).memory_info().rss - memory < 8e6
    assert is_answered(strict)


def test_a_header_at_the_limit(strict: Running) -> None:
    response = httpx.get(f"{strict.url}/healthz", headers={"a": "x" * 1700})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("start", "status"),
    [(b"", None), (b"GET /heal", 408), (GET + b"GET /healthz HTTP/1.1\r\n", 408)],
)
def test_a_header_that_does_not_arrive(strict: Running, start: bytes, status: int | None) -> None:
    connection = connect(strict)
    connection.sendall(start)
    started = time.monotonic()
    response = answer_to(connection)
    assert time.monotonic() - started > WAIT / 2
    if status is None:
        assert response == b""
    else:
        before, _, last = response.rpartition(b"HTTP/1.1 ")
        assert before.count(b"HTTP/1.1 200 ") == start.count(GET)
        assert "did not arrive" in problem_of(b"HTTP/1.1 " + last, status)


def test_a_header_that_trickles(strict: Running) -> None:
    connection = connect(strict)
    with pytest.raises(ConnectionError):
        for _ in range(200):
            connection.sendall(b"G" if _ == 0 else b"E")
            time.sleep(0.05)
    connection.close()


@pytest.mark.parametrize(
    "tail",
    [
        b"transfer-encoding: chunked\r\n\r\n0\r\n" + b"t: " + b"x" * 100 + b"\r\n",
        b"transfer-encoding: chunked\r\n\r\n1;" + b"x" * 100,
        b"content-length: 1000000000000\r\n\r\n{",
    ],
    ids=["trailers", "chunk extension", "length"],
)
def test_a_body_without_an_end(strict: Running, tail: bytes) -> None:
    memory = psutil.Process(strict.process.pid).memory_info().rss
    answer_to(connect(strict), POST + tail, *([tail[-102:] * 1000] * 100))
    assert psutil.Process(strict.process.pid).memory_info().rss - memory < 8e6
    assert is_answered(strict)


def test_idle_bodies_take_no_places(strict: Running) -> None:
    held = [connect(strict) for _ in range(40)]  # the service answers 8 requests at a time
    for connection in held:
        connection.sendall(POST + b"content-length: 100\r\n\r\n{")
    for _ in range(5):
        assert is_answered(strict)
    for connection in held:
        connection.close()


def test_half_sent_headers_take_no_connections(strict: Running) -> None:
    held = []
    for number in range(200):
        held.append(connect(strict, f"127.0.0.{3 + number % 4}"))
        held[-1].sendall(b"POST /v1/score HTTP/1.1\r\nhost: x\r\n")
        if number % 50 == 49:
            assert is_answered(strict)
    for connection in held:
        connection.close()


@pytest.mark.parametrize("addresses", [1, 2])
def test_busy_connections_are_not_closed_for_new_ones(strict: Running, addresses: int) -> None:
    count = PER_ADDRESS if addresses == 1 else MOST
    held = []
    for number in range(count):
        held.append(connect(strict, f"127.0.0.{3 + number % addresses}"))
        held[-1].sendall(POST + b"content-length: %d\r\n\r\n" % len(BODY))
    time.sleep(0.3)  # the headers are read
    refused = answer_to(connect(strict, "127.0.0.3"), GET)
    assert "too many connections" in problem_of(refused, 503)
    assert b"retry-after: 1" in refused
    assert is_answered(strict) == (addresses == 1)
    for connection in held[:3]:
        connection.sendall(BODY)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    for connection in held:
        connection.close()


def test_pipelined_requests_are_answered_in_order(strict: Running) -> None:
    post = POST + b"content-length: %d\r\n\r\n" % len(BODY) + BODY
    last = GET.replace(b"host: x", b"connection: close")
    response = answer_to(connect(strict), (GET + post) * 300, last)
    kinds = [part[:20] for part in response.split(b"HTTP/1.1 200 OK")[1:]]
    assert len(kinds) == 601
    states = [b'"alive"' in part for part in response.split(b"HTTP/1.1 200 OK")[1:]]
    assert states == [True, False] * 300 + [True]


def test_pipelined_requests_that_nobody_reads(strict: Running) -> None:
    process = psutil.Process(strict.process.pid)
    memory = process.memory_info().rss
    request = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 1000
    connection = connect(strict)
    connection.settimeout(0.3)
    sent = 0
    with contextlib.suppress(TimeoutError, ConnectionError):
        while sent < 200_000_000:
            sent += connection.send(request)
    assert sent < 50_000_000
    assert is_answered(strict)
    assert process.memory_info().rss - memory < 16e6
    # Who does not read within the time is disconnected.
    wait_until = time.monotonic() + 60
    while any(
        each.raddr and each.raddr.port == connection.getsockname()[1]
        for each in process.net_connections("tcp")
    ):
        assert time.monotonic() < wait_until
        time.sleep(0.1)
    connection.close()


@pytest.mark.parametrize(
    "content",
    [b"\0\0\0\0", b"GET / HTTP/9.9\r\n\r\n", b"hello\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\n\r\n"],
)
def test_what_is_not_http(strict: Running, content: bytes) -> None:
    assert "not a valid HTTP" in problem_of(answer_to(connect(strict), content), 400)


@pytest.mark.parametrize(
    "path", ["/", "/healthz", "/readyz", "/v1/bundle", "/metrics", "/openapi.json"]
)
def test_head_has_the_headers_of_get(strict: Running, path: str) -> None:
    got, head = httpx.get(strict.url + path), httpx.head(strict.url + path)
    assert (head.status_code, head.content) == (200, b"")
    varying = {"date", "content-length"} if path == "/metrics" else {"date"}
    assert {k: v for k, v in head.headers.items() if k not in varying} == {
        k: v for k, v in got.headers.items() if k not in varying
    }
    assert int(head.headers["content-length"]) > 0


def test_head_of_other_paths(strict: Running) -> None:
    assert httpx.head(f"{strict.url}/v1/score").status_code == 405
    assert httpx.head(f"{strict.url}/nothing").status_code == 404
    assert httpx.post(f"{strict.url}/healthz").headers["allow"] == "GET, HEAD"
