"""A Redis server for tests: on a free loopback port, in a scratch directory."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

SECONDS = 60.0


class RedisProcess:
    """A server that can be started, killed and restarted with its saved data."""

    def __init__(self, folder: Path, *options: str) -> None:
        program = shutil.which("redis-server")
        assert program is not None, "no redis-server; apt-get install redis-server"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        fixed = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(folder)]
        fixed += ["--repl-diskless-sync-delay", "0"]
        # Saves only on command.
        self._command = [program, *fixed, "--save", "", *options]
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def client(self, **options: Any) -> Any:
        """Return a client for the test to use."""
        return redis.Redis(
            port=self.port, socket_timeout=SECONDS, retry=Retry(NoBackoff(), 0), **options
        )

    def start(self) -> None:
        """Start the server and wait until it replies."""
        assert self._process is None
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                self.client().ping()
            except redis.AuthenticationError:
                return
            except redis.ConnectionError:
                assert self._process.poll() is None, self._log.read_text()
                assert time.monotonic() < deadline, self._log.read_text()
                time.sleep(0.01)
            else:
                return

    def kill(self) -> None:
        """Kill the server."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Stop the server from replying; connections stay open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Resume a frozen server."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
