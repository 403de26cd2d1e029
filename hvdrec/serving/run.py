"""Processes of the service: one port, one or several workers, a shutdown that loses no request."""

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

from hvdrec.errors import UserError, invalid_file
from hvdrec.serving.app import make_app
from hvdrec.serving.metrics import shared_folder
from hvdrec.serving.options import Options
from hvdrec.serving.served import open_scorer

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75
"""Longer than load balancers keep idle connections, so that they close them first."""
SHUTDOWN_SECONDS = 30
"""Time for requests in progress to finish after the signal to stop."""


def run(options: Options) -> None:
    """Serve a bundle until SIGTERM or SIGINT; see `hvdrec.serving.serve`."""
    with _stopped_by_signals():
        scorer = open_scorer(options)
        with _listening(options.host, options.port) as listener:
            name, version = scorer.info.name, scorer.version
            del scorer  # each worker opens its own
            workers = f"{options.workers} worker{'s' if options.workers > 1 else ''}"
            address = _address(options.host, listener.getsockname()[1])
            print(f"serving {name} {version} on http://{address} with {workers}", file=sys.stderr)
            sys.stderr.flush()
            config = _config(options)
            if options.workers == 1:
                Server(config).run([listener])
            else:
                with shared_folder():
                    _Workers(config, [listener]).run()


class _Workers(Multiprocess):
    """Worker processes that share a port; a worker that dies is restarted."""

    def terminate_all(self) -> None:
        """Stop all workers, after closing the port: this process listens on it too."""
        for listener in self.sockets:
            listener.close()
        super().terminate_all()


class _Stopped(BaseException):
    """A signal to stop arrived outside uvicorn's own handling."""


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """End the body quietly on SIGTERM and SIGINT, which uvicorn raises again after it stopped."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped

    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except _Stopped:
        pass
    finally:
        for number, handler in previous.items():
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
        log_level="error",  # at lower levels every malformed request is logged
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        timeout_worker_healthcheck=60,  # loading a large bundle may block a worker this long
    )


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Bind the port that all workers share; UserError if it is not available."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = addresses[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _unavailable(host, port, error, "see --host") from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            remedy = "give another --host or --port; --port 0 takes a free port"
            raise _unavailable(host, port, error, remedy) from None
        yield listener


def _unavailable(host: str, port: int, error: OSError, remedy: str) -> UserError:
    return invalid_file(_address(host, port), f"cannot listen here ({error.strerror})", remedy)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
