"""Layout of embeddings in Redis: names of Redis keys, metadata of a version, rows as bytes.

A version is one publication of a bundle's embeddings. The Redis keys are:

PREFIX:{MODEL}:current                string: the version to read
PREFIX:{MODEL}:VERSION:meta           hash: `VersionInfo`
PREFIX:{MODEL}:VERSION:user:BUCKET    hash: a user's key -> the user's row, and MARK
PREFIX:{MODEL}:VERSION:item:BUCKET    the same for items
PREFIX:NAME:models                    sorted set: models of bundles called NAME, by publication time

MODEL is `BundleInfo.model`, since embeddings fit only the ranker that they were trained with. The
braces are a hash tag of Redis Cluster: they keep all keys of a model on one node, so that a
transaction can change them together. A field of a hash is the key of a user or an item, as UTF-8 or
as decimal digits. It is stored in bucket CRC-32(field) % buckets. A row is an embedding in
little-endian bytes: float32 or float16 [width], or a float32 scale followed by int8 [width].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from hvdrec.scoring.errors import StoreError, shown

Array = NDArray[Any]
FORMAT = 1
PREFIX = "hvdrec"
SIDES = ("user", "item")
MARK = b"\xff"
"""A field that every bucket has; it is not valid UTF-8, so it is never a key. If a bucket lacks
this field, Redis has expired or evicted the bucket."""
BUCKET_ROWS = 16384
"""Number of rows in a bucket. Redis answers nobody while it frees an expired hash; at this size
that takes milliseconds."""
ROW_DTYPES = {"float32": "<f4", "float16": "<f2", "int8": "i1"}


@dataclass(frozen=True)
class Names:
    """Names of the Redis keys of one model."""

    prefix: str
    model: str

    def __post_init__(self) -> None:
        """Raise StoreError if the prefix is not valid in the names."""
        if not self.prefix or set(self.prefix) & set("{} \t\r\n"):
            raise StoreError(
                f"prefix = {shown(self.prefix)}: must be text without braces and blanks",
                field="prefix",
                value=self.prefix,
            )

    def current(self) -> str:
        """Return the Redis key that holds the name of the current version."""
        return f"{self.prefix}:{{{self.model}}}:current"

    def meta(self, version: str) -> str:
        """Return the Redis key of a version's metadata."""
        return f"{self.prefix}:{{{self.model}}}:{version}:meta"

    def bucket(self, version: str, side: str, number: int) -> str:
        """Return the Redis key of a bucket of rows."""
        return f"{self.prefix}:{{{self.model}}}:{version}:{side}:{number}"

    def all_of(self, version: VersionInfo) -> list[str]:
        """Return every Redis key of a version, the metadata first."""
        buckets = [
            self.bucket(version.name, side, number)
            for side in SIDES
            for number in range(version.sides[side].buckets)
        ]
        return [self.meta(version.name), *buckets]


@dataclass(frozen=True)
class SideInfo:
    """How the users or the items of a version are stored.

    Attributes:
        rows: Number of users or items.
        width: Width of an embedding.
        dtype: Dtype of the stored embeddings: ``"float32"``, ``"float16"`` or ``"int8"``.
        keys: Type of the users' or items' keys: ``"string"`` or ``"int"``.
        buckets: Number of Redis hashes over which the rows are divided.
    """

    rows: int
    width: int
    dtype: str
    keys: str
    buckets: int

    def bucket_of(self, field: bytes) -> int:
        """Return the number of the bucket that holds a field."""
        return crc32(field) % self.buckets

    @property
    def row_dtype(self) -> np.dtype[Any]:
        """Structured numpy dtype of the bytes of a row."""
        values = ("values", ROW_DTYPES[self.dtype], (self.width,))
        return np.dtype([("scale", "<f4"), values] if self.dtype == "int8" else [values])


@dataclass(frozen=True)
class VersionInfo:
    """Metadata of one publication.

    Attributes:
        name: Unique name of the version.
        bundle: `BundleInfo.version` of the published bundle.
        created: Time of the publication, ISO 8601, UTC.
        sides: How ``"user"`` and ``"item"`` are stored.
    """

    name: str
    bundle: str
    created: str
    sides: Mapping[str, SideInfo]


def buckets_for(rows: int) -> int:
    """Return the number of buckets over which to divide ``rows`` rows."""
    return max(1, -(-rows // BUCKET_ROWS))


def models_key(prefix: str, bundle: str) -> str:
    """Return the Redis key that lists the published models of all bundles called ``bundle``."""
    return f"{prefix}:{bundle}:models"


def meta_fields(version: VersionInfo) -> dict[str, str | int]:
    """Convert a version's metadata to the fields of a Redis hash."""
    fields: dict[str, str | int] = {
        "format": FORMAT,
        "bundle": version.bundle,
        "created": version.created,
    }
    for side, info in version.sides.items():
        fields |= {f"{side}.{name}": value for name, value in vars(info).items()}
    return fields


def parse_meta(name: str, fields: Mapping[bytes, bytes]) -> VersionInfo:
    """Parse a version's metadata; raise ValueError with the reason if it is damaged."""
    text = {key.decode(): value.decode() for key, value in fields.items()}
    try:
        if text["format"] != str(FORMAT):
            raise ValueError(f"format {shown(text['format'])}, expected {FORMAT}")
        sides = {side: _parse_side(side, text) for side in SIDES}
        return VersionInfo(name, text["bundle"], text["created"], sides)
    except KeyError as error:
        raise ValueError(f"{error} is missing") from None


def _parse_side(side: str, text: Mapping[str, str]) -> SideInfo:
    dtype, keys = text[f"{side}.dtype"], text[f"{side}.keys"]
    rows, width, buckets = (int(text[f"{side}.{name}"]) for name in ("rows", "width", "buckets"))
    is_known = dtype in ROW_DTYPES and keys in ("string", "int")
    if not is_known or min(rows, width - 1, buckets - 1) < 0:
        raise ValueError(f"the metadata of {side}s is not valid")
    return SideInfo(rows, width, dtype, keys, buckets)


def field_of(key: str | int) -> bytes:
    """Convert the key of a user or an item to the name of a hash field."""
    return key.encode() if isinstance(key, str) else b"%d" % key


def pack(info: SideInfo, stored: Array, scales: Array | None) -> list[bytes]:
    """Convert n embeddings to n rows of bytes.

    Args:
        info: How the rows are stored.
        stored: Embeddings [n, width].
        scales: Factors of int8 embeddings, float32 [n]; None for other dtypes.
    """
    rows = np.empty(len(stored), dtype=info.row_dtype)
    rows["values"] = stored
    if scales is not None:
        rows["scale"] = scales
    raw, size = rows.tobytes(), info.row_dtype.itemsize
    return [raw[start : start + size] for start in range(0, len(raw), size)]


def unpack(info: SideInfo, rows: Sequence[bytes]) -> Array:
    """Convert n rows of bytes to embeddings, float32 [n, width]."""
    packed = np.frombuffer(b"".join(rows), dtype=info.row_dtype)
    values: Array = packed["values"].astype(np.float32)
    if info.dtype == "int8":
        values *= packed["scale"][:, None]
    return values


def incomplete_version(label: str, names: Names, version: str) -> StoreError:
    """Build the error for a version that lacks rows; ``label`` names the server."""
    return StoreError(
        f"{label}: version {version} of model {names.model} is incomplete; make sure that the "
        "server does not evict keys (maxmemory-policy noeviction), and run hvdrec publish"
    )
