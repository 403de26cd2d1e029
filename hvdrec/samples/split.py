"""Assign rows to splits, which have numbers: 0 is train, 1 validation, 2 test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.config.data_sections import Split
from hvdrec.errors import UserError, invalid_value

Array = NDArray[Any]
SPLIT_ROWS = 3
"""A user with at least this many rows has rows in all splits, if the method splits by user."""
UPPER_BITS = 16
HASHED_ROWS = 1_048_576
SPLITS = ("train", "validation", "test")
PAST = -1
"""Split of the rows that belong to no split, because they are not newer than
``samples.split.after``."""
RANDOM = ("random", "random-per-user")
"""Split methods that ignore time."""
STATES = ("train", "validation", "all")
"""The features and histories of users change with each row. A state names the last split whose rows
they include: "train", "validation" (with the training split) or "all" (with test, too)."""


def user_states(method: str) -> dict[str, str]:
    """Return, for validation and test, the state of `STATES` with which users are evaluated.

    If the splits follow each other in time, the validation rows of a user are older than the test
    rows, so the state for test includes them. In a random split they may be newer, so this state
    includes training rows only.
    """
    return {"validation": "train", "test": "train" if method in RANDOM else "validation"}


@dataclass(frozen=True)
class Splitter:
    """Assigns rows to splits, a batch at a time.

    The rows are sorted by user, and by time within each user; a row's number is its position.

    Attributes:
        split: Method and fractions.
        starts: Number of the first row of each user, then the number of all rows, int64
            [users + 1].
        cuts: For a temporal split: the last times of train and of validation.
        limits: For a random split: the smallest hashes of validation rows and of test rows.
    """

    split: Split
    starts: Array
    cuts: tuple[float, float] = (0, 0)
    limits: tuple[int, int] = (0, 0)

    @staticmethod
    def of(split: Split, user_rows: Array, cuts: tuple[float, float] | None = None) -> Splitter:
        """Prepare to split rows.

        Args:
            split: Method and fractions.
            user_rows: Number of rows of each user, int64 [users].
            cuts: For a temporal split: the last times of train and of validation.
        """
        starts = np.concatenate([[0], np.cumsum(user_rows)])
        rows = int(starts[-1])
        if split.method == "temporal":
            assert cuts is not None
            return Splitter(split, starts, cuts)
        if split.method == "random":
            train, validation, _ = split.fractions
            sizes = (round(train * rows), round((train + validation) * rows))
            limits = [_nth_hash(rows, size, split.seed) for size in sizes]
            return Splitter(split, starts, limits=(limits[0], limits[1]))
        return Splitter(split, starts)

    def users(self, first: int, rows: int) -> Array:
        """Return the user codes of the rows from number `first`, int64 [rows]."""
        low = int(np.searchsorted(self.starts, first, side="right")) - 1
        high = int(np.searchsorted(self.starts, first + rows, side="left"))
        code = np.repeat(np.arange(low, high), np.diff(self.starts[low : high + 1]))
        return np.asarray(code[first - self.starts[low] :][:rows])

    def assign(self, first: int, position: Array, time: Array | None) -> Array:
        """Return the splits of all rows of some users, as indices into `SPLITS`, or `PAST`.

        Args:
            first: Number of the first row.
            position: Number that each row would have if the rows of each user were sorted by item,
                int64 [rows]. The random methods use it, because it does not depend on times.
            time: Numbers by which a temporal split orders the rows [rows].

        Returns:
            int8 [rows].
        """
        rows = len(position)
        match self.split.method:
            case "temporal":
                assert time is not None
                cut = _cut(time > self.cuts[0], time > self.cuts[1])
                if self.split.after is not None:
                    cut = np.where(time > self.split.after, cut, PAST)
            case "random":
                hashed = hash64(position, self.split.seed)
                cut = _cut(hashed >= self.limits[0], hashed >= self.limits[1])
            case "random-per-user":
                cut = self._random_per_user(first, position)
            case "leave-last-out":
                user = self.users(first, rows)
                left = self.starts[user + 1] - np.arange(first, first + rows)
                count = np.diff(self.starts)[user]
                # All rows of a user with fewer than three rows are training rows.
                cut = np.where(count < SPLIT_ROWS, 0, _cut(left <= 2, left <= 1))
        return np.asarray(cut.astype(np.int8))

    def _random_per_user(self, first: int, position: Array) -> Array:
        """Split the rows of each user at random.

        The numbers of validation and test rows are rounded down, but a user with three or more rows
        has at least one row in every split.
        """
        user, number = self.users(first, len(position)), np.arange(len(position))
        order = np.lexsort((hash64(position, self.split.seed), user))
        rank = np.empty(len(position), dtype=np.int64)
        rank[order] = first + number - self.starts[user]
        count = np.diff(self.starts)[user]
        validation, test = (
            np.maximum(np.floor(fraction * count + 1e-9), 1).astype(np.int64)
            for fraction in self.split.fractions[1:]
        )
        return np.where(count < SPLIT_ROWS, 0, _cut(rank < validation + test, rank < test))


def shuffle_keys(index: Array, seed: int) -> Array:
    """Return the numbers by which rows are sorted to shuffle them, int64 [n].

    Args:
        index: A different number for each row, int64 [n].
        seed: Seed of the order.
    """
    # Flip the highest bit, so that signed integers have the order of the unsigned hashes.
    return (hash64(index, seed) ^ np.uint64(2**63)).view(np.int64)


def hash64(values: Array, seed: int) -> Array:
    """Hash integers to uint64 with a seeded SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = values.astype(np.uint64)
    for salt in (np.uint64(seed % 2**64), np.uint64(0)):
        x = x + salt + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return x


def _nth_hash(rows: int, index: int, seed: int) -> int:
    """Hash the numbers from 0 to rows - 1; return the hash that has `index` smaller ones.

    A first pass counts hashes by their upper bits, so that a second pass holds only those with the
    right upper bits in memory.
    """
    if index >= rows:
        return 2**64 - 1
    shift = np.uint64(64 - UPPER_BITS)

    def blocks() -> Iterator[Array]:
        for start in range(0, rows, HASHED_ROWS):
            yield hash64(np.arange(start, min(start + HASHED_ROWS, rows)), seed)

    counts = np.zeros(2**UPPER_BITS, dtype=np.int64)
    for hashed in blocks():
        counts += np.bincount((hashed >> shift).astype(np.int64), minlength=len(counts))
    ends = np.cumsum(counts)
    upper = int(np.searchsorted(ends, index, side="right"))
    inside = np.concatenate([h[(h >> shift) == np.uint64(upper)] for h in blocks()])
    return int(np.sort(inside)[index - int(ends[upper] - counts[upper])])


def _cut(after_train: Array, after_validation: Array) -> Array:
    """Return the split of each row, 0, 1 or 2: the number of splits that it comes after."""
    return after_train.astype(np.int8) + after_validation


def time_cuts(split: Split, histogram: str, rows: int) -> str:
    """Return the SQL query that finds the cuts of a temporal split.

    Its columns are `first` and `second`, the last times of train and validation, and
    `distinct_times`. The rows of one time stay together, so the shares of the splits are only close
    to the fractions; each split has at least one time.

    Args:
        split: The fractions.
        histogram: SQL query of the distinct times `t` and their numbers of rows `c`.
        rows: Number of all rows.
    """
    train, validation, _ = split.fractions
    return f"""
        WITH ends AS (
            SELECT t, CAST(sum(c) OVER (ORDER BY t) AS DOUBLE) AS e,
                row_number() OVER (ORDER BY t) AS i, count(*) OVER () AS n
            FROM ({histogram})
        ), one AS (
            SELECT t, i FROM ends WHERE i <= n - 2
            ORDER BY abs(e - {train * rows!r}), t LIMIT 1
        ), two AS (
            SELECT ends.t FROM ends, one WHERE ends.i > one.i AND ends.i <= n - 1
            ORDER BY abs(e - {(train + validation) * rows!r}), ends.t LIMIT 1
        )
        SELECT (SELECT t FROM one) AS first, (SELECT t FROM two) AS second,
            (SELECT count(*) FROM ends) AS distinct_times
    """


def few_times(column: str, times: int) -> UserError:
    """Build the error for a column with fewer than three distinct times."""
    problem = (
        f"has {times} distinct values, a temporal split needs 3 or more "
        "(rows of one time stay together)"
    )
    remedy = "choose another column or method = 'random'"
    return invalid_value("samples.split.column", column, problem, remedy)


def few_new_times(split: Split, times: int) -> UserError:
    """Build the error if fewer than three distinct times are newer than ``samples.split.after``."""
    problem = f"leaves rows of {times} distinct times, a temporal split needs 3 or more"
    return invalid_value("samples.split.after", split.after, problem, "choose a smaller value")


def empty_split(
    split: Split, name: str, user_rows: Array, span: tuple[float, float], column: str
) -> UserError:
    """Build the error for an empty split.

    Args:
        split: Method and fractions.
        name: Name of the split.
        user_rows: Number of rows of each user, int64 [users].
        span: Smallest and largest time, for temporal splits.
        column: Name of the time column.
    """
    empty = f"the {name} split is empty"
    if split.method in ("random-per-user", "leave-last-out"):
        most = int(user_rows.max())
        problem = f"{empty}: no user has 3 or more rows (the maximum is {most})"
        return invalid_value("samples.split.method", split.method, problem, "choose another method")
    if split.method == "temporal":
        problem = f"{empty}: '{column}' ranges from {span[0]:g} to {span[1]:g}"
        remedy = "choose boundaries that leave rows on each side"
        return invalid_value("samples.split.boundaries", list(split.boundaries), problem, remedy)
    problem = f"{empty} with {int(user_rows.sum())} rows"
    remedy = "provide more rows or other fractions"
    return invalid_value("samples.split.fractions", list(split.fractions), problem, remedy)
