"""Reading a bundle's manifest and arrays, without trusting either.

Nothing is read but regular files that lie in the bundle; files that no manifest lists may lie
beside them and are not looked at.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.scoring.errors import BundleError, ReplacedError, choices, shown

MANIFEST = "manifest.json"
MANIFEST_BYTES = 16 << 20
FORMAT = 2
GRAPHS = ("user_tower.onnx", "item_tower.onnx", "ranker.onnx")
REQUIRED = (
    *GRAPHS,
    "users/keys.npy",
    "users/embeddings.npy",
    "items/keys.npy",
    "items/embeddings.npy",
)
Stamp = tuple[int, int, int, int]
SIDES = ("user", "item", "scene")
ARGUMENTS = {"item": "items"}
"""Argument of `Scorer.score` that holds a side's fields, where it differs from the side's name."""
DTYPES = ("string", "int", "float")
KINDS = ("categorical", "categorical_list", "sequence", "numeric", "hashed")


@dataclass(frozen=True)
class Field:
    """A raw feature as a request gives it."""

    name: str
    """What a request calls it."""
    side: str
    """user, item or scene."""
    dtype: str
    """Type of a raw value (of a list's entries): string, int or float."""
    is_list: bool
    """Whether a raw value is a list."""
    pads_left: bool
    """Whether a list ends with its newest entry, is cut and padded on the left (a sequence)."""
    max_length: int
    """Most entries of a list that count: the first, or of a sequence the last."""
    default: str | int | float | None
    """Value of a scene field that a request leaves out; None: missing."""

    @property
    def path(self) -> str:
        """Where the field stands in a request: ``user.age``, ``items.year``, ``scene.hour``."""
        return f"{ARGUMENTS.get(self.side, self.side)}.{self.name}"


@dataclass(frozen=True)
class BundleInfo:
    """What the manifest says: name, keys, fields and widths."""

    path: Path
    name: str
    user_key: str
    item_key: str
    fields: tuple[Field, ...]
    user_width: int
    item_width: int
    retrieval_width: int
    manifest: Mapping[str, Any]
    tasks: tuple[str, ...] = ()
    """Names of the labels that the ranker predicts beside its score; none in most bundles."""
    version: str = ""
    """First 12 hexadecimal digits of the SHA-256 of manifest.json: what the whole bundle is."""
    model: str = ""
    """The same of the graphs' checksums: embeddings of one model fit each other."""
    stamps: Mapping[str, Stamp] = field(default_factory=dict)
    """Of each file, what changes when another one takes its place."""

    def side(self, side: str) -> tuple[Field, ...]:
        """Return the fields of one side."""
        return tuple(field for field in self.fields if field.side == side)

    def holds(self, name: str) -> bool:
        """Return whether the manifest lists a file."""
        return name in self.manifest["files"]


def read_bundle(path: Path, *, verify: bool) -> BundleInfo:
    """Read and check a bundle's manifest.

    Checks kind, format, and that every listed file lies in the directory with its size; with
    ``verify`` also the SHA-256 of each file. Links in ``path`` are followed once, so that all files
    come from one directory. Raises BundleError.
    """
    try:
        path = path.resolve()
    except (OSError, RuntimeError, ValueError):
        raise _no_bundle(path) from None
    raw, stamp = _manifest_bytes(path)
    manifest = _parsed(path, raw)
    try:
        files = {
            str(name): (int(facts["bytes"]), str(facts["sha256"]))
            for name, facts in manifest["files"].items()
        }
        stamps = {MANIFEST: stamp}
        info = _info(path, manifest, hashlib.sha256(raw).hexdigest()[:12], _model(files), stamps)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise BundleError(
            f"{path / MANIFEST}: damaged manifest ({reason}); export the bundle again"
        ) from None
    for name in REQUIRED:
        if name not in files:
            raise BundleError(f"{path}: '{name}' is missing from the bundle; export it again")
    for name, (size, _) in files.items():
        stamps[name] = _check_size(path, name, size)
    for name, (_, sha256) in files.items() if verify else ():
        _check_sum(path, name, sha256)
    return info


def check_unchanged(info: BundleInfo) -> None:
    """Raise ReplacedError where a file is another one than `read_bundle` saw.

    Called after everything is open: then no part of the bundle comes from another one that took
    its place in between. Device, inode, size and time of the last change tell a directory renamed
    into place as well as a file written over, on every system.
    """
    for name, stamp in info.stamps.items():
        try:
            found = stamp_of((info.path / name).stat())
        except OSError:
            found = None
        if found != stamp:
            raise ReplacedError(
                f"{info.path / name}: was replaced while the bundle was read; load it again"
            )


def stamp_of(status: os.stat_result) -> Stamp:
    """Return what tells a file from another one in its place, and from itself before a change."""
    # No ctime: that also changes when a hard link to the file goes.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_array(path: Path, name: str) -> NDArray[Any]:
    """Memory-map one of the bundle's arrays, read-only; BundleError if that cannot be."""
    _located(path, name)
    try:
        with np.errstate(over="ignore"):  # a header may tell of more bytes than there are numbers
            array = np.load(path / name, mmap_mode="r", allow_pickle=False)
        # A plain view: indexing a numpy.memmap costs several times as much.
        return array.view(np.ndarray)  # type: ignore[no-any-return]
    except (AttributeError, EOFError, MemoryError, OSError, OverflowError, ValueError) as error:
        raise BundleError(
            f"{path / name}: cannot be read ({_first_line(error)}); export the bundle again"
        ) from None


def _no_bundle(path: Path) -> BundleError:
    return BundleError(f"{path}: no bundle here ({MANIFEST} is missing); run hvdrec export")


def _manifest_bytes(path: Path) -> tuple[bytes, Stamp]:
    file = path / MANIFEST
    try:
        file.lstat()
        status = _located(path, MANIFEST)
        if status.st_size > MANIFEST_BYTES:
            raise BundleError(
                f"{file}: has {status.st_size} bytes, a manifest has at most {MANIFEST_BYTES}; "
                "export the bundle again"
            )
        return file.read_bytes(), stamp_of(status)
    except (FileNotFoundError, NotADirectoryError):
        raise _no_bundle(path) from None
    except OSError as error:
        raise BundleError(
            f"{file}: cannot be read ({_first_line(error)}); check its permissions"
        ) from None


def _parsed(path: Path, raw: bytes) -> Mapping[str, Any]:
    import json  # here, for the sake of who imports much and loads little

    file = path / MANIFEST
    try:
        manifest = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{file}: damaged manifest ({_first_line(error)}); export the bundle again"
        ) from None
    if not isinstance(manifest, dict):
        raise BundleError(f"{file}: damaged manifest (no JSON object); export the bundle again")
    kind, version = manifest.get("kind"), manifest.get("format")
    if kind != "bundle":
        raise BundleError(f"{path}: is a {shown(kind)} artifact, expected 'bundle'")
    if isinstance(version, int) and version > FORMAT:
        raise BundleError(
            f"{path}: format {shown(version)} is newer than this hvdrec reads ({FORMAT}); "
            "upgrade hvdrec"
        )
    if version != FORMAT or isinstance(version, bool):
        raise BundleError(
            f"{path}: format {shown(version)} is not what this hvdrec reads ({FORMAT}); "
            "export the bundle again"
        )
    return manifest


def _model(files: Mapping[str, tuple[int, str]]) -> str:
    """Return the digest of the graphs' checksums, with their external data where they have some."""
    parts = [files[name][1] for name in sorted(files) if name.startswith(GRAPHS)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]


def _info(
    path: Path,
    manifest: Mapping[str, Any],
    version: str,
    model: str,
    stamps: Mapping[str, Stamp],
) -> BundleInfo:
    meta = manifest["meta"]
    schema = meta["schema"]
    user_width, item_width, retrieval_width = (
        _integer(meta, name) for name in ("user_width", "item_width", "retrieval_width")
    )
    if not 0 <= retrieval_width <= min(user_width, item_width):
        raise ValueError(
            f"retrieval_width {retrieval_width} is not within user_width {user_width} and "
            f"item_width {item_width}"
        )
    return BundleInfo(
        path=path,
        name=str(meta["name"]),
        user_key=str(schema["user_key"]),
        item_key=str(schema["item_key"]),
        fields=tuple(_field(raw) for raw in schema["features"]),
        user_width=user_width,
        item_width=item_width,
        retrieval_width=retrieval_width,
        manifest=manifest,
        tasks=tuple(str(task["name"]) for task in meta.get("tasks", ())),
        version=version,
        model=model,
        stamps=stamps,
    )


def _field(raw: Mapping[str, Any]) -> Field:
    name, kind = str(raw["name"]), raw["kind"]
    for key, allowed in (("side", SIDES), ("dtype", DTYPES), ("kind", KINDS)):
        if raw[key] not in allowed:
            raise ValueError(f"{key} of '{name}' is {shown(raw[key])}, not of {choices(allowed)}")
    return Field(
        name=name,
        side=raw["side"],
        dtype=raw["dtype"],
        is_list=kind in ("categorical_list", "sequence"),
        pads_left=kind == "sequence",
        max_length=max(1, _integer(raw, "max_length")),
        default=raw.get("default"),
    )


def _integer(raw: Mapping[str, Any], name: str) -> int:
    value = raw[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {shown(value)}, not an integer")
    return value


def _check_size(path: Path, name: str, size: int) -> Stamp:
    status = _located(path, name)
    if status.st_size != size:
        raise BundleError(
            f"{path / name}: has {status.st_size} bytes, the manifest says {size}; export it again"
        )
    return stamp_of(status)


def _check_sum(path: Path, name: str, sha256: str) -> None:
    try:
        with (path / name).open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(
            f"{path / name}: cannot be read ({_first_line(error)}); check its permissions"
        ) from None
    if found != sha256:
        raise BundleError(
            f"{path / name}: contents differ from the manifest; export the bundle again"
        )


def _located(path: Path, name: str) -> os.stat_result:
    """Return the status of a regular file of the bundle at ``path``, which has no links in it."""
    file = path / name
    try:
        if not file.resolve().is_relative_to(path):
            raise ValueError
    except (OSError, RuntimeError, ValueError):  # no text for a path, links in a circle
        raise BundleError(
            f"{path}: file name {shown(name)} leaves the bundle; do not use this bundle"
        ) from None
    try:
        status = file.stat()
    except OSError:
        raise BundleError(f"{file}: is missing; export the bundle again") from None
    # Opening a pipe would wait for its writer, reading a device need not end.
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{file}: is no regular file; export the bundle again")
    return status


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
