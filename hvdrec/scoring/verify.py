"""Check the contents of a bundle's arrays; their types and shapes are checked at every load."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hvdrec.scoring.array_files import (
    Array,
    read_array,
    read_offsets,
    read_vector,
    unexpected_array,
)
from hvdrec.scoring.bundle import BundleInfo
from hvdrec.scoring.errors import invalid_bundle
from hvdrec.scoring.item_data import FILTERS

BLOCK_ROWS = 1 << 18


def verify_arrays(info: BundleInfo) -> None:
    """Read every array of a bundle and check that its contents are consistent.

    Keys must be sorted and unique, and strings must be UTF-8, because lookups rely on it. Numbers
    must be finite, offsets must ascend, and item rows must be less than the number of items.
    Embeddings and keys are read in blocks to bound the memory.

    Raises:
        BundleError: An array breaks one of these rules.
    """
    users, items = _verify_side(info, "user"), _verify_side(info, "item")
    if info.holds("items/titles.npy") or info.holds("items/titles_offsets.npy"):
        text = read_vector(info, "items/titles.npy", "|u1")
        offsets = _ascending_offsets(info, "items/titles_offsets.npy", items, len(text))
        starts = offsets[:-1][offsets[:-1] < len(text)]
        if not _is_utf8(text) or (text[starts] & 0xC0 == 0x80).any():
            raise invalid_bundle(info.path / "items/titles.npy", "is not UTF-8 text")
    for name in ("items/popularity.npy", "items/trending.npy"):
        if info.holds(name) and (read_vector(info, name, "<i8", items) < 0).any():
            raise invalid_bundle(info.path / name, "holds negative counts")
    for name in sorted(info.manifest["files"]):
        if name.startswith(f"{FILTERS}/") and name.endswith("/values.npy"):
            _verify_filter(info, name.removesuffix("values.npy"), items)
    if info.holds("users/seen_offsets.npy") or info.holds("users/seen_rows.npy"):
        rows = read_vector(info, "users/seen_rows.npy", "<i4")
        _ascending_offsets(info, "users/seen_offsets.npy", users, len(rows))
        _verify_rows(info, "users/seen_rows.npy", rows, items)


def _verify_side(info: BundleInfo, side: str) -> int:
    """Check the keys and embeddings of users or of items; return the number of keys."""
    name = f"{side}s/keys.npy"
    keys = read_array(info.path, name)
    _verify_keys(info, name, keys)
    name = f"{side}s/embeddings.npy"
    numbers = read_array(info.path, name)
    if numbers.dtype == np.int8:
        name = f"{side}s/scales.npy"
        numbers = read_vector(info, name, "<f4")
    for block, _ in _blocks(numbers):
        if not np.isfinite(block).all():
            raise invalid_bundle(info.path / name, "holds numbers that are not finite")
    return len(keys)


def _verify_keys(info: BundleInfo, name: str, keys: Array) -> None:
    for block, following in _blocks(keys):
        if not (following > block[: len(following)]).all():
            raise invalid_bundle(info.path / name, "does not hold unique keys in ascending order")
        if block.dtype.kind == "S" and block.dtype.itemsize:
            letters = np.ascontiguousarray(block).view(np.uint8).reshape(len(block), -1)
            # The keys are decoded as one text. So also check that no key starts in the middle of a
            # character.
            if (letters[:, 0] & 0xC0 == 0x80).any() or not _is_utf8(letters):
                raise invalid_bundle(info.path / name, "holds keys that are not UTF-8 text")


def _verify_filter(info: BundleInfo, folder: str, items: int) -> None:
    """Check that a filter's values are unique and sorted and that each value's rows ascend."""
    name = f"{folder}values.npy"
    values = read_array(info.path, name)
    if values.ndim != 1 or (values.dtype.kind != "S" and values.dtype != np.dtype("<i8")):
        raise unexpected_array(info, name, values, "bytes or int64 of one dimension")
    _verify_keys(info, name, values)
    name = f"{folder}rows.npy"
    rows = read_vector(info, name, "<i4")
    offsets = _ascending_offsets(info, f"{folder}offsets.npy", len(values), len(rows))
    _verify_rows(info, name, rows, items)
    falls = np.flatnonzero(rows[1:] <= rows[:-1]) + 1
    if not np.isin(falls, offsets).all():
        raise invalid_bundle(info.path / name, "does not ascend within a value")


def _ascending_offsets(info: BundleInfo, name: str, parts: int, size: int) -> Array:
    offsets = read_offsets(info, name, parts, size)
    if (offsets[1:] < offsets[:-1]).any():
        raise invalid_bundle(info.path / name, "does not ascend")
    return offsets


def _verify_rows(info: BundleInfo, name: str, rows: Array, items: int) -> None:
    if rows.size and not (rows.min() >= 0 and rows.max() < items):
        raise invalid_bundle(info.path / name, f"holds rows outside of {items} items")


def _blocks(array: Array) -> Iterator[tuple[Array, Array]]:
    """Yield each block of rows with the same block shifted by one row, to compare neighbours."""
    for start in range(0, len(array), BLOCK_ROWS):
        yield array[start : start + BLOCK_ROWS], array[start + 1 : start + BLOCK_ROWS + 1]


def _is_utf8(letters: Array) -> bool:
    try:
        letters.tobytes().decode()
    except UnicodeDecodeError:
        return False
    return True
