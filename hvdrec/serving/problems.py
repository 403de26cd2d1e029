"""What a request may end in besides an answer; all of it is one JSON shape."""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from starlette.responses import Response

RETRY_SECONDS = 1
JSON = "application/json"


class Problem(Exception):
    """The end of a request that gets no answer: its status, one line of text, and the field."""

    def __init__(
        self,
        status: int,
        text: str,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(text)
        self.status = status
        self.text = " ".join(text.split())
        self.field = field
        self.headers = dict(headers or {})

    def response(self) -> Response:
        """Return it as a response: ``{"status": 422, "error": "...", "field": "scene.hour"}``."""
        body = {"status": self.status, "error": self.text, "field": self.field}
        return Response(orjson.dumps(body), self.status, self.headers, JSON)


def unavailable(text: str) -> Problem:
    """Return the problem of a request that may be sent again in a moment."""
    return Problem(503, text, headers={"retry-after": str(RETRY_SECONDS)})
