"""How embeddings lie in Redis: names of keys, what is told of a version, rows as bytes.

PREFIX:{MODEL}:current                string: the version that readers take
PREFIX:{MODEL}:VERSION:meta           hash: `VersionInfo`
PREFIX:{MODEL}:VERSION:user:BUCKET    hash: a user's key -> its row, and MARK; the same for "item"
PREFIX:NAME:models                    sorted set: the models of bundles of one name, by their time

MODEL is `BundleInfo.model`: embeddings fit only the ranker they were made for. The braces are the
hash tag of Redis Cluster, so that all of a model lies on one node and one transaction covers it.
A key is UTF-8, or an integer's decimal digits, and lies in bucket CRC-32(key) % buckets. A row is
little-endian: float32 or float16 [width], or a float32 scale followed by int8 [width].
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
"""A field of every bucket, and no text: a bucket without it has gone, or is not whole."""
BUCKET_ROWS = 16384
"""Redis frees an expired hash in one go: of so many rows within milliseconds, not seconds."""
VALUES = {"float32": "<f4", "float16": "<f2", "int8": "i1"}


@dataclass(frozen=True)
class Names:
    """The names of one model's keys."""

    prefix: str
    model: str

    def __post_init__(self) -> None:
        if not self.prefix or set(self.prefix) & set("{} \t\r\n"):
            raise StoreError(
                f"prefix = {shown(self.prefix)}: must be text without braces and blanks"
            )

    def current(self) -> str:
        """Return the key that holds the current version."""
        return f"{self.prefix}:{{{self.model}}}:current"

    def meta(self, version: str) -> str:
        """Return the key of what is told of a version."""
        return f"{self.prefix}:{{{self.model}}}:{version}:meta"

    def bucket(self, version: str, side: str, number: int) -> str:
        """Return the key of a bucket of rows."""
        return f"{self.prefix}:{{{self.model}}}:{version}:{side}:{number}"

    def all_of(self, version: VersionInfo) -> list[str]:
        """Return every key of a version, the metadata first."""
        buckets = [
            self.bucket(version.name, side, number)
            for side in SIDES
            for number in range(version.sides[side].buckets)
        ]
        return [self.meta(version.name), *buckets]


@dataclass(frozen=True)
class SideInfo:
    """Users or items of a version."""

    rows: int
    """Rows that came from the bundle."""
    width: int
    dtype: str
    """How a row is stored: float32, float16 or int8."""
    keys: str
    """Type of a key: "string" or "int"."""
    buckets: int

    def bucket_of(self, field: bytes) -> int:
        """Return the number of the bucket where a key lies."""
        return crc32(field) % self.buckets

    @property
    def row_dtype(self) -> np.dtype[Any]:
        """Return what a row's bytes are."""
        values = ("values", VALUES[self.dtype], (self.width,))
        return np.dtype([("scale", "<f4"), values] if self.dtype == "int8" else [values])


@dataclass(frozen=True)
class VersionInfo:
    """What was published at one time."""

    name: str
    bundle: str
    """`BundleInfo.version` of the bundle it came from."""
    created: str
    sides: Mapping[str, SideInfo]


def buckets_for(rows: int) -> int:
    """Return how many buckets hold so many rows."""
    return max(1, -(-rows // BUCKET_ROWS))


def models_key(prefix: str, bundle: str) -> str:
    """Return the key of the models that were published of bundles of one name."""
    return f"{prefix}:{bundle}:models"


def meta_fields(version: VersionInfo) -> dict[str, str | int]:
    """Return a version's metadata as fields of a hash."""
    fields: dict[str, str | int] = {
        "format": FORMAT,
        "bundle": version.bundle,
        "created": version.created,
    }
    for side, info in version.sides.items():
        fields |= {f"{side}.{name}": value for name, value in vars(info).items()}
    return fields


def parse_meta(name: str, fields: Mapping[bytes, bytes]) -> VersionInfo:
    """Return what a version's metadata says; ValueError with the reason where it is damaged."""
    text = {key.decode(): value.decode() for key, value in fields.items()}
    try:
        if text["format"] != str(FORMAT):
            raise ValueError(f"format {shown(text['format'])} is not {FORMAT}, which is read here")
        sides = {side: _parse_side(side, text) for side in SIDES}
        return VersionInfo(name, text["bundle"], text["created"], sides)
    except KeyError as error:
        raise ValueError(f"{error} is missing") from None


def _parse_side(side: str, text: Mapping[str, str]) -> SideInfo:
    dtype, keys = text[f"{side}.dtype"], text[f"{side}.keys"]
    rows, width, buckets = (int(text[f"{side}.{name}"]) for name in ("rows", "width", "buckets"))
    if (
        dtype not in VALUES
        or keys not in ("string", "int")
        or min(rows, width - 1, buckets - 1) < 0
    ):
        raise ValueError(f"what it tells of {side}s cannot be")
    return SideInfo(rows, width, dtype, keys, buckets)


def field_of(key: str | int) -> bytes:
    """Return a key as the field of a hash."""
    return key.encode() if isinstance(key, str) else b"%d" % key


def pack(info: SideInfo, stored: Array, scales: Array | None) -> list[bytes]:
    """Return rows [n, width] of the side's dtype, int8 with scales float32 [n], as bytes each."""
    rows = np.empty(len(stored), dtype=info.row_dtype)
    rows["values"] = stored
    if scales is not None:
        rows["scale"] = scales
    raw, size = rows.tobytes(), info.row_dtype.itemsize
    return [raw[start : start + size] for start in range(0, len(raw), size)]


def unpack(info: SideInfo, rows: Sequence[bytes]) -> Array:
    """Return rows, each of `SideInfo.row_dtype`, as float32 [n, width]."""
    packed = np.frombuffer(b"".join(rows), dtype=info.row_dtype)
    values: Array = packed["values"].astype(np.float32)
    if info.dtype == "int8":
        values *= packed["scale"][:, None]
    return values


def compressed(info: SideInfo, embeddings: Array) -> tuple[Array, Array | None]:
    """Return embeddings float32 [n, width] in the side's dtype, and int8's scales float32 [n].

    A row's scale is its largest magnitude over 127, as at export.
    """
    if info.dtype != "int8":
        return embeddings.astype(VALUES[info.dtype]), None
    largest = np.abs(embeddings).max(axis=1, initial=0.0)
    scales = (np.where(largest > 0, largest, 1.0) / 127).astype(np.float32)
    return np.rint(embeddings / scales[:, None]).astype(np.int8), scales
