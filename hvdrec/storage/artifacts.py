"""Artifact directories that are either complete or absent.

An artifact is written to a draft directory beside its final path, each file gets a SHA-256 in
``manifest.json``, everything is synced to disk, and the directory is renamed last.

Remote stores have no rename. There an artifact is written to a local directory and uploaded, its
manifest last; an artifact that is replaced loses its manifest first. A directory without a manifest
counts as absent. Who reads an artifact while it is replaced may get files of the other version,
which sizes and checksums reveal. During an upload the store holds ``manifest.json.draft``, so
that the next writer may replace what an interrupted one left behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hvdrec import __version__
from hvdrec.errors import UserError, choices, invalid_file, write_errors_named
from hvdrec.storage.tree_checksum import tree_facts
from hvdrec.storage.urls import Location, Url

MANIFEST = "manifest.json"
DRAFT_MANIFEST = f"{MANIFEST}.draft"
FORMATS = {"bundle": 2}
"""Kind of artifact -> format version, where it is not 1."""
REWRITE = "write the artifact again"
DECODE_ERRORS = (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError)
"""Errors that a manifest of damaged or unexpected contents raises."""


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``.

    Attributes:
        kind: Kind of the artifact, such as "samples".
        meta: Facts that the writing stage left for its readers.
        files: Relative POSIX path of each file -> its "sha256" and its size in "bytes".
        format: Version of the format of this kind of artifact.
        written_by: Version of hvdrec that wrote it.
    """

    kind: str
    meta: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    format: int
    written_by: str = __version__


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def write_artifact(
    path: Location, kind: str, meta: dict[str, Any] | None = None, *, overwrite: bool = False
) -> Iterator[Path]:
    """Yield an empty directory that becomes the artifact on a clean exit and else is removed.

    `meta` is read on exit, so the caller may fill it meanwhile. `overwrite` replaces an artifact of
    the same kind once the new one is complete.

    Raises:
        UserError: There is something at `path` that may not be replaced.
    """
    _require_free(path, kind, overwrite)
    if isinstance(path, Url):
        with tempfile.TemporaryDirectory(prefix="hvdrec-") as folder:
            yield Path(folder)
            write_manifest(Path(folder), kind, meta or {})
            _upload(Path(folder), path)
        return
    with write_errors_named(path), _drafted(path) as draft:
        yield draft
        write_manifest(draft, kind, meta or {})


def write_manifest(directory: Path, kind: str, meta: Mapping[str, Any]) -> None:
    """Write the manifest of a directory that holds all its files."""
    files = {
        file.relative_to(directory).as_posix(): {
            "sha256": sha256(file),
            "bytes": file.stat().st_size,
            **tree_facts(file, kind),
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
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def read_manifest(path: Location, kind: str) -> Manifest:
    """Read the manifest of an artifact and check that its files exist with their sizes.

    Raises:
        UserError: The manifest is missing, damaged, of another kind or of a newer format, or a file
            is missing, has another size or lies outside the directory.
    """
    return _check_manifest(_read_manifest(path, kind), path, kind)


def verify_artifact(path: Path, kind: str) -> Manifest:
    """Read the manifest of an artifact and compare the SHA-256 of every file.

    Raises:
        UserError: `read_manifest` raises it, or a checksum differs.
    """
    manifest = read_manifest(path, kind)
    for name, facts in manifest.files.items():
        if sha256(path / name) != facts["sha256"]:
            raise invalid_file(path / name, f"contents differ from {MANIFEST}", REWRITE)
    return manifest


def fetch_artifact(source: Location, to: Path, kind: str, *, overwrite: bool = False) -> bool:
    """Copy an artifact to a local directory and verify the SHA-256 of every file.

    The directory is either complete or absent. `overwrite` replaces another artifact of that kind.

    Returns:
        False if `to` already holds this very artifact, so that nothing was copied.

    Raises:
        UserError: `source` is not a valid artifact or changed during the copy, or `to` is taken.
    """
    text = _read_manifest(source, kind)
    manifest = _check_manifest(text, source, kind)
    with suppress(UserError):
        if _read_manifest(to, kind) == text:
            verify_artifact(to, kind)
            return False
    _require_free(to, kind, overwrite)
    with write_errors_named(to), _drafted(to) as draft:
        for name, facts in manifest.files.items():
            file, target = source / name, draft / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file, Url):
                file.download(target)
            else:
                shutil.copyfile(file, target)
            if sha256(target) != facts["sha256"]:
                remedy = f"fetch the {kind} again if it is being replaced, else write it again"
                raise invalid_file(file, f"contents differ from {MANIFEST}", remedy)
        (draft / MANIFEST).write_bytes(text)
    return True


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically: write a draft beside it, sync it, and rename it.

    Raises:
        UserError: The disk is full or may not be written.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with write_errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
            _sync(path.parent)
        finally:
            draft.unlink(missing_ok=True)


def _read_manifest(path: Location, kind: str) -> bytes:
    try:
        return (path / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        problem = f"no {kind} artifact here ({MANIFEST} is missing)"
        raise invalid_file(path, problem, "run the stage that writes it") from None


def _check_manifest(text: bytes, path: Location, kind: str) -> Manifest:
    """Parse a manifest and check it against the files of its directory."""
    file = path / MANIFEST
    try:
        raw = json.loads(text)
        fields = ("kind", "meta", "files", "format", "written_by")
        manifest = Manifest(*(raw[field] for field in fields))
        _require_types(manifest)
    except DECODE_ERRORS as error:
        raise invalid_file(file, f"damaged manifest ({error})", REWRITE) from None
    if manifest.kind != kind:
        raise invalid_file(path, f"is a '{manifest.kind}' artifact, expected '{kind}'")
    known = FORMATS.get(kind, 1)
    if manifest.format > known:
        problem = f"format {manifest.format} is newer than this hvdrec reads ({known})"
        raise invalid_file(file, problem, "upgrade hvdrec")
    sizes = path.sizes() if isinstance(path, Url) else None
    for name, facts in manifest.files.items():
        _require_inside(name, file)
        size = _local_size(path / name) if sizes is None else sizes.get(name)
        if size is None:
            raise invalid_file(path / name, f"listed in {MANIFEST} but missing", REWRITE)
        if size != facts["bytes"]:
            problem = f"{size} bytes, {MANIFEST} says {facts['bytes']}"
            raise invalid_file(path / name, problem, REWRITE)
    return manifest


def _local_size(file: Location) -> int | None:
    return file.stat().st_size if isinstance(file, Path) and file.is_file() else None


def _require_types(manifest: Manifest) -> None:
    """Raise TypeError or KeyError if a value of the manifest has the wrong type."""
    for field, type_ in (("kind", str), ("format", int), ("meta", dict), ("files", dict)):
        value = getattr(manifest, field)
        if not isinstance(value, type_):
            raise TypeError(f"'{field}' is {value!r}")
    for name, facts in manifest.files.items():
        if not (isinstance(facts["sha256"], str) and isinstance(facts["bytes"], int)):
            raise TypeError(f"'{name}' is {facts!r}")


def _require_inside(name: str, manifest: Location) -> None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        problem = f"file name '{name}' leaves the directory"
        raise invalid_file(manifest, problem, "do not use this artifact")


def _require_free(path: Location, kind: str, overwrite: bool) -> None:
    """Raise UserError unless an artifact of this kind may be written to `path`."""
    existing: bytes | None = None
    with suppress(FileNotFoundError, NotADirectoryError):
        existing = (path / MANIFEST).read_bytes()
    if existing is None:
        names = set(path.sizes()) if isinstance(path, Url) else set()
        if DRAFT_MANIFEST in names or not (names or (isinstance(path, Path) and path.exists())):
            return
    if not overwrite:
        raise invalid_file(path, "already exists", "pass --overwrite to replace it")
    if existing is None:
        if isinstance(path, Path) and path.is_dir() and not any(path.iterdir()):
            return
        problem = f"exists and is not an hvdrec artifact (no {MANIFEST})"
        raise invalid_file(path, problem, "choose another path")
    try:
        existing_kind = json.loads(existing)["kind"]
    except DECODE_ERRORS:
        return  # a damaged artifact may be replaced
    if existing_kind != kind:
        problem = f"contains a '{existing_kind}' artifact; only {choices([kind])} may be replaced"
        raise invalid_file(path, problem, "choose another path")


def _upload(draft: Path, url: Url) -> None:
    """Upload a complete directory, its manifest last, and remove files of the old artifact."""
    names = [f.relative_to(draft).as_posix() for f in sorted(draft.rglob("*")) if f.is_file()]
    names.remove(MANIFEST)
    old = _listed_files(url / MANIFEST) | _listed_files(url / DRAFT_MANIFEST)
    (url / DRAFT_MANIFEST).upload(draft / MANIFEST)
    (url / MANIFEST).remove()
    for name in names:
        (url / name).upload(draft / name)
    sizes = url.sizes()
    for name in names:
        if sizes.get(name) != (draft / name).stat().st_size:
            raise invalid_file(url / name, "was not uploaded completely", REWRITE)
    for name in old.intersection(sizes).difference(names):
        (url / name).remove()
    (url / MANIFEST).upload(draft / MANIFEST)
    (url / DRAFT_MANIFEST).remove()


def _listed_files(manifest: Url) -> set[str]:
    """Return the file names in a manifest; none if it is missing or damaged."""
    try:
        names = set(json.loads(manifest.read_bytes())["files"])
    except (FileNotFoundError, *DECODE_ERRORS):
        return set()
    for name in names:
        _require_inside(name, manifest)
    return names


@contextmanager
def _drafted(path: Path) -> Iterator[Path]:
    """Yield a directory beside `path` that is synced and renamed to it on a clean exit."""
    draft = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        draft.mkdir(parents=True)
        yield draft
        for entry in (*draft.rglob("*"), draft):
            _sync(entry)
        old = draft.with_suffix(".old")
        if path.exists():
            path.rename(old)
        draft.rename(path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush a file or a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
