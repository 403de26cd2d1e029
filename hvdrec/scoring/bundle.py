"""Reading a bundle's manifest and arrays, without trusting either."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.scoring.errors import BundleError

FORMAT = 1
REQUIRED = (
    "user_tower.onnx",
    "item_tower.onnx",
    "ranker.onnx",
    "users/keys.npy",
    "users/embeddings.npy",
    "items/keys.npy",
    "items/embeddings.npy",
)


@dataclass(frozen=True)
class Field:
    """A raw feature as a request gives it."""

    name: str
    side: str
    dtype: str
    is_list: bool
    pads_left: bool
    max_length: int
    default: str | int | float | None


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
    meta: Mapping[str, Any]

    def side(self, side: str) -> tuple[Field, ...]:
        """Return the fields of one side."""
        return tuple(field for field in self.fields if field.side == side)


def read_bundle(path: Path, *, verify: bool) -> BundleInfo:
    """Read and check a bundle's manifest.

    Checks kind, format, and that every listed file lies in the directory with its size; with
    `verify` also the SHA-256 of each. Raises BundleError.
    """
    file = path / "manifest.json"
    if not file.is_file():
        raise BundleError(f"{path}: no bundle here (manifest.json is missing); run hvdrec export")
    try:
        manifest = json.loads(file.read_text())
        if manifest["kind"] != "bundle":
            raise BundleError(f"{path}: is a '{manifest['kind']}' artifact, expected 'bundle'")
        if manifest["format"] > FORMAT:
            raise BundleError(
                f"{path}: format {manifest['format']} is newer than this hvdrec reads ({FORMAT}); "
                "upgrade hvdrec"
            )
        for name, facts in manifest["files"].items():
            _check_file(path, name, facts["bytes"], facts["sha256"] if verify else None)
        for name in REQUIRED:
            if name not in manifest["files"]:
                raise BundleError(f"{path}: '{name}' is missing from the bundle; export it again")
        meta = manifest["meta"]
        schema = meta["schema"]
        fields = tuple(_field(raw) for raw in schema["features"])
        return BundleInfo(
            path,
            str(meta["name"]),
            str(schema["user_key"]),
            str(schema["item_key"]),
            fields,
            int(meta["user_width"]),
            int(meta["item_width"]),
            int(meta["retrieval_width"]),
            meta,
        )
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BundleError(
            f"{file}: damaged manifest ({error!r}); export the bundle again"
        ) from None


def read_array(path: Path, name: str) -> NDArray[Any]:
    """Memory-map one of the bundle's arrays."""
    try:
        return np.load(path / name, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{path / name}: cannot be read ({error}); export the bundle again"
        ) from None


def _field(raw: Mapping[str, Any]) -> Field:
    kind = raw["kind"]
    return Field(
        name=str(raw["name"]),
        side=str(raw["side"]),
        dtype=str(raw["dtype"]),
        is_list=kind in ("categorical_list", "sequence"),
        pads_left=kind == "sequence",
        max_length=int(raw["max_length"]),
        default=raw.get("default"),
    )


def _check_file(path: Path, name: str, size: int, sha256: str | None) -> None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise BundleError(f"{path}: file name '{name}' leaves the bundle; do not use this bundle")
    file = path / relative
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
