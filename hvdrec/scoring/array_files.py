"""Memory-map a bundle's arrays and check their types and shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.scoring.bundle import BundleInfo, missing_file, regular_file
from hvdrec.scoring.errors import BundleError, first_line, invalid_bundle

Array = NDArray[Any]


def read_array(path: Path, name: str) -> Array:
    """Memory-map an array of the bundle at ``path``, read-only.

    Raises:
        BundleError: The file is missing, is outside the bundle or does not hold a plain array.
    """
    regular_file(path, name)
    try:
        with np.errstate(over="ignore"):  # a header may claim more than 2**63 bytes
            array = np.load(path / name, mmap_mode="r", allow_pickle=False)
        # Indexing a numpy.memmap takes several times as long as indexing a plain view.
        return array.view(np.ndarray)  # type: ignore[no-any-return]
    except (AttributeError, EOFError, MemoryError, OSError, OverflowError, ValueError) as error:
        raise invalid_bundle(path / name, f"cannot be read ({first_line(error)})") from None


def read_vector(info: BundleInfo, name: str, dtype: str, length: int | None = None) -> Array:
    """Memory-map an array of one dimension; a ``length`` of None accepts any length.

    Raises:
        BundleError: The manifest does not list the file, or the array has another type or shape.
    """
    if not info.holds(name):
        raise missing_file(info, name)
    array = read_array(info.path, name)
    if array.dtype != np.dtype(dtype) or array.ndim != 1 or length not in (None, len(array)):
        expected = f"{np.dtype(dtype)} of shape ({'n' if length is None else length},)"
        raise unexpected_array(info, name, array, expected)
    return array


def read_offsets(info: BundleInfo, name: str, parts: int, size: int) -> Array:
    """Memory-map offsets, int64 [parts + 1], that divide ``size`` values into consecutive parts.

    Only the first and the last offset are checked; `hvdrec.scoring.verify` checks the others.
    """
    offsets = read_vector(info, name, "<i8")
    if offsets.shape != (parts + 1,) or offsets[0] != 0 or offsets[-1] != size:
        raise invalid_bundle(info.path / name, f"does not divide {size} values into {parts} parts")
    return offsets


def unexpected_array(info: BundleInfo, name: str, array: Array, expected: str) -> BundleError:
    """Build the error for an array of another type or shape."""
    problem = f"is {array.dtype} of shape {array.shape}, expected {expected}"
    return invalid_bundle(info.path / name, problem)
