"""Bodies of requests: read within limits, and checked as far as the scorer does not check them."""

from __future__ import annotations

import asyncio
import re
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from hvdrec.scoring.bundle import BundleInfo
from hvdrec.scoring.errors import choices, shown
from hvdrec.serving.problems import JSON, Problem

DRAINED = 8
"""Up to so many times the limit of a body is read and dropped, so that the client sees why."""


class Body(BaseModel):
    """What a request says, apart from the values that the bundle's schema is about."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ScoreBody(Body):
    """`Scorer.score`'s arguments; tasks: whether the answer tells each task's probabilities."""

    user: Any
    items: list[Any]
    scene: dict[str, Any] | None = None
    tasks: bool = False


class RecommendBody(Body):
    """`Scorer.recommend`'s arguments; tasks as in `ScoreBody`."""

    user: Any
    scene: dict[str, Any] | None = None
    k: int = Field(default=10, ge=1)
    candidates: int = Field(default=500, ge=1)
    exclude: list[Any] = []
    allowed: dict[str, list[Any]] | None = None
    skip_seen: bool = False
    diversity: float = Field(default=0.0, ge=0, lt=1)
    tasks: bool = False


B = TypeVar("B", bound=Body)


async def read_body(request: Request, most: int, max_wait: float) -> bytes:
    """Return a JSON request's body; Problem where it is of another type, too long or too slow."""
    headers = request.headers
    given = headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != JSON:
        raise Problem(415, f"content-type = {shown(given)}: must be {JSON}", "content-type")
    if headers.get("content-encoding", "identity") != "identity":
        encoding = shown(headers["content-encoding"])
        raise Problem(415, f"content-encoding = {encoding}: must be identity", "content-encoding")
    try:
        async with asyncio.timeout(max_wait):
            return await _received(request, most)
    except TimeoutError:
        headers_of_answer = {"connection": "close"}
        text = f"body: did not come within {max_wait:g} s"
        raise Problem(408, text, "body", headers_of_answer) from None


async def _received(request: Request, most: int) -> bytes:
    length = request.headers.get("content-length", "")
    # A client that asks first has sent nothing yet.
    drained = 0 if "expect" in request.headers else DRAINED * most
    if length.isdecimal() and int(length) > max(most, drained):
        raise _too_long(most)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Problem(499, "the client went away")
        part = message.get("body", b"")
        size += len(part)
        if size <= most:
            parts.append(part)
        elif size > drained:
            raise _too_long(most)
        if not message.get("more_body", False):
            break
    if size > most:
        raise _too_long(most)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_long(most: int) -> Problem:
    text = f"body: has more than {most} bytes; send fewer items at a time"
    return Problem(413, text, "body", {"connection": "close"})


def from_json(body: bytes) -> Any:
    """Return a body's values; Problem where it is no JSON."""
    try:
        # Refuses NaN, surrogates without their other half, and what is nested a thousand deep.
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Problem(400, f"body: no valid JSON ({error})", "body") from None


def with_integers(value: Any) -> Any:
    """Return a body's values with 3 in place of 3.0: JSON has one kind of number."""
    # Beyond 2**53 a float stands for many integers, among them those that are too large to parse.
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    if isinstance(value, list):
        return [with_integers(entry) for entry in value]
    if isinstance(value, dict):
        return {name: with_integers(entry) for name, entry in value.items()}
    return value


def checked(model: type[B], values: Any, max_candidates: int) -> B:
    """Return a body as its model; Problem, which names the field, for a value that cannot be.

    Values of users, items and scenes are left to the scorer.
    """
    try:
        body = model.model_validate(values)
    except ValidationError as error:
        raise _refused(model, error) from None
    if isinstance(body, ScoreBody):
        count = len(body.items)
        if count > max_candidates:
            text = f"items: {count} of them; at most {max_candidates} are scored at a time"
            raise Problem(422, text, "items")
    elif isinstance(body, RecommendBody):
        if "candidates" not in body.model_fields_set:
            body.candidates = min(body.candidates, max_candidates)
        for name in ("k", "candidates"):
            value = getattr(body, name)
            if value > max_candidates:
                text = f"{name} = {shown(value)}: at most {max_candidates} are ranked at a time"
                raise Problem(422, text, name)
    return body


def _refused(model: type[Body], error: ValidationError) -> Problem:
    """Return the first thing that is wrong with a body."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(map(str, first["loc"])) or "body"
    if first["type"] == "extra_forbidden":
        text = f"field {shown(field)} does not exist; known: {choices(model.model_fields)}"
    elif first["type"] == "missing":
        text = f"{field}: is missing"
    else:
        message = first["msg"].removeprefix("Input should be ")
        text = f"{field} = {shown(first['input'])}: must be {message}"
    return Problem(422, text, field)


def field_of(text: str, info: BundleInfo, items: str) -> str | None:
    """Return which field of a request the scorer's line is about: `scene.hour`, `user`, `k`.

    The lines begin with "NAME = VALUE:" or "SIDE field 'NAME'". items: the request's field that
    holds keys of items.
    """
    unknown = re.match(r"(user|item|scene|allowed) field '(.*?)' does not exist", text)
    if unknown:
        side, name = unknown.groups()
        return f"{items if side == 'item' else side}.{name}"
    named = re.match(r"(\w[\w.\[\]-]*) ?[=:]", text)
    if not named:
        return None
    name = named[1]
    if name in (info.user_key, info.item_key):
        return "user" if name == info.user_key else items
    for field in info.fields:
        if field.name == name:
            return f"{items if field.side == 'item' else field.side}.{name}"
    return name
