"""Artifact directories that are either complete or absent.

An artifact is the directory that a stage writes: samples, features, a checkpoint, a bundle. It is
written to a draft directory beside its final path (see `drafts`). ``manifest.json`` lists the files
with their SHA-256. Everything is synced to disk; the rename to the final path comes last.

Remote stores cannot rename directories. There, an artifact is written to a local directory and then
uploaded, the manifest last. If it replaces another artifact, the old manifest is deleted first. A
directory without a manifest counts as absent. A reader may get a mix of old and new files during a
replacement; it detects this by sizes and checksums. During an upload the store holds
``manifest.json.draft``. This file tells the next writer that it may overwrite the upload if it was
interrupted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from hvdrec import __version__
from hvdrec.errors import UserError, choices, invalid_file, write_errors_named
from hvdrec.storage.checksums import sealed, sha256, unsealed
from hvdrec.storage.drafts import draft_directory, scratch_directory
from hvdrec.storage.tree_checksum import tree_facts
from hvdrec.storage.urls import Location, Url

MANIFEST = "manifest.json"
DRAFT_MANIFEST = f"{MANIFEST}.draft"
FORMATS = {"bundle": 2}
"""Kind of artifact -> version of its format; 1 for the kinds that are not listed."""
MADE_FROM = "made_from"
"""Key in a manifest's ``meta``. The value maps the kind of each artifact from which this one was
made to its identity."""
REWRITE = "write the artifact again"
REMEDIES = {
    "samples": "run hvdrec samples with --overwrite",
    "features": "run hvdrec prepare with --overwrite",
    "checkpoint": (
        "write the name of another checkpoint into the run's files 'latest' and 'best', or train "
        "again with --overwrite"
    ),
    "bundle": "run hvdrec export with --overwrite",
}
"""Kind of artifact -> remedy for a damaged one; REWRITE for the kinds that are not listed."""
DECODE_ERRORS = (ValueError, KeyError, TypeError)
"""Exceptions that may be raised when a damaged or unexpected manifest is parsed."""


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``.

    Attributes:
        kind: Kind of the artifact, such as "samples".
        meta: Facts that the stage recorded for readers of the artifact.
        files: Relative POSIX path of each file -> its "sha256" and its size in "bytes".
        format: Version of the format of this kind of artifact.
        written_by: Version of hvdrec that wrote the artifact.
    """

    kind: str
    meta: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    format: int
    written_by: str = __version__

    @property
    def identity(self) -> str:
        """16 hexadecimal digits that identify the kind and the contents of the artifact."""
        files = sorted((name, facts["sha256"]) for name, facts in self.files.items())
        return hashlib.sha256(json.dumps([self.kind, files]).encode()).hexdigest()[:16]

    def made_from(self, kind: str) -> str:
        """Return the identity of the `kind` artifact that this one was made from; "" if unknown."""
        return str(self.meta.get(MADE_FROM, {}).get(kind, ""))


@contextmanager
def write_artifact(
    path: Location,
    kind: str,
    meta: dict[str, Any] | None = None,
    *,
    overwrite: bool = False,
    known: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> Iterator[Path]:
    """Yield an empty directory; it becomes the artifact if the ``with`` body ends without error.

    Args:
        path: Path of the artifact.
        kind: Kind of the artifact, such as "samples".
        meta: Facts for the manifest. They are read at the end, so the body may still add some.
        overwrite: Replace an artifact of the same kind as soon as the new one is complete.
        known: As in `write_manifest`; also read at the end.

    Raises:
        UserError: There is something at `path` that may not be replaced.
    """
    _require_free(path, kind, overwrite)
    if isinstance(path, Url):
        digest = hashlib.sha256(path.text.encode()).hexdigest()[:16]
        with scratch_directory(Path(tempfile.gettempdir()) / f"hvdrec-{digest}", 0o700) as draft:
            yield draft
            write_manifest(draft, kind, meta or {}, known)
            _upload(draft, path)
        return
    with write_errors_named(path), draft_directory(path) as draft:
        yield draft
        write_manifest(draft, kind, meta or {}, known)


def write_manifest(
    directory: Path,
    kind: str,
    meta: Mapping[str, Any],
    known: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> None:
    """Write the manifest of a directory whose other files are complete.

    `known` maps file names to their `file_facts`; the checksums of all other files are computed.
    """
    files = {
        name: {
            **(known.get(name) or file_facts(directory / name)),
            **tree_facts(directory / name, kind),
        }
        for name in _file_names(directory)
        if name != MANIFEST
    }
    manifest = {
        "kind": kind,
        "format": FORMATS.get(kind, 1),
        "written_by": __version__,
        "meta": dict(meta),
        "files": files,
    }
    (directory / MANIFEST).write_text(sealed(manifest))


def file_facts(file: Path) -> dict[str, Any]:
    """Compute the facts that a manifest holds about a file: its size and SHA-256."""
    return {"sha256": sha256(file), "bytes": file.stat().st_size}


def read_manifest(path: Location, kind: str) -> Manifest:
    """Read the manifest of an artifact and check that its files exist and have the listed sizes.

    Raises:
        UserError: The manifest is missing or damaged, or has another kind or a newer format; or a
            file is missing, has another size or lies outside the directory.
    """
    return _check_manifest(_read_manifest(path, kind), path, kind)


def manifest_kind(path: Location) -> str:
    """Return the kind of the artifact at `path`.

    Raises:
        UserError: There is no artifact, or its manifest is damaged.
    """
    try:
        return str(unsealed(_read_manifest(path, "hvdrec"))["kind"])
    except DECODE_ERRORS as error:
        raise invalid_file(path / MANIFEST, f"damaged manifest ({error})", REWRITE) from None


def verify_artifact(path: Path, kind: str) -> Manifest:
    """Read the manifest of an artifact and compare the SHA-256 of every file with it.

    Raises:
        UserError: A check of `read_manifest` fails, or a checksum differs.
    """
    manifest = read_manifest(path, kind)
    files = StoredFiles(path, manifest)
    for name in manifest.files:
        files.verified(name)
    return manifest


class StoredFiles:
    """The files of a local artifact; each file is verified when it is first requested."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """Hold the directory of an artifact and its manifest."""
        self.directory = directory
        self.manifest = manifest
        self._verified: set[str] = set()

    def __contains__(self, name: str) -> bool:
        """Return True if the manifest lists a file."""
        return name in self.manifest.files

    def verified(self, name: str) -> Path:
        """Return the path of a file; on the first call, compare its SHA-256 with the manifest.

        Raises:
            UserError: The file cannot be read, differs from its checksum, or is not listed.
        """
        file = self.directory / name
        remedy = REMEDIES.get(self.manifest.kind, REWRITE)
        if name not in self:
            raise invalid_file(file, f"is not listed in {MANIFEST}", remedy)
        if name not in self._verified:
            try:
                digest = sha256(file)
            except OSError as error:
                raise invalid_file(file, f"cannot be read ({error.strerror})", remedy) from None
            if digest != self.manifest.files[name]["sha256"]:
                raise invalid_file(file, f"contents differ from {MANIFEST}", remedy)
            self._verified.add(name)
        return file


def fetch_artifact(source: Location, to: Path, kind: str, *, overwrite: bool = False) -> bool:
    """Copy an artifact to the local directory `to` and verify the SHA-256 of every file.

    The directory appears only when the copy is complete. With `overwrite`, it may replace another
    artifact of the same kind at `to`.

    Returns:
        True if files were copied; False if `to` already holds the same artifact.

    Raises:
        UserError: `source` is not a valid artifact or changed during the copy, or `to` exists.
    """
    text = _read_manifest(source, kind)
    manifest = _check_manifest(text, source, kind)
    with suppress(UserError):
        if _read_manifest(to, kind) == text:
            verify_artifact(to, kind)
            return False
    _require_free(to, kind, overwrite)
    with write_errors_named(to), draft_directory(to) as draft:
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


def _read_manifest(path: Location, kind: str) -> bytes:
    try:
        return (path / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        problem = f"no {kind} artifact here ({MANIFEST} is missing)"
        raise invalid_file(path, problem, "run the stage that writes it") from None


def _check_manifest(text: bytes, path: Location, kind: str) -> Manifest:
    """Parse a manifest and compare it with the names and sizes of the files in its directory."""
    file = path / MANIFEST
    try:
        raw = unsealed(text)
        fields = ("kind", "meta", "files", "format", "written_by")
        manifest = Manifest(*(raw[field] for field in fields))
        _require_types(manifest)
    except DECODE_ERRORS as error:
        remedy = REMEDIES.get(kind, REWRITE)
        raise invalid_file(file, f"damaged manifest ({error})", remedy) from None
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
            problem = f"listed in {MANIFEST} but missing"
            raise invalid_file(path / name, problem, REMEDIES.get(kind, REWRITE))
        if size != facts["bytes"]:
            problem = f"{size} bytes, {MANIFEST} says {facts['bytes']}"
            raise invalid_file(path / name, problem, REMEDIES.get(kind, REWRITE))
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
    """Upload a complete directory, the manifest last; remove the old artifact's other files."""
    names = _file_names(draft)
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


def _file_names(directory: Path) -> list[str]:
    """Return the relative POSIX paths of all files below a directory, sorted."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return [file.relative_to(directory).as_posix() for file in files]


def _listed_files(manifest: Url) -> set[str]:
    """Return the file names in a manifest; empty if it is missing or damaged."""
    try:
        names = set(json.loads(manifest.read_bytes())["files"])
    except (FileNotFoundError, *DECODE_ERRORS):
        return set()
    for name in names:
        _require_inside(name, manifest)
    return names
