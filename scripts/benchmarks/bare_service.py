"""A FastAPI handler that parses and returns the bodies of `/v1/score`, to compare with.

The request becomes a model of its fields; the answer is a fixed list of 500 scores. Nothing is
looked up or scored. FastAPI can serialize the answer in two ways:

declared    the handler declares its return type, and pydantic writes the JSON
undeclared  it does not, and FastAPI's encoder walks through the answer
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

from fastapi import FastAPI
from pydantic import BaseModel
from uvicorn import Config, Server


class Request(BaseModel):
    """A request of `/v1/score` as the benchmark sends it."""

    user: str
    items: list[str]
    scene: dict[str, int]


class Answer(BaseModel):
    """The answer to a request."""

    scores: list[float]


def make_app(answer: dict[str, list[float]], *, declared: bool) -> FastAPI:
    """Build the application."""
    app = FastAPI()

    @app.post("/v1/score", response_model=Answer if declared else None)
    async def score(request: Request) -> object:
        return answer

    @app.get("/readyz")
    async def readyz() -> None:
        return

    return app


if __name__ == "__main__":
    answer = json.loads(Path(sys.argv[1]).read_text())
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    print(listening.getsockname()[1], file=sys.stderr, flush=True)
    app = make_app(answer, declared=sys.argv[2] == "declared")
    config = Config(app, loop="uvloop", http="httptools", log_level="error", access_log=False)
    Server(config).run([listening])
