"""Invalid requests: 4xx responses in one shape, which names the field."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

JSON = {"content-type": "application/json"}
ONE: dict[str, Any] = {"user": "1", "items": ["10"]}


def check(answer: httpx.Response, status: int, field: str | None) -> str:
    """Check the shape of an error response and return its text."""
    problem = answer.json()
    assert set(problem) == {"status", "error", "field"}
    assert (answer.status_code, problem["status"], problem["field"]) == (status, status, field)
    assert answer.headers["content-type"] == "application/json"
    text: str = problem["error"]
    assert text
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("body", "field", "text"),
    [
        ([], "body", "body = []: must be an object"),
        ({}, "user", "user: is missing"),
        ({"user": "1"}, "items", "items: is missing"),
        (
            {**ONE, "usr": 1},
            "usr",
            "usr: unknown field; known: [user, scene, tasks, items]",
        ),
        ({**ONE, "tasks": True}, "tasks", "tasks: this bundle's ranker has a single label; score"),
        ({**ONE, "tasks": "all"}, "tasks", 'tasks = "all": must be true or false'),
        ({**ONE, "items": "10"}, "items", 'items = "10": must be a list'),
        ({**ONE, "items": {"10": 1}}, "items", 'items = {"10": 1}: must be a list'),
        (
            {**ONE, "items": [10]},
            "items",
            'items = 10: item_id is a string, not an integer; pass "10"',
        ),
        ({**ONE, "items": [["10"]]}, "items", 'items = ["10"]: item_id is a string, not a list'),
        ({**ONE, "items": ["10"] * 101}, "items", 'items = ["10", "10",'),
        ({**ONE, "items": [{"yaer": 1}]}, "items.yaer", "items.yaer: unknown field; known:"),
        ({**ONE, "items": [{"year": "x"}]}, "items.year", 'items.year = "x": must be an integer'),
        ({**ONE, "user": 1}, "user", 'user = 1: user_id is a string, not an integer; pass "1"'),
        ({**ONE, "user": True}, "user", "user = true: user_id is a string, not a boolean"),
        ({**ONE, "user": {"agee": 1}}, "user.agee", "user.agee: unknown field; known:"),
        (
            {**ONE, "user": {"age": "old"}},
            "user.age",
            'user.age = "old": must be a number, not a string',
        ),
        ({**ONE, "user": {"age": 1e31}}, "user.age", "user.age = 1e+31: must be within 1e+30 of 0"),
        ({**ONE, "user": {"history": "10"}}, "user.history", 'user.history = "10": must be a list'),
        ({**ONE, "scene": []}, "scene", "scene = []: must be an object"),
        ({**ONE, "scene": {"hr": 1}}, "scene.hr", "scene.hr: unknown field; known: [hour"),
        ({**ONE, "scene": {"hour": "9pm"}}, "scene.hour", 'scene.hour = "9pm": must be an integer'),
        ({**ONE, "scene": {"hour": 1.5}}, "scene.hour", "scene.hour = 1.5: must be an integer"),
        (
            {**ONE, "scene": {"hour": 2**63}},
            "scene.hour",
            "scene.hour = 9223372036854775808: does not",
        ),
        (
            {**ONE, "scene": {"hour": 10**20}},
            "scene.hour",
            "scene.hour = 1e+20: must be an integer",
        ),
        ({**ONE, "scene": {"hour": True}}, "scene.hour", "scene.hour = true: must be an integer"),
        (
            {**ONE, "scene": {"temperature": -2e30}},
            "scene.temperature",
            "scene.temperature = -2e+30: must be within 1e+30 of 0",
        ),
    ],
)
def test_invalid_score_requests(client: httpx.Client, body: Any, field: str, text: str) -> None:
    assert check(client.post("/v1/score", json=body), 422, field).startswith(text)


@pytest.mark.parametrize(
    ("change", "field", "text"),
    [
        ({"k": 0}, "k", "k = 0: must be greater than or equal to 1"),
        ({"k": "10"}, "k", 'k = "10": must be an integer'),
        ({"k": True}, "k", "k = true: must be an integer"),
        ({"k": 1.5}, "k", "k = 1.5: must be an integer"),
        ({"k": None}, "k", "k = null: must be an integer"),
        ({"k": 101}, "k", "k = 101: must be at most 100"),
        ({"k": 10**30}, "k", "k = 1e+30: must be an integer"),
        ({"candidates": 101}, "candidates", "candidates = 101: must be at most 100"),
        ({"exclude": "10"}, "exclude", 'exclude = "10": must be a list'),
        ({"exclude": [[]]}, "exclude", "exclude = []: item_id is a string, not a list"),
        ({"allowed": ["Drama"]}, "allowed", 'allowed = ["Drama"]: must be an object'),
        ({"allowed": {"genres": "War"}}, "allowed.genres", 'allowed.genres = "War": must be a'),
        (
            {"allowed": {"year": [2**63]}},
            "allowed.year",
            "allowed.year = 9223372036854775808:",
        ),
        ({"allowed": {"year": [None]}}, "allowed.year", "allowed.year = null: must be an integer"),
        ({"allowed": {"hour": [1]}}, "allowed.hour", "allowed.hour: unknown field; known:"),
        ({"tasks": True}, "tasks", "tasks: this bundle's ranker has a single label; score without"),
        ({"tasks": ["love"]}, "tasks", 'tasks = ["love"]: must be true or false'),
        ({"skip_seen": 1}, "skip_seen", "skip_seen = 1: must be true or false"),
        ({"diversity": 1.5}, "diversity", "diversity = 1.5: must be less than 1"),
        ({"diversity": "high"}, "diversity", 'diversity = "high": must be a number'),
        ({"items": ["10"]}, "items", "items: unknown field; known: [user, scene, tasks, k,"),
    ],
)
def test_invalid_recommend_requests(
    client: httpx.Client, change: Any, field: str, text: str
) -> None:
    answer = client.post("/v1/recommend", json={"user": "1", **change})
    assert check(answer, 422, field).startswith(text)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"user=1",
        b'{"user": "1", "items": [NaN]}',
        b'{"user": "1", "items": ["10"], "scene": {"temperature": Infinity}}',
        b'{"user": "1", "items": ["10"], "scene": {"temperature": 1e400}}',
        b'{"user": "\\ud800", "items": ["10"]}',
        b'{"user": "\xff", "items": ["10"]}',
        b'{"user": "1", "items": ["10"], "scene": {"hour": ' + b"9" * 5000 + b"}}",
        b"[" * 5000,
        b'{"user": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b"\x1f\x8b",
    ],
)
@pytest.mark.parametrize("path", ["/v1/score", "/v1/recommend"])
def test_bodies_that_are_not_json(client: httpx.Client, path: str, content: bytes) -> None:
    answer = client.post(path, content=content, headers=JSON)
    assert check(answer, 400, "body").startswith("body: not valid JSON (")


@pytest.mark.parametrize("depth", [900, 1000, 1020])
def test_deeply_nested_values(client: httpx.Client, depth: int) -> None:
    for deep in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
        for name in ("user", "items", "scene", "exclude", "k"):
            text = f'{{"user": "1", "{name}": {deep}}}'
            for path in ("/v1/score", "/v1/recommend"):
                answer = client.post(path, content=text, headers=JSON)
                assert answer.status_code == 422, (name, path, answer.text)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/jsonp"},
    ],
)
def test_other_content_types(client: httpx.Client, headers: dict[str, str]) -> None:
    answer = client.post("/v1/score", content=json.dumps(ONE), headers=headers)
    text = check(answer, 415, "content-type")
    assert text == f"content-type = {headers.get('content-type', '')!r}: must be application/json"
    # A page of another origin cannot send requests: its browser gets no permission.
    assert "access-control-allow-origin" not in answer.headers


def test_content_types_that_are_json(client: httpx.Client) -> None:
    for content_type in ("application/json; charset=utf-8", "Application/JSON"):
        headers = {"content-type": content_type}
        answer = client.post("/v1/score", content=json.dumps(ONE), headers=headers)
        assert answer.status_code == 200


def test_a_compressed_body(client: httpx.Client) -> None:
    headers = {**JSON, "content-encoding": "gzip"}
    answer = client.post("/v1/score", content=b"\x1f\x8b", headers=headers)
    check(answer, 415, "content-encoding")


@pytest.mark.parametrize("size", [20_001, 100_000, 1_000_000])
def test_a_body_above_the_limit(client: httpx.Client, size: int) -> None:
    def parts() -> Iterator[bytes]:
        for start in range(0, size, 10_000):
            yield b" " * min(10_000, size - start)

    text = "body: has more than 20000 bytes; send fewer items at a time"
    # With a content-length header, and in chunks without one.
    assert check(client.post("/v1/score", content=b" " * size, headers=JSON), 413, "body") == text
    try:
        answer = client.post("/v1/score", content=parts(), headers=JSON)
    except httpx.WriteError:
        assert size > 8 * 20_000  # the service has closed the connection
    else:
        assert check(answer, 413, "body") == text


def test_a_body_at_the_limit(client: httpx.Client) -> None:
    content = json.dumps(ONE)
    padded = content + " " * (20_000 - len(content))
    assert client.post("/v1/score", content=padded, headers=JSON).status_code == 200


def test_unknown_paths_and_methods(client: httpx.Client) -> None:
    assert check(client.get("/v1/scores"), 404, None) == "/v1/scores: unknown path"
    answer = client.get("/v1/score")
    assert check(answer, 405, None) == "/v1/score: method GET is not allowed"
    assert answer.headers["allow"] == "POST"
    for path in ("/docs", "/redoc", "/v1/score/", "/../etc/passwd", "/page.html"):
        assert client.get(path).status_code == 404


PYTHON_WORDS = re.compile(
    r"\b(None|True|False|NoneType|dict|dictionary|str|int|float|bool|tuple|index)\b|= '"
)


@pytest.mark.parametrize("value", [None, True, 1, 1.5, "x", [], ["x"], {}, {"x": None}, [[{}]]])
def test_errors_speak_of_json_and_not_of_python(
    client: httpx.Client, int_client: httpx.Client, value: Any
) -> None:
    recommend = ("k", "candidates", "exclude", "allowed", "skip_seen", "diversity")
    bodies = [("/v1/recommend", {"user": "1", name: value}) for name in recommend]
    bodies += [
        ("/v1/recommend", {"user": "1", "allowed": {"year": each}}) for each in (value, [value])
    ]
    for user in (value, {"age": value}, {"history": value}, {"history": [value]}):
        bodies.append(("/v1/score", {**ONE, "user": user}))
    for items in (value, [value], [{"year": value}], [{"genres": value}]):
        bodies.append(("/v1/score", {**ONE, "items": items}))
    for scene in (value, {"hour": value}, {"place": value}, {"temperature": value}):
        bodies.append(("/v1/score", {**ONE, "scene": scene}))
    bodies += [("/v1/score", value), ("/v1/score", {**ONE, "tasks": value})]
    for path, body in bodies:
        for each in (client, int_client):
            answer = each.post(path, content=json.dumps(body), headers=JSON)
            assert answer.status_code in (200, 422), answer.text
            if answer.status_code == 422:
                text = answer.json()["error"]
                assert not PYTHON_WORDS.search(text), text
                assert text.startswith(answer.json()["field"])
