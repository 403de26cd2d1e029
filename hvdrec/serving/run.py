"""The processes of a service: one port, one or several workers, an end that loses no request."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from collections.abc import Iterator
from functools import partial
from types import FrameType

from uvicorn import Config, Server
from uvicorn.supervisors import Multiprocess

from hvdrec.errors import UserError
from hvdrec.serving.app import make_app
from hvdrec.serving.metrics import shared_folder
from hvdrec.serving.options import Options
from hvdrec.serving.served import open_scorer

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75
"""Longer than what load balancers keep idle connections, so that they close them first."""
LAST_SECONDS = 30
"""What requests get to end in, after the signal to stop."""
RESERVED_FILES = 64


def run(options: Options) -> None:
    """Serve a bundle until SIGTERM or SIGINT; see `hvdrec.serving.serve`."""
    with _stopped_by_signals():
        scorer = open_scorer(options)
        with _bound(options.host, options.port) as listening:
            name, version = scorer.info.name, scorer.version
            del scorer  # each worker opens its own
            workers = f"{options.workers} worker{'s' if options.workers > 1 else ''}"
            where = _address(options.host, listening.getsockname()[1])
            print(f"serving {name} {version} on http://{where} with {workers}", file=sys.stderr)
            sys.stderr.flush()
            config = _config(options)
            if options.workers == 1:
                Server(config).run([listening])
            else:
                with shared_folder():
                    _Workers(config, [listening]).run()


class _Workers(Multiprocess):
    """Processes that share a port, each started anew where it ends by itself."""

    def terminate_all(self) -> None:
        """End all, once nobody can connect any more: this process listens on the port as well."""
        for listening in self.sockets:
            listening.close()
        super().terminate_all()


class _Stopped(BaseException):
    """A signal to stop, outside the server's own handling."""


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """End quietly at SIGTERM and SIGINT, which uvicorn raises again after it has ended by them."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except _Stopped:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _config(options: Options) -> Config:
    return Config(
        partial(make_app, options),
        factory=True,
        workers=options.workers,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",  # below, every malformed request would be a line
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_SECONDS,
        timeout_worker_healthcheck=60,  # a large bundle may keep a worker busy
    )


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """Open the port that all workers listen on; UserError where that cannot be."""
    where = _address(host, port)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"{where}: cannot listen there ({error.strerror}); see --host") from None
    with listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
        except OSError as error:
            raise UserError(
                f"{where}: cannot listen there ({error.strerror}); give another --host or --port, "
                "or 0 for any free port"
            ) from None
        yield listening


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
