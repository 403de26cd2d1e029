"""Run the processes of the service, one or several workers that share a port, and stop them."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import time
from collections.abc import Iterator
from functools import partial
from types import FrameType

from uvicorn import Config, Server
from uvicorn.supervisors import Multiprocess

from hvdrec.errors import UserError, invalid_file
from hvdrec.serving.app import make_app
from hvdrec.serving.http_protocol import KEEP_ALIVE_SECONDS, GuardedProtocol
from hvdrec.serving.metrics import shared_folder
from hvdrec.serving.options import Options
from hvdrec.serving.served import open_scorer
from hvdrec.serving.stopping import SIGNALS, StopSignals, drop_new_connections

BACKLOG = 2048
SHUTDOWN_SECONDS = 30
"""Longest time that requests in progress may take to finish after new ones are no longer
accepted."""


def run(options: Options) -> None:
    """Serve a bundle until SIGTERM or SIGINT; see `hvdrec.serving.serve`."""
    with _stopped_by_signals():
        scorer = open_scorer(options)
        with _listening(options.host, options.port) as listener:
            name, version = scorer.info.name, scorer.version
            del scorer  # each worker opens the bundle itself
            workers = f"{options.workers} worker{'s' if options.workers > 1 else ''}"
            address = _address(options.host, listener.getsockname()[1])
            print(f"serving {name} {version} on http://{address} with {workers}", file=sys.stderr)
            sys.stderr.flush()
            if options.workers == 1:
                Server(_config(options, listener)).run([listener])
            else:
                with shared_folder():
                    _Workers(_config(options), listener, options.drain).run()


HEALTH_SECONDS, PING_SECONDS = 60, 0.5
"""How long a worker may fail to answer its parent process, since loading a large bundle may block
it; and how long the parent waits for one answer."""


class _Workers(Multiprocess):
    """Worker processes that share a port; a worker that dies is restarted."""

    def __init__(self, config: Config, listener: socket.socket, drain: float) -> None:
        super().__init__(config, [listener])
        self._listener = listener
        self._drain = drain
        self._signals = StopSignals()
        self._killed_by = 0
        for number in SIGNALS:
            signal.signal(number, self._stop)

    def run(self) -> None:
        """Run until a signal to stop; raise SystemExit if a second signal killed the workers."""
        super().run()
        if self._killed_by:
            raise SystemExit(128 + self._killed_by)

    def keep_subprocess_alive(self) -> None:
        """Restart workers that died or do not answer, unless a signal to stop arrives meanwhile.

        uvicorn's own check waits for the answer of a worker even if the worker has ended. A stop
        would then wait as long, with connections that nobody accepts.
        """
        end = time.monotonic() + HEALTH_SECONDS
        for worker in self.processes:
            while not (answers := worker.is_alive(PING_SECONDS)):
                if self.signal_queue:
                    return
                if not worker.process.is_alive() or time.monotonic() > end:
                    break
            if not answers:
                super().keep_subprocess_alive()
                return

    def terminate_all(self) -> None:
        """Stop all workers; close the port in this process just before the workers close it."""
        super().terminate_all()
        end = time.monotonic() + self._drain
        while not self._killed_by and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        drop_new_connections(self._listener)
        self._listener.close()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._signals.is_first():
            self.signal_queue.append(number)
        elif self._signals.is_second():
            self._killed_by = number
            for worker in self.processes:
                worker.process.kill()


class _Stopped(BaseException):
    """A signal to stop arrived while uvicorn was not handling signals."""


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """End the ``with`` body on SIGTERM or SIGINT; uvicorn raises the signal again as it stops."""

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


def _config(options: Options, listener: socket.socket | None = None) -> Config:
    return Config(
        partial(make_app, options, listener),
        factory=True,
        workers=options.workers,
        loop="uvloop",
        http=partial(GuardedProtocol, options),  # type: ignore[arg-type]  # builds a protocol
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
        timeout_worker_healthcheck=HEALTH_SECONDS,
    )


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Bind the port that all workers share; raise UserError if it is not available."""
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
