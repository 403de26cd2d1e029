"""Check that all ranks use the same configuration, see the same files and share directories."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvdrec.errors import invalid_file
from hvdrec.parallel import agreement, ranks
from hvdrec.storage.urls import Location

VISIBILITY_SECONDS = 5.0
"""How long a network file system may take to show a file that another host has written."""


def require_same_config(config: Mapping[str, Any]) -> None:
    """Raise SharedError if the ranks' configurations differ; the error names fields and hosts.

    All ranks must call this at the same time.
    """
    text = json.dumps(config, sort_keys=True)
    if len(set(ranks.gather_objects(hashlib.sha256(text.encode()).hexdigest()))) > 1:
        configs = ranks.gather_objects(json.loads(text))
        message = agreement.config_differences(configs, ranks.current().hosts)
        if message is not None:
            ranks.raise_shared(message)


def require_same_files(path: Location, remedy: str) -> None:
    """Raise SharedError if ranks see different content at a path; the error names the hosts.

    All ranks must call this at the same time. The message ends with `remedy`.
    """
    digests = ranks.gather_objects(ranks.run_on_all(lambda: agreement.digest(path)))
    difference = agreement.describe_difference(digests, ranks.current().hosts)
    if difference is not None:
        ranks.raise_shared(f"{path}: differs between hosts: {difference}; {remedy}", str(path))


def require_shared_directory(path: Path, reason: str) -> None:
    """Raise SharedError if a rank does not see rank 0's directory; the error names ranks and hosts.

    All ranks must call this at the same time. Rank 0 creates a file in the directory, or in the
    nearest parent that exists, and all ranks look for it. A host that has its own directory at this
    path does not see the file. The message includes `reason`, which says why the directory must be
    shared.
    """
    world = ranks.current()
    if world.size == 1:
        return
    existing = next(each for each in (path, *path.absolute().parents) if each.is_dir())
    file = Path(ranks.broadcast_object(str(existing / f".seen-{secrets.token_hex(8)}")))
    ranks.run_on_all(lambda: _create(file) if world.is_first else None)
    try:
        ranks.run_on_all(lambda: _look_for(file, path, f"{reason}: share it with {world.hosts[0]}"))
    finally:
        if world.is_first:
            file.unlink(missing_ok=True)


def _create(file: Path) -> None:
    try:
        file.touch()
    except OSError as error:
        raise invalid_file(file.parent, f"cannot be written ({error.strerror})") from None


def _look_for(file: Path, path: Path, remedy: str) -> None:
    deadline = time.monotonic() + VISIBILITY_SECONDS
    while not _is_listed(file):
        if time.monotonic() > deadline:
            raise invalid_file(path, "is not the directory of rank 0", remedy)
        time.sleep(0.1)


def _is_listed(file: Path) -> bool:
    # On a network file system, `exists` may read a cache, but a listing comes from the server.
    try:
        return any(entry.name == file.name for entry in file.parent.iterdir())
    except OSError:
        return False
