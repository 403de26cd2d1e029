"""Compare a bundle's files with the checksums in its manifest, on several threads.

The manifest holds a SHA-256 of each file. For a file larger than `BLOCK_BYTES` it also holds a tree
checksum: each block of the file is hashed alone, then the digests of the blocks are hashed. So
several threads can hash one file at the same time; hashlib and `readinto` release Python's global
lock.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdrec.scoring.errors import BundleError, first_line, invalid_bundle

BLOCK_BYTES = 4 << 20
READ_BYTES = 1 << 18
"""Bytes of one read: few enough to be in the processor's cache still when they are hashed."""
MOST_THREADS = 8
SPARSE_BYTES = 1 << 30
"""A larger file that consists almost entirely of holes (a sparse file) is refused: it takes no disk
space, but reading it could take hours."""
MOST_HOLES = 10_000
CHECKSUM = "checksum"
"""Key under which a manifest stores the checksum of its other keys."""


@dataclass(frozen=True)
class FileFacts:
    """Size and checksums of a file, as listed in the manifest."""

    size: int
    """Size in bytes."""
    sha256: str
    """Hexadecimal SHA-256 of the contents."""
    tree: str = ""
    """Hexadecimal tree checksum; empty for a small file and in bundles of earlier versions."""


@dataclass(frozen=True)
class _Part:
    """Range of a file that one thread hashes: a block, or the whole file."""

    name: str
    start: int
    size: int


def check_files(folder: Path, files: Mapping[str, FileFacts]) -> None:
    """Read every file once and compare its contents with its checksum.

    Reading fills the operating system's page cache, so arrays that are memory-mapped afterwards
    need no further disk access.

    Raises:
        BundleError: A file cannot be read or its contents differ.
    """
    for name, facts in files.items():
        if facts.size > SPARSE_BYTES and _stored_bytes(folder / name, facts.size) < facts.size / 64:
            raise invalid_bundle(
                folder / name, f"is sparse: most of its {facts.size} bytes are holes"
            )
    parts = [part for name, facts in files.items() for part in _parts(name, facts)]
    digests = _digests(folder, parts)
    by_name: dict[str, list[bytes]] = {name: [] for name in files}
    for part in parts:
        by_name[part.name].append(digests[part])
    for name, facts in files.items():
        blocks = by_name[name]
        actual = hashlib.sha256(b"".join(blocks)).hexdigest() if facts.tree else blocks[0].hex()
        if actual != (facts.tree or facts.sha256):
            raise invalid_bundle(folder / name, "contents differ from the manifest")


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Compare a parsed manifest with the checksum in it; one without a checksum is accepted.

    Raises:
        ValueError: The checksum differs.
    """
    if CHECKSUM not in manifest:
        return
    plain = {key: value for key, value in manifest.items() if key != CHECKSUM}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    if hashlib.sha256(text.encode()).hexdigest() != manifest[CHECKSUM]:
        raise ValueError("its contents differ from its checksum")


def _parts(name: str, facts: FileFacts) -> Iterator[_Part]:
    step = BLOCK_BYTES if facts.tree else max(facts.size, 1)
    for start in range(0, max(facts.size, 1), step):
        yield _Part(name, start, min(step, facts.size - start))


def _stored_bytes(file: Path, size: int) -> int:
    """Return how many bytes of a file are outside its holes; ``size`` if it has very many holes."""
    if not hasattr(os, "SEEK_HOLE"):
        return size
    stored = end = 0
    with file.open("rb") as opened:
        for _ in range(MOST_HOLES):
            try:
                start = os.lseek(opened.fileno(), end, os.SEEK_DATA)
                end = os.lseek(opened.fileno(), start, os.SEEK_HOLE)
            except OSError as error:  # no more data, or a file system that does not report holes
                return stored if error.errno == errno.ENXIO else size
            stored += end - start
    return size


def _digests(folder: Path, parts: list[_Part]) -> dict[_Part, bytes]:
    """Return the digest of each part; if reading fails, raise the first error."""
    digests: dict[_Part, bytes] = {}
    errors: list[BundleError] = []
    waiting = deque(parts)

    def work() -> None:
        with suppress(IndexError):
            while not errors:
                part = waiting.popleft()
                try:
                    digests[part] = _digest(folder, part)
                except BundleError as error:
                    errors.append(error)

    threads = [
        threading.Thread(target=work, name="hvdrec-hash")
        for _ in range(min(MOST_THREADS, os.cpu_count() or 1, len(parts)) - 1)
    ]
    started = []
    with suppress(RuntimeError):  # the interpreter is ending: this thread does all the work
        for thread in threads:
            thread.start()
            started.append(thread)
    work()
    for thread in started:
        thread.join()
    if errors:
        raise errors[0]
    return digests


def _digest(folder: Path, part: _Part) -> bytes:
    file = folder / part.name
    digest, left = hashlib.sha256(), part.size
    buffer = memoryview(bytearray(min(READ_BYTES, max(left, 1))))
    try:
        with file.open("rb", buffering=0) as opened:
            opened.seek(part.start)
            while left and (size := opened.readinto(buffer[: min(left, READ_BYTES)])):
                digest.update(buffer[:size])
                left -= size
    except OSError as error:
        problem = f"cannot be read ({first_line(error)})"
        raise invalid_bundle(file, problem, "check its permissions") from None
    return digest.digest()
