"""Read request bodies within limits and parse them; the scorer checks the features and keys."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo
from pydantic_core import PydanticCustomError
from starlette.requests import ClientDisconnect, Request

from hvdrec.scoring.errors import choices, shown
from hvdrec.serving.problems import JSON, Problem, invalid_field, unavailable

DRAINED_BODIES = 8
"""A body that is too long is read to the end and discarded if it has at most this many times the
allowed size, since a client that is still sending may not see the response."""
EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "float_type": "a number",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "list_type": "a list",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
"""Pydantic's type of an error -> description of the expected value in the terms of JSON."""


def _limited(value: Any, info: ValidationInfo) -> Any:
    """Limit a number, or the length of a list, to `--max-candidates`."""
    count, unit = (len(value), " items") if isinstance(value, list) else (value, "")
    limit = info.context
    if isinstance(limit, int) and count > limit:
        raise PydanticCustomError("limit", f"at most {limit}{unit}")
    return value


Limited = AfterValidator(_limited)


class Body(BaseModel):
    """The fields that both requests have. `hvdrec.scoring.Scorer` documents their meaning."""

    model_config = ConfigDict(extra="forbid", strict=True)

    user: Any = Field(
        description="A user's key or raw features; null if nothing is known about the user."
    )
    scene: dict[str, Any] | None = Field(
        default=None, description="Scene of the request; omitted fields take their defaults."
    )
    tasks: bool = Field(default=False, description="Also return the probability of each task.")


class ScoreBody(Body):
    """Body of ``/v1/score``."""

    items: Annotated[list[Any], Limited] = Field(
        description="Keys or raw features of items; the response keeps their order."
    )


class RecommendBody(Body):
    """Body of ``/v1/recommend``."""

    k: Annotated[int, Limited] = Field(default=10, ge=1, description="Number of items to return.")
    candidates: Annotated[int, Limited] = Field(
        default=500, ge=1, description="Number of items to retrieve and rank."
    )
    exclude: list[Any] = Field(default=[], description="Keys of items to leave out.")
    allowed: dict[str, list[Any]] | None = Field(
        default=None, description="An item must have one of the values in each field."
    )
    skip_seen: bool = Field(
        default=False, description="Leave out items that the user met in the training log."
    )
    diversity: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="0: rank by score only; towards 1: prefer items unlike those before them.",
    )


B = TypeVar("B", bound=Body)


class BodyMemory:
    """Limits the memory for the bodies that are being received at the same time."""

    def __init__(self, limit: int) -> None:
        """Allow ``limit`` bytes in total."""
        self._limit = limit
        self._used = 0

    def take(self, size: int) -> None:
        """Count received bytes; raise Problem if the total exceeds the limit."""
        self._used += size
        if self._used > self._limit:
            raise unavailable("overloaded: too many bodies are being received; try again")

    def release(self, size: int) -> None:
        """Subtract bytes that `take` has counted, once their memory is free."""
        self._used -= size


async def read_body(request: Request, limit: int, max_wait: float, memory: BodyMemory) -> bytes:
    """Read the body of a JSON request, at most ``limit`` bytes within ``max_wait`` seconds.

    Raises:
        Problem: The headers do not declare plain JSON, the body is too long or too slow, or
            ``memory`` is used up.
    """
    headers = request.headers
    content_type = headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != JSON:
        text = f"content-type = {shown(content_type)}: must be {JSON}"
        raise Problem(415, text, "content-type")
    encoding = headers.get("content-encoding", "identity")
    if encoding != "identity":
        text = f"content-encoding = {shown(encoding)}: must be identity"
        raise Problem(415, text, "content-encoding")
    try:
        async with asyncio.timeout(max_wait):
            return await _received(request, limit, memory)
    except TimeoutError:
        text = f"body: did not arrive within {max_wait:g} s"
        raise Problem(408, text, "body", {"connection": "close"}) from None


def long_body(limit: int) -> Problem:
    """Build the error for a body of more than ``limit`` bytes."""
    text = f"body: has more than {limit} bytes; send fewer items at a time"
    return Problem(413, text, "body", {"connection": "close"})


async def _received(request: Request, limit: int, memory: BodyMemory) -> bytes:
    length = request.headers.get("content-length", "")
    # A client that sent "Expect: 100-continue" has not sent its body yet: nothing to discard.
    drained = 0 if "expect" in request.headers else DRAINED_BODIES * limit
    if length.isdecimal() and int(length) > max(limit, drained):
        raise long_body(limit)
    parts: list[bytes] = []
    size = kept = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size <= limit:
                parts.append(part)
                kept += len(part)
                memory.take(len(part))
            elif size > drained:
                raise long_body(limit)
    except ClientDisconnect:
        raise Problem(499, "the client disconnected") from None
    finally:
        memory.release(kept)
    if size > limit:
        raise long_body(limit)
    return b"".join(parts)


def from_json(body: bytes) -> Any:
    """Parse a body; raise Problem if it is not valid JSON."""
    try:
        # orjson refuses NaN, unpaired surrogates and nesting beyond 1024 levels.
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Problem(400, f"body: not valid JSON ({error})", "body") from None


def with_integers(value: Any) -> Any:
    """Replace floats such as 3.0 by integers, since JSON does not distinguish the two."""
    # Above 2**53, one float may stand for several integers.
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    if isinstance(value, list):
        return [with_integers(entry) for entry in value]
    if isinstance(value, dict):
        return {name: with_integers(entry) for name, entry in value.items()}
    return value


def parse_body(model: type[B], values: Any, max_candidates: int) -> B:
    """Check a body; for the first invalid value raise a Problem that names the field."""
    try:
        return model.model_validate(values, context=max_candidates)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(map(str, first["loc"])) or "body"
    if first["type"] == "extra_forbidden":
        text = f"{field}: unknown field; known: {choices(model.model_fields)}"
    elif first["type"] == "missing":
        text = f"{field}: is missing"
    else:
        problem = EXPECTED.get(first["type"]) or first["msg"].removeprefix("Input should be ")
        raise invalid_field(field, first["input"], f"must be {problem}")
    raise Problem(422, text, field)
