"""The queries over the training split that fitting needs; each engine implements them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hvdrec.config.schema import MISSING_INT, Column

if TYPE_CHECKING:
    import duckdb

MISSING_SQL = {"string": "''", "int": f"CAST('{MISSING_INT}' AS BIGINT)", "float": "NULL"}
"""Declared type of a feature -> SQL of the value that stands for a missing one, besides NULL."""
MAGNITUDE_SQL = "sign(v) * ln(1 + abs(v))"
"""SQL of the transform "log"."""


class SortedNumbers(ABC):
    """The finite numbers of a column in ascending order; an engine may keep them on disk.

    Attributes:
        count: Length of the list of numbers, with repeats.
    """

    count: int

    @abstractmethod
    def at(self, positions: Sequence[int]) -> NDArray[np.float64]:
        """Return the numbers at ascending positions in [0, count), float64 [positions]."""

    @abstractmethod
    def largest_below(self, limits: NDArray[Any]) -> NDArray[Any]:
        """Return the largest number below each limit, or -infinity if there is none.

        Args:
            limits: Ascending, float32 or float64 [limits]. Numbers are compared in this type, see
                `in_precision`. The result has the same type and shape.
        """


class TrainingSplit(ABC):
    """Aggregates over the rows of the training split, for fitting.

    The memory of this process depends on the number of distinct values of features that have a
    vocabulary, not on the number of rows.
    """

    @abstractmethod
    def occurrences(self, column: Column, after: float | None = None) -> pa.Table:
        """Count the values of a raw column, or the entries of its lists, without missing ones.

        Args:
            column: The column.
            after: Count only rows later than this day, in days since 1970; None for all rows.

        Returns:
            Columns ``value``, ``count`` and ``day``: the newest day of a row with this value, null
            if the samples have no times. Rows are sorted by decreasing count, then by value
            (strings by their bytes). So the same data always gives the same codes.
        """

    @property
    @abstractmethod
    def newest_day(self) -> float | None:
        """Day of the newest row, in days since 1970; None if the samples have no times."""

    @abstractmethod
    def moments(self, column: Column, transform: str) -> tuple[float | None, float | None]:
        """Return mean and population standard deviation of the finite numbers of a column.

        Args:
            column: A column of integers or floats.
            transform: "log" for the moments of `MAGNITUDE_SQL`.

        Returns:
            The two moments; None if there are no numbers. With DuckDB, they are the same bit for
            bit in each run; on a cluster, they may differ by rounding.
        """

    @abstractmethod
    def sorted_numbers(self, column: Column) -> AbstractContextManager[SortedNumbers]:
        """Sort the finite numbers of a column, for use in the ``with`` body."""

    @abstractmethod
    def values(self, column: Column) -> duckdb.DuckDBPyRelation:
        """Return the values of a raw column, without missing ones, as column ``v`` of a relation.

        For a column of lists, these are the entries of the lists. Column ``day`` is the day of the
        row; null if the samples have no times.

        Raises:
            UserError: The engine is not DuckDB.
        """


def time_unit(largest: float | None) -> float:
    """Guess the unit of numeric times from the largest absolute time; return the units per second.

    Times are seconds (1.0) or, if they are large, ms (1e3), us (1e6) or ns (1e9).
    """
    return next((d for d in (1e9, 1e6, 1e3) if (largest or 0) >= 1e8 * d), 1.0)


def in_precision(numbers: NDArray[np.float64], dtype: Any) -> NDArray[Any]:
    """Convert float64 numbers to `dtype`, which is float32 or float64.

    Numbers beyond the range of float32 become its largest or smallest number.
    """
    if dtype == np.float64:
        return numbers
    largest = np.finfo(dtype).max
    return np.clip(numbers, -largest, largest).astype(dtype)


def pick(
    positions: NDArray[np.int64], start: int, values: NDArray[np.float64], counts: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Find numbers by position in a part of the sorted numbers.

    Args:
        positions: Positions among all numbers.
        start: Position of the first number of the part.
        values: The distinct numbers of the part, ascending.
        counts: How often each of them occurs.

    Returns:
        A mask of the positions in the part, and the numbers at these positions.
    """
    ends = start + np.cumsum(counts)
    inside = (positions >= start) & (positions < (ends[-1] if len(ends) else start))
    return inside, values[np.searchsorted(ends, positions[inside], side="right")]


def below(limits: NDArray[Any], values: NDArray[np.float64]) -> NDArray[Any]:
    """Return the same as `SortedNumbers.largest_below`, for ascending values in memory."""
    numbers = in_precision(values, limits.dtype)
    if not len(numbers):
        return np.full_like(limits, -np.inf)
    index = np.searchsorted(numbers, limits)
    lowest = np.array(-np.inf, limits.dtype)
    return np.where(index > 0, numbers[np.maximum(index - 1, 0)], lowest)
