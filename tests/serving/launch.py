"""Starting `hvdrec serve` as its users do, and stopping it."""

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
    """A service that answers."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        """Return where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send the signal to this process and return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(LIMIT)


@contextlib.contextmanager
def serving(bundle: Path, *options: str, is_awaited: bool = True) -> Iterator[Running]:
    """Serve a bundle on a free port; ready when this yields, if that is awaited."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*COMMAND, str(bundle), "--port", "0", *options], stdout=file, stderr=file
            )
        try:
            port = int(
                wait_for(lambda: re.search(r"http://127.0.0.1:(\d+)", told(log, process)))[1]
            )
            running = Running(port, process, log)
            wait_for(lambda: told(log, process) and (not is_awaited or is_ready(running.url)))
            yield running
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(LIMIT)


def wait_for(condition: Callable[[], T | None]) -> T:
    """Return what a condition gives as soon as that is true; fail if that takes too long."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {LIMIT:g} s")


def told(log: Path, process: subprocess.Popen[bytes]) -> str:
    """Return what a service has written so far; fail if it has ended."""
    text = log.read_text()
    assert process.poll() is None, text
    return text


def is_ready(url: str) -> bool:
    """Return whether a service says that it is ready."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/readyz").is_success
    return False


def refused(*arguments: str) -> str:
    """Return the one line with which `hvdrec serve` ends by a mistake in its arguments."""
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    return done.stderr.rstrip("\n")
