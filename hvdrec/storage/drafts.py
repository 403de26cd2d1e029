"""Drafts: files and directories that are written beside their final path, then renamed to it.

A draft of ``NAME`` is called ``.NAME.XXXXXXXX.partial``, where the Xs are random. Its writer holds
a lock: on the draft itself if the draft is a file, on ``.NAME.XXXXXXXX.lock`` if the draft is a
directory. The operating system releases the lock when the writer ends, even if it is killed. So the
next writer can tell whether a draft is still being written or was left behind, also on network file
systems.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hvdrec.errors import write_errors_named

LEFTOVER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}(?P<suffix>\.partial|\.old|\.lock|)")
"""Names of drafts, of locks, and of replaced files that are moved aside for a moment."""
UNLOCKED_SECONDS = 86_400.0
"""If the file system has no locks, a draft unchanged for this long counts as left behind."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def draft_directory(path: Path) -> Iterator[Path]:
    """Yield a new directory; when the ``with`` body ends without error, sync and move it to `path`.

    A directory at `path` is replaced. After an error the new directory is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with scratch_directory(path) as draft:
        yield draft
        for entry in (*draft.rglob("*"), draft):
            _sync(entry)
        _replace(draft, path)
        _sync(path.parent)


@contextmanager
def scratch_directory(path: Path, mode: int = 0o777) -> Iterator[Path]:
    """Yield a new directory beside `path`; remove it at the end, unless it was moved.

    First remove directories that killed writers left behind for the same `path`.
    """
    remove_leftovers(path.parent, path.name)
    lock, descriptor = _create_locked(path, ".lock")
    draft = lock.with_suffix(".partial")
    try:
        draft.mkdir(mode)
        yield draft
    finally:
        _remove(draft)
        _remove(lock)
        os.close(descriptor)


@contextmanager
def draft_file(path: Path) -> Iterator[Path]:
    """Yield an empty new file; when the ``with`` body ends without error, move it to `path`.

    The file is synced to disk before it is moved. After an error the new file is removed.

    Raises:
        UserError: The disk is full, or writing is not permitted.
    """
    with write_errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        draft, descriptor = _create_locked(path, ".partial")
        try:
            yield draft
            os.fsync(descriptor)
            draft.replace(path)
            _sync(path.parent)
        finally:
            draft.unlink(missing_ok=True)
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is always complete: either the old or the new text.

    Raises:
        UserError: The disk is full, or writing is not permitted.
    """
    with draft_file(path) as draft:
        draft.write_text(text)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the drafts that killed writers left in a folder; keep those of running writers.

    If a writer was killed after it had moved an old artifact aside, the artifact is moved back.

    Args:
        folder: The folder; it need not exist.
        name: Remove only drafts of this final name; None for all drafts.
    """
    with suppress(OSError):
        for entry in sorted(folder.iterdir()):
            match = LEFTOVER.fullmatch(entry.name)
            if match is None or name not in (None, match["name"]):
                continue
            with _left_behind(entry) as is_left:
                if is_left and match["suffix"] == ".old" and not (folder / match["name"]).exists():
                    entry.rename(folder / match["name"])
                elif is_left:
                    _remove(entry)


@contextmanager
def _left_behind(entry: Path) -> Iterator[bool]:
    """Yield True if the writer of a draft has ended; hold the draft's lock in the ``with`` body."""
    lock = entry.with_suffix(".lock") if entry.is_dir() and not entry.is_symlink() else entry
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        # There is no lock: an earlier version wrote the draft, or the lock was removed already.
        yield lock != entry and not lock.exists()
        return
    try:
        locked = _lock(descriptor, wait=False)
        yield _age(entry) > UNLOCKED_SECONDS if locked is None else locked
    finally:
        os.close(descriptor)


def _create_locked(path: Path, suffix: str) -> tuple[Path, int]:
    """Create a file beside `path` and lock it; return its path and its open descriptor."""
    while True:
        file = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{suffix}")
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        _lock(descriptor, wait=True)
        # Another process may have removed the file between its creation and the lock.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return file, descriptor
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool | None:
    """Lock a file; return False if another process holds the lock, None if there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _age(entry: Path) -> float:
    """Return the seconds since a draft, or a file in it, was last changed."""
    times = [each.stat().st_mtime for each in (entry, *entry.rglob("*"))]
    return time.time() - max(times)


def _replace(draft: Path, path: Path) -> None:
    """Move a draft to its final path; whatever was there takes the draft's name or is removed."""
    if not path.exists():
        draft.rename(path)
    elif not _exchange(draft, path):
        old = draft.with_suffix(".old")
        path.rename(old)
        try:
            draft.rename(path)
        finally:
            if not path.exists():
                old.rename(path)
            _remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one atomic step; return False if the system does not support that."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    return bool(rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        with suppress(OSError):
            entry.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file or a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
