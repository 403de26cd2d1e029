"""The initial values of embedding rows, which do not depend on the number of ranks."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdrec.config.schema import FIRST_CODE
from hvdrec.embeddings.placement import TableGroup

Array = NDArray[Any]
BLOCK_ROWS = 1 << 18


def fill_initial_rows(
    group: TableGroup, weight: Tensor, rank: int, seed: int, deviation: float
) -> None:
    """Write the initial values of a group's rows on a rank into `weight` [local_rows, width].

    `deviation` is the standard deviation of the values.
    """
    with torch.no_grad():
        for table, offset in group.offsets.items():
            ids = group.local_ids(table, rank)
            for start in range(0, len(ids), BLOCK_ROWS):
                block = ids[start : start + BLOCK_ROWS]
                values = initial_rows(table, block, group.width, seed, deviation)
                first = offset + start
                weight[first : first + len(block)] = torch.from_numpy(values)


def initial_rows(table: str, ids: Array, width: int, seed: int, deviation: float) -> Array:
    """Return the initial values of rows, float64 [n, width], uniform around zero.

    A value depends only on (seed, table, row, column), so each rank can compute the rows that it
    holds. Row 0 (missing values) and row 1 (unknown values) are zero. Source of the random numbers:
    Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64).

    `ids` are row numbers, int64 [n]; `deviation` is the standard deviation of the values.
    """
    key = np.uint64((zlib.crc32(table.encode()) << 32) ^ (seed & 0xFFFFFFFF))
    columns = np.arange(width, dtype=np.uint64)
    with np.errstate(over="ignore"):
        start = _mix(np.asarray(key))
        cells = ids.astype(np.uint64)[:, None] * np.uint64(width) + columns
        mixed = _mix(start + (cells + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    fraction = (mixed >> np.uint64(11)).astype(np.float64) / 2**53
    values = (2 * fraction - 1) * deviation * np.sqrt(3.0)
    values[ids < FIRST_CODE] = 0.0
    return np.asarray(values)


def _mix(value: Array) -> Array:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(value ^ (value >> np.uint64(31)))
