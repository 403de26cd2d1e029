"""Reading a bundle's manifest and arrays, without trusting either."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.scoring.errors import BundleError, choices, shown

MANIFEST = "manifest.json"
FORMAT = 2
REQUIRED = (
    "user_tower.onnx",
    "item_tower.onnx",
    "ranker.onnx",
    "users/keys.npy",
    "users/embeddings.npy",
    "items/keys.npy",
    "items/embeddings.npy",
)
SIDES = ("user", "item", "scene")
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

    def side(self, side: str) -> tuple[Field, ...]:
        """Return the fields of one side."""
        return tuple(field for field in self.fields if field.side == side)

    def holds(self, name: str) -> bool:
        """Return whether the manifest lists a file."""
        return name in self.manifest["files"]


def read_bundle(path: Path, *, verify: bool) -> BundleInfo:
    """Read and check a bundle's manifest.

    Checks kind, format, and that every listed file lies in the directory with its size; with
    ``verify`` also the SHA-256 of each. Raises BundleError.
    """
    manifest = _read_manifest(path)
    try:
        info = _info(path, manifest)
        files = {
            str(name): (int(facts["bytes"]), str(facts["sha256"]))
            for name, facts in manifest["files"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise BundleError(
            f"{path / MANIFEST}: damaged manifest ({reason}); export the bundle again"
        ) from None
    for name in REQUIRED:
        if name not in files:
            raise BundleError(f"{path}: '{name}' is missing from the bundle; export it again")
    for name, (size, sha256) in files.items():
        _check_file(path, name, size, sha256 if verify else None)
    return info


def read_array(path: Path, name: str) -> NDArray[Any]:
    """Memory-map one of the bundle's arrays, read-only; BundleError if that cannot be."""
    try:
        array = np.load(path / name, mmap_mode="r", allow_pickle=False)
        # A plain view: indexing a numpy.memmap costs several times as much.
        return array.view(np.ndarray)  # type: ignore[no-any-return]
    except (AttributeError, EOFError, OSError, ValueError) as error:
        raise BundleError(
            f"{path / name}: cannot be read ({_first_line(error)}); export the bundle again"
        ) from None


def _read_manifest(path: Path) -> Mapping[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"{path}: no bundle here ({MANIFEST} is missing); run hvdrec export"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
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
            f"{path}: format {version} is newer than this hvdrec reads ({FORMAT}); upgrade hvdrec"
        )
    if version != FORMAT:
        raise BundleError(
            f"{path}: format {shown(version)} is not what this hvdrec reads ({FORMAT}); "
            "export the bundle again"
        )
    return manifest


def _info(path: Path, manifest: Mapping[str, Any]) -> BundleInfo:
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


def _check_file(path: Path, name: str, size: int, sha256: str | None) -> None:
    file = path / name
    if "\0" in name or not file.resolve().is_relative_to(path.resolve()):
        raise BundleError(
            f"{path}: file name {shown(name)} leaves the bundle; do not use this bundle"
        )
    if not file.is_file():
        raise BundleError(f"{file}: is missing; export the bundle again")
    if file.stat().st_size != size:
        raise BundleError(
            f"{file}: has {file.stat().st_size} bytes, the manifest says {size}; export it again"
        )
    if sha256 is not None:
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != sha256:
            raise BundleError(f"{file}: contents differ from the manifest; export the bundle again")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
