"""Times of samples as numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Array = NDArray[Any]
DAY = 86_400
EPOCH_SECONDS = (1e8, 1e11)
"""Smallest and largest number taken for a time in seconds since 1970 (years 1973 to 5138). Numbers
that are 1e3, 1e6 or 1e9 times as large are milli-, micro- or nanoseconds. Smaller numbers are not
times."""


def comparable_times(column: pa.ChunkedArray | pa.Array) -> tuple[str, Array] | None:
    """Convert a column of times to numbers that can be compared.

    Returns:
        For dates and timestamps, "timestamp" and seconds since 1970; for numbers, "number" and the
        values themselves. The numbers are float64 [n], NaN for null. None for other columns.
    """
    dtype = column.type
    if pa.types.is_timestamp(dtype):
        units = {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}
        return "timestamp", _floats(column.cast(pa.int64())) / units[dtype.unit]
    if pa.types.is_date(dtype):
        return "timestamp", _floats(column.cast(pa.date32()).cast(pa.int32())) * DAY
    if pa.types.is_integer(dtype) or pa.types.is_floating(dtype) or pa.types.is_decimal(dtype):
        return "number", _floats(column)
    return None


def epoch_seconds(time: Array, time_type: str) -> Array | None:
    """Convert times that `comparable_times` returned to seconds since 1970.

    Returns:
        Seconds, float64 [n]; None if the numbers cannot be times.
    """
    if time_type == "timestamp":
        return time
    latest = time.max(initial=0.0)
    for divisor in (1.0, 1e3, 1e6, 1e9):
        if EPOCH_SECONDS[0] <= latest / divisor < EPOCH_SECONDS[1]:
            return np.asarray(time / divisor)
    return None


def _floats(column: pa.ChunkedArray | pa.Array) -> Array:
    values = column.cast(pa.float64(), safe=False).fill_null(np.nan)
    is_chunked = isinstance(values, pa.ChunkedArray)
    return np.asarray(values.to_numpy() if is_chunked else values.to_numpy(zero_copy_only=False))
