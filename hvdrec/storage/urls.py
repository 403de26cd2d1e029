"""Local paths, and remote locations that fsspec reads and writes by URL.

A ``file://`` URL is a local path. Remote stores have neither renames nor locks; `artifacts`
explains how an artifact stays consistent there. fsspec and the client library of a store read
addresses and credentials from their own configuration files and environment variables
(AWS_ENDPOINT_URL, FSSPEC_S3_KEY, ...).
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from hvdrec.errors import invalid_file

RETRY_SECONDS = 180.0
"""Time for which requests to a store that does not respond are repeated."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0
"""Bounds of the exponential backoff between retries, in seconds."""
EXTRAS = {"s3": "s3", "s3a": "s3"}
"""URL scheme -> extra of hvdrec that installs the client library of the store."""
PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
PERMANENT_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
CLIENTS = ("aiobotocore", "aiohttp", "asyncio", "botocore", "fsspec", "requests", "urllib3")
"""Packages whose exceptions mean that a store did not respond, so that a retry may succeed."""
PERMANENT_NAMES = ("Credential", "Profile", "Region", "Validation")
"""If the name of an exception from `CLIENTS` contains one of these words, there is no retry."""

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, order=True)
class Url:
    """A remote location. Its methods are those of `pathlib.Path` that artifacts need.

    They raise UserError if the store does not respond, denies access or needs a package that is not
    installed.
    """

    text: str

    def __str__(self) -> str:
        """Return the URL."""
        return self.text

    def __truediv__(self, name: str) -> Url:
        """Append a relative path."""
        return Url(f"{self.text}/{name}")

    @property
    def name(self) -> str:
        """Last component of the path."""
        return self.text.rsplit("/", 1)[-1]

    @property
    def parent(self) -> Url:
        """Location without the last component of its path."""
        return Url(self.text.rsplit("/", 1)[0])

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        protocol = self.text.split("://", 1)[0]
        try:
            # Other processes write, too, so listings must not be cached.
            filesystem, path = url_to_fs(self.text, use_listings_cache=False)
        except ImportError as error:
            extra = EXTRAS.get(protocol)
            remedy = f"install hvdrec[{extra}]" if extra else str(error)
            problem = f"the client for {protocol}:// is not installed"
            raise invalid_file(self.text, problem, remedy) from None
        except ValueError as error:
            raise invalid_file(self.text, f"not the URL of a known store ({error})") from None
        return filesystem, path

    @property
    def filesystem(self) -> Any:
        """The fsspec file system of the store."""
        return self._opened[0]

    @property
    def path(self) -> str:
        """Path in the fsspec file system."""
        return self._opened[1]

    def is_file(self) -> bool:
        """Return True if the location is a file."""
        return self._type() == "file"

    def is_dir(self) -> bool:
        """Return True if the location is a directory, or a common prefix of files."""
        return self._type() == "directory"

    def _type(self) -> str:
        # fsspec's isfile returns False if the store does not respond.
        with suppress(FileNotFoundError):
            return str(self._call("info")["type"])
        return ""

    def read_bytes(self) -> bytes:
        """Return the contents of the file."""
        return bytes(self._call("cat_file"))

    def read_text(self) -> str:
        """Return the contents of the file, decoded as UTF-8."""
        return self.read_bytes().decode()

    def upload(self, file: Path) -> None:
        """Copy a local file to this location."""
        retried(lambda: self.filesystem.put_file(str(file), self.path), self.text)

    def download(self, file: Path) -> None:
        """Copy this file to a local path."""
        self._call("get_file", str(file))

    def remove(self) -> None:
        """Remove the file if it exists."""
        with suppress(FileNotFoundError):
            self._call("rm_file")

    def sizes(self) -> dict[str, int]:
        """Return the relative path of every file below this location -> its size in bytes."""
        files = self._call("find", detail=True)
        start = len(self.path.rstrip("/")) + 1
        return {name[start:]: int(facts["size"]) for name, facts in files.items()}

    def glob(self, pattern: str) -> list[Url]:
        """List the files directly below this location whose names match a pattern."""
        return [self / name for name in self.sizes() if "/" not in name and fnmatch(name, pattern)]

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the fsspec file system on this path, with retries."""
        return retried(
            lambda: getattr(self.filesystem, method)(self.path, *arguments, **options), self.text
        )


Location = Path | Url


def as_location(text: str) -> Location:
    """Convert text to a `Url`, or to a `Path` if it is not a remote URL."""
    if text.startswith("file://"):
        from fsspec.implementations.local import LocalFileSystem

        return Path(LocalFileSystem._strip_protocol(text))
    return Url(text.rstrip("/")) if is_url(text) else Path(text)


def is_url(text: str) -> bool:
    """Return True if a text is a URL rather than a path."""
    return "://" in text


def version(file: Location) -> str:
    """Return a text that changes when a file is rewritten, without reading the file."""
    if isinstance(file, Path):
        status = file.stat()
        return f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"
    return str(file._call("ukey"))


def retried(action: Callable[[], T], what: object, *, stopped: threading.Event | None = None) -> T:
    """Call a function; repeat the call while a store does not respond. Return its result.

    Args:
        action: Function to call. Permanent errors, such as FileNotFoundError, are not retried.
        what: Path or URL that is accessed, for messages.
        stopped: Event that ends the retries; then the last error is raised unchanged.

    Raises:
        UserError: The store denies access or has not responded for `RETRY_SECONDS`.
    """
    import tenacity

    began = time.monotonic()
    stopped = stopped or threading.Event()

    def warn(state: tenacity.RetryCallState) -> None:
        reason = _reason(state.outcome.exception()) if state.outcome else ""
        pause = state.upcoming_sleep
        log.warning("%s: no response (%s); retrying in %.2g s", what, reason, pause)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_transient),
        wait=tenacity.wait_exponential(FIRST_PAUSE, LONGEST_PAUSE),
        stop=tenacity.stop_any(
            tenacity.stop_when_event_set(stopped), tenacity.stop_before_delay(RETRY_SECONDS)
        ),
        sleep=tenacity.sleep_using_event(stopped),
        before_sleep=warn,
        reraise=True,
    )
    try:
        result = retrying(action)
    except Exception as error:
        if stopped.is_set():
            raise
        reason = _reason(error)
        if _is_transient(error):
            problem = f"not reachable for {time.monotonic() - began:.0f} s ({reason})"
            raise invalid_file(what, problem, "check the store and run again") from None
        if isinstance(error, PermissionError) or _is_of_client(error):
            raise invalid_file(what, f"the store denies access ({reason})") from None
        raise
    if retrying.statistics["attempt_number"] > 1:
        log.warning("%s: responds again after %.1f s", what, time.monotonic() - began)
    return result


def _is_transient(error: BaseException) -> bool:
    """Return True if a retry may succeed."""
    if isinstance(error, OSError):
        # Arrow reports damaged files, for which a retry is useless, as plain OSErrors without an
        # errno.
        from_system = type(error) is not OSError or error.errno is not None
        permanent = isinstance(error, PERMANENT_ERRORS) or error.errno in PERMANENT_ERRNOS
        return from_system and not permanent
    name = type(error).__name__
    return _is_of_client(error) and not any(word in name for word in PERMANENT_NAMES)


def _is_of_client(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in CLIENTS


def _reason(error: BaseException | None) -> str:
    return " ".join(str(error).split()) or type(error).__name__
