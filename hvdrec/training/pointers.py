"""The files ``latest`` and ``best`` of a run: each names a checkpoint, with a checksum."""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hvdrec.errors import UserError, choices, invalid_file
from hvdrec.parallel.progress import print_line
from hvdrec.storage.artifacts import Manifest, StoredFiles, read_manifest
from hvdrec.storage.drafts import write_text

FOLDER = "checkpoints"
Which = Literal["latest", "best"]
POINTERS: tuple[Which, ...] = ("latest", "best")
NAME = re.compile(r"step-\d{8,}")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, with its directory and its manifest."""

    directory: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """Name of the checkpoint, such as ``step-00000100``."""
        return self.directory.name

    @property
    def metrics(self) -> dict[str, Any]:
        """Validation metrics; empty for a checkpoint in the middle of an epoch."""
        return dict(self.manifest.meta["metrics"])

    @property
    def files(self) -> StoredFiles:
        """Files of the checkpoint, which are verified when they are read."""
        return StoredFiles(self.directory, self.manifest)


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint after a number of steps."""
    return f"step-{step:08d}"


def write_pointer(run: Path, which: Which, name: str) -> None:
    """Write the name of a checkpoint to the file ``latest`` or ``best``."""
    write_text(run / which, f"{name} sha256:{_digest(name)}\n")


def has_checkpoint(run: Path) -> bool:
    """Return True if a run has a checkpoint from which it can be resumed."""
    return (run / "latest").is_file()


def find_checkpoint(run: Path, which: Which) -> Checkpoint:
    """Return the checkpoint that ``latest`` or ``best`` of a run names.

    Without a file ``best``, ``latest`` is used. If the checkpoint that ``latest`` names is missing,
    the newest complete one is returned, and a line says so.

    Raises:
        UserError: There is no checkpoint; the file ``latest`` or ``best`` is damaged; or the
            checkpoint that it names is damaged.
    """
    pointer = next((each for each in (which, "latest") if (run / each).is_file()), None)
    if pointer is None:
        raise invalid_file(run, "holds no checkpoint", "train first: hvdrec train")
    name = _named(run, pointer)
    directory = run / FOLDER / name
    if directory.is_dir():
        return Checkpoint(directory, read_manifest(directory, "checkpoint"))
    complete = _complete(run)
    if pointer == "best" or not complete:
        raise _damaged(run / pointer, f"names '{name}', which is missing", complete)
    newest = complete[-1]
    print_line(
        f"{run / pointer}: names '{name}', which is missing; using {newest.name}, the newest "
        "complete checkpoint"
    )
    return newest


def latest_meta(run: Path) -> dict[str, Any]:
    """Return the ``meta`` of the latest checkpoint's manifest."""
    return dict(find_checkpoint(run, "latest").manifest.meta)


def remove_old(run: Path, keep: int) -> None:
    """Remove old checkpoints; keep the last `keep` and those that ``latest`` and ``best`` name."""
    named = {_named(run, pointer) for pointer in POINTERS if (run / pointer).is_file()}
    names = sorted(path.name for path in (run / FOLDER).glob("step-*"))
    for name in names[:-keep]:
        if name not in named:
            shutil.rmtree(run / FOLDER / name, ignore_errors=True)


def _named(run: Path, pointer: str) -> str:
    """Return the name in ``latest`` or ``best``. Files of earlier versions have no checksum."""
    file = run / pointer
    try:
        name, *checksum = file.read_bytes().decode().split()
    except ValueError:
        name, checksum = "", []
    if NAME.fullmatch(name) and checksum in ([], [f"sha256:{_digest(name)}"]):
        return name
    raise _damaged(file, "is damaged", _complete(run))


def _complete(run: Path) -> list[Checkpoint]:
    """Return the complete checkpoints of a run, sorted by step."""
    found = []
    for directory in sorted((run / FOLDER).glob("step-*")):
        try:
            found.append(Checkpoint(directory, read_manifest(directory, "checkpoint")))
        except UserError:
            continue
    return found


def _damaged(file: Path, problem: str, complete: list[Checkpoint]) -> UserError:
    names = choices(each.name for each in complete)
    remedy = f"write one of {names} into it" if complete else "train again with --overwrite"
    return invalid_file(file, problem, remedy)


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:8]
