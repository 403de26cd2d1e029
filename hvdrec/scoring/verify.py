"""What a bundle's arrays must hold, beyond types and shapes: read whole, where it is verified."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.scoring.bundle import BundleInfo, read_array
from hvdrec.scoring.errors import BundleError

Array = NDArray[Any]
BLOCK_ROWS = 1 << 18


def verify_arrays(info: BundleInfo) -> None:
    """Read every array of a bundle; BundleError where one holds what no exporter writes.

    Keys must ascend, each once, and strings be UTF-8: the search for a key relies on it. Numbers
    must be finite, offsets ascend from 0 to the end of what they cut, rows be rows of the other
    side. Memory is bounded: arrays are read in blocks.
    """
    users, items = _check_side(info, "user"), _check_side(info, "item")
    if info.holds("items/titles.npy") or info.holds("items/titles_offsets.npy"):
        blob = _listed(info, "items/titles.npy", "|u1")
        offsets = _offsets(info, "items/titles_offsets.npy", items, len(blob))
        starts = offsets[:-1][offsets[:-1] < len(blob)]
        if not _is_text(blob) or (blob[starts] & 0xC0 == 0x80).any():
            raise _damaged(info, "items/titles.npy", "is no UTF-8 text")
    for name in ("items/popularity.npy", "items/trending.npy"):
        if info.holds(name):
            counts = _listed(info, name, "<i8")
            if counts.shape != (items,) or (counts < 0).any():
                raise _damaged(info, name, f"is not a count for each of {items} items")
    for name in sorted(info.manifest["files"]):
        if name.startswith("items/filters/") and name.endswith("/values.npy"):
            _check_filter(info, name.removesuffix("values.npy"), items)
    if info.holds("users/seen_offsets.npy") or info.holds("users/seen_rows.npy"):
        rows = _listed(info, "users/seen_rows.npy", "<i4")
        _offsets(info, "users/seen_offsets.npy", users, len(rows))
        _check_rows(info, "users/seen_rows.npy", rows, items)


def _check_side(info: BundleInfo, side: str) -> int:
    """Check keys and embeddings of one side and return how many there are."""
    name = f"{side}s/keys.npy"
    keys = read_array(info.path, name)
    _check_keys(info, name, keys)
    name = f"{side}s/embeddings.npy"
    embeddings = read_array(info.path, name)
    names = [(name, embeddings)]
    if embeddings.dtype == np.int8:
        name = f"{side}s/scales.npy"
        names = [(name, _listed(info, name, "<f4"))]
    for name, array in names:
        for part, _ in _blocks(array):
            if not np.isfinite(part).all():
                raise _damaged(info, name, "holds numbers that are not finite")
    return len(keys)


def _check_keys(info: BundleInfo, name: str, keys: Array) -> None:
    for part, following in _blocks(keys):
        if not (following > part[: len(following)]).all():
            raise _damaged(info, name, "does not hold keys in ascending order, each once")
        if part.dtype.kind == "S" and part.dtype.itemsize:
            letters = np.ascontiguousarray(part).view(np.uint8).reshape(len(part), -1)
            if (letters[:, 0] & 0xC0 == 0x80).any() or not _is_text(letters):
                raise _damaged(info, name, "holds keys that are no UTF-8 text")


def _check_filter(info: BundleInfo, folder: str, items: int) -> None:
    """Check postings: distinct values, and for each of them the rows of its items, ascending."""
    values = read_array(info.path, f"{folder}values.npy")
    if values.ndim != 1 or (values.dtype.kind != "S" and values.dtype != np.dtype("<i8")):
        raise _damaged(info, f"{folder}values.npy", f"is {values.dtype}, expected bytes or int64")
    _check_keys(info, f"{folder}values.npy", values)
    rows = _listed(info, f"{folder}rows.npy", "<i4")
    offsets = _offsets(info, f"{folder}offsets.npy", len(values), len(rows))
    _check_rows(info, f"{folder}rows.npy", rows, items)
    falls = np.flatnonzero(rows[1:] <= rows[:-1]) + 1
    if not np.isin(falls, offsets).all():
        raise _damaged(info, f"{folder}rows.npy", "does not ascend within a value")


def _offsets(info: BundleInfo, name: str, entries: int, size: int) -> Array:
    """Return offsets int64 [entries + 1], ascending from 0 to ``size``; BundleError otherwise."""
    offsets = _listed(info, name, "<i8")
    if (
        offsets.shape != (entries + 1,)
        or offsets[0] != 0
        or offsets[-1] != size
        or (offsets[1:] < offsets[:-1]).any()
    ):
        raise _damaged(
            info, name, f"does not cut {size} values into {entries} parts, one behind the other"
        )
    return offsets


def _check_rows(info: BundleInfo, name: str, rows: Array, count: int) -> None:
    if rows.size and not (rows.min() >= 0 and rows.max() < count):
        raise _damaged(info, name, f"holds rows that are not among {count} items")


def _listed(info: BundleInfo, name: str, dtype: str) -> Array:
    """Return an array of one dimension that the manifest lists; BundleError otherwise."""
    if not info.holds(name):
        raise BundleError(f"{info.path}: '{name}' is missing from the bundle; export it again")
    array = read_array(info.path, name)
    if array.ndim != 1 or array.dtype != np.dtype(dtype):
        raise _damaged(
            info,
            name,
            f"is {array.dtype} of shape {array.shape}, expected {np.dtype(dtype)} of one dimension",
        )
    return array


def _blocks(array: Array) -> Iterator[tuple[Array, Array]]:
    """Yield an array's rows in blocks, each with what follows each of its rows."""
    for start in range(0, len(array), BLOCK_ROWS):
        yield array[start : start + BLOCK_ROWS], array[start + 1 : start + BLOCK_ROWS + 1]


def _is_text(letters: Array) -> bool:
    try:
        letters.tobytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def _damaged(info: BundleInfo, name: str, what: str) -> BundleError:
    return BundleError(f"{info.path / name}: {what}; export the bundle again")
