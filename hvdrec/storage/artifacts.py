"""Artifact directories that are there whole or not at all.

An artifact is written beside its final place, each file gets a SHA-256 in ``manifest.json``,
everything is synced to disk, and the directory is renamed into place last.

A store that is reached by URL knows no rename. There an artifact is written on this machine's disk
first and then put into the store, its manifest last, and one that is replaced loses its manifest
first. What has no manifest is not there; and who reads an artifact while it is replaced may find
files that are not those of its manifest, which sizes and checksums tell. While it is put there,
``manifest.json.draft`` stands beside it, so that what an interrupted writer left can be replaced.
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
from hvdrec.errors import UserError, choices
from hvdrec.storage.urls import Place, Url

MANIFEST = "manifest.json"
DRAFT_MANIFEST = f"{MANIFEST}.draft"
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
    path: Place, kind: str, meta: dict[str, Any] | None = None, *, overwrite: bool = False
) -> Iterator[Path]:
    """Yield an empty directory to fill; on a clean exit it becomes ``path``, else it vanishes.

    ``meta`` may be filled while writing: it is read on exit. With ``overwrite`` an artifact of the
    same kind that stands at ``path`` is replaced, after the new one is complete.
    Raises UserError where ``path`` is taken.
    """
    _refuse_taken(path, kind, overwrite)
    if isinstance(path, Url):
        with tempfile.TemporaryDirectory(prefix="hvdrec-") as folder:
            yield Path(folder)
            write_manifest(Path(folder), kind, meta or {})
            _put(Path(folder), path)
        return
    with _drafted(path) as draft:
        yield draft
        write_manifest(draft, kind, meta or {})


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


def read_manifest(path: Place, kind: str) -> Manifest:
    """Read and check the manifest of the artifact at ``path``.

    Raises UserError if there is none, if it is damaged, of another kind or a newer format, or if
    a file it lists lies outside the directory or is missing or has another size.
    """
    return _checked(_read(path, kind), path, kind)


def _read(path: Place, kind: str) -> bytes:
    try:
        return (path / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: no {kind} artifact here ({MANIFEST} is missing); run the stage that writes it"
        ) from None


def _checked(text: bytes, path: Place, kind: str) -> Manifest:
    """Return what a manifest says, once the files are there that it lists; see `read_manifest`."""
    file = path / MANIFEST
    try:
        raw = json.loads(text)
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
    found = path.sizes() if isinstance(path, Url) else None
    for name, facts in manifest.files.items():
        _refuse_outside(name, file)
        size = _size(path / name) if found is None else found.get(name)
        if size is None:
            raise UserError(
                f"{path / name}: listed in {MANIFEST} but missing; write the artifact again"
            )
        if size != facts["bytes"]:
            raise UserError(
                f"{path / name}: {size} bytes, {MANIFEST} says {facts['bytes']}; "
                "write the artifact again"
            )
    return manifest


def fetch_artifact(source: Place, to: Path, kind: str, *, overwrite: bool = False) -> bool:
    """Copy an artifact into a directory, which is there whole or not at all.

    Every file is compared with the manifest's SHA-256 first. Where ``to`` holds the very same
    artifact, whole, nothing is done and False returned; another one of its kind is replaced with
    ``overwrite``. Raises UserError for what is no artifact of the kind, or was replaced while it
    was read.
    """
    text = _read(source, kind)
    manifest = _checked(text, source, kind)
    with suppress(UserError):
        if _read(to, kind) == text:
            verify_artifact(to, kind)
            return False
    _refuse_taken(to, kind, overwrite)
    with _drafted(to) as draft:
        for name, facts in manifest.files.items():
            target = draft / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _get(source / name, target)
            if sha256(target) != facts["sha256"]:
                raise UserError(
                    f"{source / name}: contents differ from {MANIFEST}; if the {kind} is being "
                    "replaced, fetch it again, otherwise write it again"
                )
        (draft / MANIFEST).write_bytes(text)
    return True


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


@contextmanager
def _drafted(path: Path) -> Iterator[Path]:
    """Yield a directory beside a place, which is synced and renamed to it on a clean exit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    draft.mkdir()
    try:
        yield draft
        _sync_tree(draft)
        _rename_into_place(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _put(draft: Path, url: Url) -> None:
    """Put what a directory holds into a store, the manifest last."""
    names = [f.relative_to(draft).as_posix() for f in sorted(draft.rglob("*")) if f.is_file()]
    names.remove(MANIFEST)
    former = _listed(url / MANIFEST) | _listed(url / DRAFT_MANIFEST)
    (url / DRAFT_MANIFEST).upload(draft / MANIFEST)
    (url / MANIFEST).remove()
    for name in names:
        (url / name).upload(draft / name)
    found = url.sizes()
    for name in names:
        if found.get(name) != (draft / name).stat().st_size:
            raise UserError(f"{url / name}: did not arrive whole; write the artifact again")
    for name in former.intersection(found).difference(names):
        (url / name).remove()
    (url / MANIFEST).upload(draft / MANIFEST)
    (url / DRAFT_MANIFEST).remove()


def _listed(manifest: Url) -> set[str]:
    """Return the files of an artifact that is to be replaced, if one can tell."""
    try:
        names = set(json.loads(manifest.read_bytes())["files"])
        for name in names:
            _refuse_outside(name, manifest)
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        return set()
    return names


def _get(source: Place, target: Path) -> None:
    if isinstance(source, Url):
        source.download(target)
    else:
        shutil.copyfile(source, target)


def _refuse_taken(path: Place, kind: str, overwrite: bool) -> None:
    """Raise UserError unless an artifact of a kind may be written at a place."""
    held: bytes | None = None
    with suppress(FileNotFoundError, NotADirectoryError):
        held = (path / MANIFEST).read_bytes()
    if held is None:
        names = set(path.sizes()) if isinstance(path, Url) else set()
        if DRAFT_MANIFEST in names or not (names or (isinstance(path, Path) and path.exists())):
            return
    if not overwrite:
        raise UserError(f"{path}: already exists; pass --overwrite to replace it")
    if held is None:
        if isinstance(path, Path) and path.is_dir() and not any(path.iterdir()):
            return
        raise UserError(
            f"{path}: exists and is no hvdrec artifact (no {MANIFEST}); choose another place"
        )
    try:
        found = json.loads(held)["kind"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        found = kind  # a damaged artifact may be replaced
    if found != kind:
        raise UserError(f"{path}: holds a '{found}' artifact; only {choices([kind])} is replaced")


def _size(file: Place) -> int | None:
    return file.stat().st_size if isinstance(file, Path) and file.is_file() else None


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


def _refuse_outside(name: str, manifest: Place) -> None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise UserError(
            f"{manifest}: file name '{name}' leaves the directory; do not use this artifact"
        )


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
