"""Where features and bundles may lie: directories of this machine, or what fsspec reaches by URL.

``file://`` is a directory like any other. Elsewhere there is no rename and no lock: see `artifacts`
for what holds there all the same. How a store is reached (address, credentials) is told to fsspec
or to the store's own client by their files and variables (AWS_ENDPOINT_URL, FSSPEC_S3_KEY, ...).

A store that does not answer is asked again, with growing pauses, for `PATIENCE` seconds.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hvdrec.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

PATIENCE = 180.0
"""Seconds after which a store that does not answer is given up."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0
EXTRAS = {"s3": "s3", "s3a": "s3"}
"""Protocols whose client is an extra of hvdrec."""
FINAL_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
CLIENTS = ("aiobotocore", "aiohttp", "asyncio", "botocore", "fsspec", "requests", "urllib3")
"""Libraries whose own exceptions tell that a store did not answer..."""
FINAL_NAMES = ("Credential", "Profile", "Region", "Validation")
"""...unless their names hold one of these."""

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Url:
    """A place in a store; it does what readers of artifacts ask of a `pathlib.Path`.

    Raises UserError where the store cannot be reached, refuses, or needs a package that is absent.
    """

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text}/{name}")

    @property
    def name(self) -> str:
        return self.text.rsplit("/", 1)[-1]

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The file system, and the path in it. Listings are never remembered: others write, too."""
        from fsspec.core import url_to_fs

        protocol = self.text.split("://", 1)[0]
        try:
            filesystem, path = url_to_fs(self.text, use_listings_cache=False)
        except ImportError as error:
            extra = EXTRAS.get(protocol)
            remedy = f"install hvdrec[{extra}]" if extra else str(error)
            raise UserError(
                f"{self.text}: the client for {protocol}:// is absent; {remedy}"
            ) from None
        except ValueError as error:
            raise UserError(f"{self.text}: no store can be reached by it ({error})") from None
        return filesystem, path

    @property
    def filesystem(self) -> Any:
        """The fsspec file system."""
        return self._opened[0]

    @property
    def path(self) -> str:
        """The path in the file system."""
        return self._opened[1]

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def _kind(self) -> str | None:
        try:  # fsspec's own isfile takes a store that does not answer for a file that is not there
            return str(retried(lambda: self.filesystem.info(self.path), self.text)["type"])
        except FileNotFoundError:
            return None

    def read_bytes(self) -> bytes:
        return retried(lambda: bytes(self.filesystem.cat_file(self.path)), self.text)

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, contents: bytes) -> None:
        retried(lambda: self.filesystem.pipe_file(self.path, contents), self.text)

    def upload(self, file: Path) -> None:
        """Put a file of this machine here."""
        retried(lambda: self.filesystem.put_file(str(file), self.path), self.text)

    def download(self, file: Path) -> None:
        """Get what lies here into a file of this machine."""
        retried(lambda: self.filesystem.get_file(self.path, str(file)), self.text)

    def remove(self) -> None:
        """Remove a file, if it is there."""
        try:
            retried(lambda: self.filesystem.rm_file(self.path), self.text)
        except FileNotFoundError:
            return

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file below, by its path from here."""
        found = retried(lambda: self.filesystem.find(self.path, detail=True), self.text)
        start = len(self.path.rstrip("/")) + 1
        return {name[start:]: int(facts["size"]) for name, facts in found.items()}

    def glob(self, pattern: str) -> list[Url]:
        """Return the files right here whose names fit a pattern."""
        return [self / name for name in self.sizes() if "/" not in name and fnmatch(name, pattern)]

    def __lt__(self, other: Url) -> bool:
        return self.text < other.text


Place = Path | Url


def version(file: Place) -> str:
    """Return what changes when a file is written again, without reading it."""
    if isinstance(file, Path):
        facts = file.stat()
        return f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ino}"
    return retried(lambda: str(file.filesystem.ukey(file.path)), file)


def is_url(text: str) -> bool:
    """Return whether a text names a place by URL."""
    return "://" in text


def place(text: str) -> Place:
    """Return the place that a path or a URL names."""
    if text.startswith("file://"):
        from fsspec.implementations.local import LocalFileSystem

        return Path(LocalFileSystem._strip_protocol(text))
    return Url(text.rstrip("/")) if is_url(text) else Path(text)


def retried(action: Callable[[], T], what: object, *, stopped: threading.Event | None = None) -> T:
    """Return what an action comes to, tried again while a store does not answer.

    Raises UserError after `PATIENCE` seconds, or where the store refuses; FileNotFoundError and
    what the action raises by itself are not tried again, and nothing is where `stopped` is set.
    """
    began, pause = time.monotonic(), FIRST_PAUSE
    stopped = stopped or threading.Event()
    while True:
        try:
            result = action()
            break
        except Exception as error:
            if not _is_passing(error):
                if isinstance(error, PermissionError) or _is_of_client(error):
                    raise UserError(f"{what}: the store refuses ({_reason(error)})") from None
                raise
            seconds = time.monotonic() - began
            if seconds + pause > PATIENCE:
                raise UserError(
                    f"{what}: cannot be reached, for {seconds:.0f} s by now ({_reason(error)}); "
                    "see that the store is there, and try again"
                ) from None
            log.warning("%s: no answer (%s); again in %.2g s", what, _reason(error), pause)
            if stopped.wait(pause):
                raise
            pause = min(2 * pause, LONGEST_PAUSE)
    if pause > FIRST_PAUSE:
        log.warning("%s: there again after %.1f s", what, time.monotonic() - began)
    return result


def _is_passing(error: Exception) -> bool:
    """Return whether an error may be gone when the same is tried again."""
    if isinstance(error, OSError):
        # Arrow tells of damaged files by plain OSErrors, without a number.
        told = type(error) is not OSError or error.errno is not None
        return told and not isinstance(error, FINAL_ERRORS) and error.errno not in FULL
    name = type(error).__name__
    return _is_of_client(error) and not any(word in name for word in FINAL_NAMES)


def _is_of_client(error: Exception) -> bool:
    return type(error).__module__.split(".")[0] in CLIENTS


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------------------------------- Parquet


def open_in(filesystem: Any, path: str) -> Any:
    """Open a file to be read by Arrow, which knows by itself which bytes it wants."""
    return filesystem.open(path, "rb", cache_type="none")


def read_table(file: Place, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file."""
    import pyarrow.parquet as pq

    names = None if columns is None else list(columns)
    if isinstance(file, Path):
        return pq.read_table(file, columns=names)

    def read() -> pa.Table:
        with (
            open_in(file.filesystem, file.path) as opened,
            pq.ParquetFile(opened, pre_buffer=True) as parquet,
        ):
            return parquet.read(names)

    return retried(read, file)


def read_tables(folder: Place, columns: Sequence[str] | None = None) -> pa.Table:
    """Read all Parquet files of a folder, one behind the other in the order of their names."""
    import pyarrow as pa

    return pa.concat_tables([read_table(file, columns) for file in parquet_files(folder)])


def parquet_files(folder: Place) -> list[Any]:
    """Return the Parquet files of a folder, in the order of their names."""
    return sorted(folder.glob("*.parquet"))


def read_metadata(file: Place, stopped: threading.Event | None = None) -> pq.FileMetaData:
    """Read the footer of a Parquet file."""
    import pyarrow.parquet as pq

    if isinstance(file, Path):
        return pq.read_metadata(file)

    def read() -> pq.FileMetaData:
        with open_in(file.filesystem, file.path) as opened:
            return pq.read_metadata(opened)

    return retried(read, file, stopped=stopped)
