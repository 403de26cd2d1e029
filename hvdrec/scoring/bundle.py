"""Read and check a bundle's manifest. A bundle may come from anyone, so nothing in it is trusted.

Only regular files inside the bundle directory are opened. Files that the manifest does not list are
ignored.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvdrec.scoring.errors import (
    BundleError,
    ReplacedError,
    choices,
    first_line,
    invalid_bundle,
    shown,
)
from hvdrec.scoring.file_checksums import FileFacts, check_files, check_manifest

MANIFEST = "manifest.json"
MANIFEST_BYTES = 16 << 20
MOST_WIDTH = 1 << 16
"""Largest accepted width of an embedding: each request allocates whole embeddings, so a false width
in a manifest could exhaust memory."""
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
"""Side -> name of its argument of `Scorer.score`, for the sides whose argument has another name."""
DTYPES = ("string", "int", "float")
KINDS = ("categorical", "categorical_list", "sequence", "numeric", "hashed")


@dataclass(frozen=True)
class Field:
    """A raw feature that a request may contain."""

    name: str
    """Name of the feature in a request."""
    side: str
    """What the feature describes: "user", "item" or "scene" (time, place, device, placement)."""
    dtype: str
    """Type of a raw value, or of the entries of a list: "string", "int" or "float"."""
    is_list: bool
    """True if a raw value is a list."""
    pads_left: bool
    """True for a sequence, whose newest entry is last: it is cut and padded on the left. Other
    lists are cut and padded on the right."""
    max_length: int
    """Largest number of entries used: the first ones of a list, the last ones of a sequence."""
    default: str | int | float | None
    """Value that a scene field takes if a request omits it; None is the missing value."""

    @property
    def path(self) -> str:
        """Path of the field in a request: ``user.age``, ``items.year``, ``scene.hour``."""
        return f"{ARGUMENTS.get(self.side, self.side)}.{self.name}"


@dataclass(frozen=True)
class BundleInfo:
    """Contents of a bundle's manifest."""

    path: Path
    """Directory of the bundle, without symbolic links."""
    name: str
    """Name of the run that was exported."""
    user_key: str
    """Name of the column that holds the users' keys."""
    item_key: str
    """Name of the column that holds the items' keys."""
    fields: tuple[Field, ...]
    """Raw features of users, items and the scene."""
    user_width: int
    """Width of a user's embedding."""
    item_width: int
    """Width of an item's embedding."""
    retrieval_width: int
    """Number of leading embedding entries that retrieval compares by inner product; 0 if the model
    has no retrieval."""
    manifest: Mapping[str, Any]
    """The whole manifest as parsed from JSON."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Usual name of a graph tensor -> its name here, for tensors that were renamed because a raw
    feature has the usual name."""
    filters: Mapping[str, str] = field(default_factory=dict)
    """Item field with a filter -> folder of the filter, if the folder does not have the field's
    name."""
    tasks: tuple[str, ...] = ()
    """Names of the labels that the ranker predicts in addition to the score; empty in most
    bundles."""
    version: str = ""
    """First 12 hexadecimal digits of the SHA-256 of manifest.json; identifies the bundle."""
    model: str = ""
    """Digest of the graphs' checksums, 12 hexadecimal digits. Embeddings may only be used with
    graphs of the same digest."""
    stamps: Mapping[str, Stamp] = field(default_factory=dict)
    """Stamp of the directory (".") and of each file when the manifest was read; see `stamp_of`."""

    def side(self, side: str) -> tuple[Field, ...]:
        """Return the fields of one side."""
        return tuple(field for field in self.fields if field.side == side)

    def tensor(self, name: str) -> str:
        """Return the name that the tensor usually called ``name`` has in this bundle's graphs."""
        return self.names.get(name, name)

    def holds(self, name: str) -> bool:
        """Return True if the manifest lists a file of this name."""
        return name in self.manifest["files"]


def read_bundle(path: Path, *, verify: bool) -> BundleInfo:
    """Read a bundle's manifest and check that all its files are there.

    Symbolic links in ``path`` are resolved once, so that all files come from one directory.

    Args:
        path: Directory of the bundle, or a link to it.
        verify: True to compare the checksum of each file as well as its size.

    Returns:
        The contents of the manifest.

    Raises:
        BundleError: The bundle is missing, damaged or has another format.
        ReplacedError: Another bundle was moved to the path during the read.
    """
    try:
        path = path.resolve()
    except (OSError, RuntimeError, ValueError):
        raise _not_a_bundle(path) from None
    stamps = {".": stamp_of(path.stat())} if path.is_dir() else {}
    raw, stamps[MANIFEST] = _read_manifest(path)
    manifest = _parse_manifest(path, raw)
    try:
        check_manifest(manifest)
        files = {str(name): _parse_file(file) for name, file in manifest["files"].items()}
        version = hashlib.sha256(raw).hexdigest()[:12]
        info = _parse_info(path, manifest, version, _model_digest(files), stamps)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise invalid_bundle(path / MANIFEST, f"damaged manifest ({reason})") from None
    for name in REQUIRED:
        if name not in files:
            raise missing_file(info, name)
    try:
        for name, facts in files.items():
            stamps[name] = _check_size(path, name, facts.size)
        if verify:
            check_files(path, files)
    except BundleError:
        check_unchanged(info)  # if another bundle replaced this one, report that, not damage
        raise
    return info


def check_unchanged(info: BundleInfo) -> None:
    """Raise ReplacedError if a file changed since `read_bundle` saw it.

    If all files are open when this is called and it does not raise, all of them belong to the same
    bundle, even if another bundle replaces it later.
    """
    for name, stamp in info.stamps.items():
        try:
            current = stamp_of((info.path / name).stat())
        except OSError:
            current = None
        if current != stamp:
            raise replaced(info.path / name, "while the bundle was read")


def replaced(path: Path, when: str) -> ReplacedError:
    """Build the error for a file that another one replaced; ``when`` ends the sentence."""
    return ReplacedError(f"{path}: was replaced {when}; load it again", field=str(path))


def stamp_of(status: os.stat_result) -> Stamp:
    """Return device, inode, size and modification time of a file.

    Together they change when the file is replaced or overwritten. For a directory, the time is that
    of its last status change (ctime), which a rename sets. The files alone do not always reveal a
    replacement: in a copy made of hard links, they have the same inodes and times.
    """
    if stat.S_ISDIR(status.st_mode):
        return status.st_dev, status.st_ino, 0, status.st_ctime_ns
    # ctime is left out: it also changes when a hard link to the file is removed.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def regular_file(path: Path, name: str) -> os.stat_result:
    """Return the `os.stat` result of a regular file inside the bundle at ``path``.

    Raises:
        BundleError: The file is missing, is not a regular file, or a link or ``..`` in its name
            leads out of the bundle.
    """
    file = path / name
    try:
        if not file.resolve().is_relative_to(path):
            raise ValueError
    except (OSError, RuntimeError, ValueError):  # cyclic links and NUL in a name raise these, too
        problem = f"file name {shown(name)} leaves the bundle"
        raise invalid_bundle(path, problem, "do not use this bundle") from None
    try:
        status = file.stat()
    except OSError:
        raise invalid_bundle(file, "is missing") from None
    # Opening a pipe would wait for its writer; reading a device may never end.
    if not stat.S_ISREG(status.st_mode):
        raise invalid_bundle(file, "is not a regular file")
    return status


def missing_file(info: BundleInfo, name: str) -> BundleError:
    """Build the error for a required file that the manifest does not list."""
    problem = f"'{name}' is missing from the bundle"
    return invalid_bundle(info.path, problem, "export it again")


def _not_a_bundle(path: Path) -> BundleError:
    problem = f"is not a bundle ({MANIFEST} is missing)"
    return invalid_bundle(path, problem, "write one with hvdrec export")


def _read_manifest(path: Path) -> tuple[bytes, Stamp]:
    file = path / MANIFEST
    try:
        file.lstat()
        status = regular_file(path, MANIFEST)
        if status.st_size > MANIFEST_BYTES:
            problem = f"has {status.st_size} bytes, a manifest has at most {MANIFEST_BYTES}"
            raise invalid_bundle(file, problem)
        return file.read_bytes(), stamp_of(status)
    except (FileNotFoundError, NotADirectoryError):
        raise _not_a_bundle(path) from None
    except OSError as error:
        problem = f"cannot be read ({first_line(error)})"
        raise invalid_bundle(file, problem, "check its permissions") from None


def _parse_manifest(path: Path, raw: bytes) -> Mapping[str, Any]:
    import json  # not at the top: `import hvdrec.scoring` should stay cheap

    try:
        manifest = json.loads(raw.decode())
        if not isinstance(manifest, dict):
            raise TypeError("not a JSON object")
    except (TypeError, ValueError, RecursionError) as error:
        problem = f"damaged manifest ({first_line(error)})"
        raise invalid_bundle(path / MANIFEST, problem) from None
    kind, version = manifest.get("kind"), manifest.get("format")
    if kind != "bundle":
        problem = f"is a {shown(kind)} artifact, expected 'bundle'"
        raise invalid_bundle(path, problem, "pass the path of a bundle")
    if isinstance(version, int) and version > FORMAT:
        problem = f"format {shown(version)} is newer than this hvdrec reads ({FORMAT})"
        raise invalid_bundle(path, problem, "upgrade hvdrec")
    if version != FORMAT or isinstance(version, bool):
        problem = f"format {shown(version)} is not the one this hvdrec reads ({FORMAT})"
        raise invalid_bundle(path, problem)
    return manifest


def _parse_file(raw: Mapping[str, Any]) -> FileFacts:
    return FileFacts(int(raw["bytes"]), str(raw["sha256"]), str(raw.get("tree", "")))


def _model_digest(files: Mapping[str, FileFacts]) -> str:
    """Return one digest over the checksums of the ONNX graphs and their external data files."""
    parts = [files[name].sha256 for name in sorted(files) if name.startswith(GRAPHS)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]


def _parse_info(
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
    if max(user_width, item_width) > MOST_WIDTH:
        raise ValueError(f"user_width {user_width}, item_width {item_width} exceed {MOST_WIDTH}")
    if not 0 <= retrieval_width <= min(user_width, item_width):
        raise ValueError(
            f"retrieval_width {retrieval_width} exceeds user_width {user_width} or "
            f"item_width {item_width}, or is negative"
        )
    return BundleInfo(
        path=path,
        name=str(meta["name"]),
        user_key=str(schema["user_key"]),
        item_key=str(schema["item_key"]),
        fields=tuple(_parse_field(raw) for raw in schema["features"]),
        user_width=user_width,
        item_width=item_width,
        retrieval_width=retrieval_width,
        manifest=manifest,
        names=_texts(meta, "names"),
        filters=_texts(meta, "filters"),
        tasks=tuple(str(task["name"]) for task in meta.get("tasks", ())),
        version=version,
        model=model,
        stamps=stamps,
    )


def _parse_field(raw: Mapping[str, Any]) -> Field:
    name, kind = str(raw["name"]), raw["kind"]
    for key, allowed in (("side", SIDES), ("dtype", DTYPES), ("kind", KINDS)):
        if raw[key] not in allowed:
            raise ValueError(
                f"{key} of '{name}' is {shown(raw[key])}, expected one of {choices(allowed)}"
            )
    return Field(
        name=name,
        side=raw["side"],
        dtype=raw["dtype"],
        is_list=kind in ("categorical_list", "sequence"),
        pads_left=kind == "sequence",
        max_length=max(1, _integer(raw, "max_length")),
        default=raw.get("default"),
    )


def _texts(meta: Mapping[str, Any], name: str) -> Mapping[str, str]:
    """Return an entry that maps strings to strings; empty in bundles of earlier versions."""
    texts = meta.get(name, {})
    if not all(isinstance(value, str) for value in texts.values()):
        raise TypeError(f"{name} is {shown(texts)}, not names")
    return dict(texts)


def _integer(raw: Mapping[str, Any], name: str) -> int:
    value = raw[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {shown(value)}, not an integer")
    return value


def _check_size(path: Path, name: str, size: int) -> Stamp:
    status = regular_file(path, name)
    if status.st_size != size:
        problem = f"has {status.st_size} bytes, the manifest says {size}"
        raise invalid_bundle(path / name, problem, "export it again")
    return stamp_of(status)
