"""Error responses, which all have the same JSON form."""

from __future__ import annotations

import json
from collections.abc import Mapping

import orjson
from starlette.responses import Response

RETRY_SECONDS = 1
JSON = "application/json"
SHOWN = 60
"""Largest number of characters of a value that an error shows."""


class Problem(Exception):
    """Ends a request with an error response.

    Attributes:
        status: HTTP status.
        text: What is wrong, on one line.
        field: The part of the request at fault, such as ``scene.hour``; None if no part is.
        headers: Additional headers of the response.
    """

    def __init__(
        self,
        status: int,
        text: str,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Describe the error; line breaks in ``text`` become spaces."""
        super().__init__(text)
        self.status = status
        self.text = " ".join(text.split())
        self.field = field
        self.headers = dict(headers or {})

    def response(self) -> Response:
        """Build the response: ``{"status": 422, "error": "...", "field": "scene.hour"}``."""
        body = {"status": self.status, "error": self.text, "field": self.field}
        return Response(orjson.dumps(body), self.status, self.headers, JSON)


def unavailable(text: str) -> Problem:
    """Build the error for a request that may succeed if the client repeats it a moment later."""
    return Problem(503, text, headers={"retry-after": str(RETRY_SECONDS)})


def invalid_field(field: str, value: object, problem: str) -> Problem:
    """Build the error for a field with an invalid value; the value is shown as JSON."""
    text = " ".join(json.dumps(value, ensure_ascii=False, default=str).split())
    shown = text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
    return Problem(422, f"{field} = {shown}: {problem}", field)
