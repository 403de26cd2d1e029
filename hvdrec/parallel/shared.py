"""Whether the hosts of a job share a directory."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from hvdrec.errors import UserError
from hvdrec.parallel import ranks

PATIENCE_SECONDS = 5.0
"""How long a network file system may take to show what another host has written."""


def shared_directory(path: Path, reason: str) -> None:
    """Raise SharedError, which names ranks and hosts, unless all see the first rank's directory.

    Every rank calls this. One that has its own directory at the same path does not see the first
    one's: what is looked for is a file that the first rank has made just now, in the directory or,
    where that is still to be made, in what it will be made in.
    """
    world = ranks.current()
    if world.size == 1:
        return
    there = next(each for each in (path, *path.absolute().parents) if each.is_dir())
    file = Path(ranks.broadcast_object(str(there / f".seen-{secrets.token_hex(8)}")))
    ranks.together(lambda: _write(file) if world.is_first else None)
    try:
        ranks.together(lambda: _look(file, path, f"{reason}: share it with {world.hosts[0]}"))
    finally:
        if world.is_first:
            file.unlink(missing_ok=True)


def _write(file: Path) -> None:
    try:
        file.touch()
    except OSError as error:
        raise UserError(f"{file.parent}: cannot be written to ({error.strerror})") from None


def _look(file: Path, path: Path, remedy: str) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not _is_listed(file):
        if time.monotonic() > until:
            raise UserError(f"{path}: is not the directory of rank 0; {remedy}")
        time.sleep(0.1)


def _is_listed(file: Path) -> bool:
    # A look into the directory is answered by the server, a look for a file from memory.
    try:
        return any(entry.name == file.name for entry in file.parent.iterdir())
    except OSError:
        return False
