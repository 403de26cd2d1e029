"""Starts and stops `hvdrec serve` as a program."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx

COMMAND = [str(Path(sys.executable).with_name("hvdrec")), "serve"]
LIMIT = 60.0
T = TypeVar("T")


@dataclass(frozen=True)
class Running:
    """A running service."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        """Address of the service."""
        return f"http://127.0.0.1:{self.port}"

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal to the process and return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(LIMIT)


@contextlib.contextmanager
def serving(bundle: Path, *options: str, is_awaited: bool = True) -> Iterator[Running]:
    """Serve a bundle on a free port; if ``is_awaited``, wait until it is ready."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*COMMAND, str(bundle), "--port", "0", "--drain", "0", *options],
                stdout=file,
                stderr=file,
            )
        try:
            port = int(
                wait_for(lambda: re.search(r"http://127.0.0.1:(\d+)", log_text(log, process)))[1]
            )
            running = Running(port, process, log)
            wait_for(lambda: log_text(log, process) and (not is_awaited or is_ready(running.url)))
            yield running
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(LIMIT)


def wait_for(condition: Callable[[], T | None]) -> T:
    """Return the first true value of a condition; fail after a minute."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.02)
    raise AssertionError(f"not within {LIMIT:g} s")


def log_text(log: Path, process: subprocess.Popen[bytes]) -> str:
    """Return the output of a service so far; fail if it has exited."""
    text = log.read_text()
    assert process.poll() is None, text
    return text


def is_ready(url: str) -> bool:
    """Return True if a service reports that it is ready."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/readyz").is_success
    return False


def refused(*arguments: str) -> str:
    """Run `hvdrec serve` with invalid arguments and return its one-line error."""
    result = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    return result.stderr.rstrip("\n")
