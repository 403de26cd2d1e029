"""Artifact directories that are there whole or not at all.

An artifact is written beside its final place, each file gets a SHA-256 in ``manifest.json``,
everything is synced to disk, and the directory is renamed into place last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hvdrec import __version__
from hvdrec.errors import UserError, choices

MANIFEST = "manifest.json"
FORMATS = {"bundle": 2}
"""Format versions that are not 1, by kind of artifact."""


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` of an artifact says.

    ``files`` maps a path relative to the directory (POSIX separators) to its SHA-256 and its
    size in bytes; ``meta`` is what the writing stage wanted to tell its readers.
    """

    kind: str
    meta: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    format: int
    written_by: str = __version__


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def write_artifact(
    path: Path, kind: str, meta: dict[str, Any] | None = None, *, overwrite: bool = False
) -> Iterator[Path]:
    """Yield an empty directory to fill; on a clean exit it becomes ``path``, else it vanishes.

    ``meta`` may be filled while writing: it is read on exit. With ``overwrite`` an artifact of the
    same kind that stands at ``path`` is replaced, after the new one is complete.
    Raises UserError where ``path`` is taken.
    """
    path = Path(path)
    _refuse_taken(path, kind, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    draft.mkdir()
    try:
        yield draft
        write_manifest(draft, kind, meta or {})
        _sync_tree(draft)
        _rename_into_place(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_manifest(directory: Path, kind: str, meta: Mapping[str, Any]) -> None:
    """List what a directory holds in its manifest, as `write_artifact` does on exit."""
    files = {
        file.relative_to(directory).as_posix(): {
            "sha256": sha256(file),
            "bytes": file.stat().st_size,
        }
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file != directory / MANIFEST
    }
    manifest = {
        "kind": kind,
        "format": FORMATS.get(kind, 1),
        "written_by": __version__,
        "meta": dict(meta),
        "files": files,
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=False) + "\n")


def read_manifest(path: Path, kind: str) -> Manifest:
    """Read and check the manifest of the artifact at ``path``.

    Raises UserError if there is none, if it is damaged, of another kind or a newer format, or if
    a file it lists lies outside the directory or is missing or has another size.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise UserError(
            f"{path}: no {kind} artifact here ({MANIFEST} is missing); run the stage that writes it"
        )
    try:
        raw = json.loads(file.read_text())
        manifest = Manifest(
            raw["kind"], raw["meta"], raw["files"], raw["format"], raw["written_by"]
        )
        _require_types(manifest)
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: damaged manifest ({error}); write the artifact again") from None
    if manifest.kind != kind:
        raise UserError(f"{path}: is a '{manifest.kind}' artifact, expected '{kind}'")
    known = FORMATS.get(kind, 1)
    if manifest.format > known:
        raise UserError(
            f"{file}: format {manifest.format} is newer than this hvdrec reads ({known}); upgrade"
        )
    for name, facts in manifest.files.items():
        target = Path(path) / _safe_relative(name, file)
        if not target.is_file():
            raise UserError(f"{target}: listed in {MANIFEST} but missing; write the artifact again")
        if target.stat().st_size != facts["bytes"]:
            raise UserError(
                f"{target}: {target.stat().st_size} bytes, {MANIFEST} says {facts['bytes']}; "
                "write the artifact again"
            )
    return manifest


def verify_artifact(path: Path, kind: str) -> Manifest:
    """Compare every file with the manifest's SHA-256; UserError on the first difference."""
    manifest = read_manifest(path, kind)
    for name, facts in manifest.files.items():
        if sha256(Path(path) / name) != facts["sha256"]:
            raise UserError(
                f"{Path(path) / name}: contents differ from {MANIFEST}; write the artifact again"
            )
    return manifest


def write_text(path: Path, text: str) -> None:
    """Write a small file whole: beside its place, synced, then renamed."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    _sync_directory(path.parent)


def _refuse_taken(path: Path, kind: str, overwrite: bool) -> None:
    if not path.exists():
        return
    if not overwrite:
        raise UserError(f"{path}: already exists; pass --overwrite to replace it")
    if path.is_dir() and not any(path.iterdir()):
        return
    if not (path / MANIFEST).is_file():
        raise UserError(
            f"{path}: exists and is no hvdrec artifact (no {MANIFEST}); choose another place"
        )
    try:
        found = json.loads((path / MANIFEST).read_text())["kind"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        found = kind  # a damaged artifact may be replaced
    if found != kind:
        raise UserError(f"{path}: holds a '{found}' artifact; only {choices([kind])} is replaced")


def _require_types(manifest: Manifest) -> None:
    """Raise TypeError or KeyError where a manifest's values are not what they should be."""
    expected = [
        ("kind", manifest.kind, str),
        ("format", manifest.format, int),
        ("meta", manifest.meta, dict),
        ("files", manifest.files, dict),
    ]
    for name, facts in manifest.files.items() if isinstance(manifest.files, dict) else ():
        expected += [(name, facts["sha256"], str), (name, facts["bytes"], int)]
    for name, value, kind in expected:
        if not isinstance(value, kind):
            raise TypeError(f"'{name}' holds {value!r}")


def _safe_relative(name: str, manifest: Path) -> PurePosixPath:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise UserError(
            f"{manifest}: file name '{name}' leaves the directory; do not use this artifact"
        )
    return relative


def _sync_tree(directory: Path) -> None:
    for entry in directory.rglob("*"):
        if entry.is_file():
            with entry.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_directory(entry)
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_into_place(draft: Path, path: Path) -> None:
    aside: Path | None = None
    if path.exists():
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
        path.rename(aside)
    draft.rename(path)
    _sync_directory(path.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)
