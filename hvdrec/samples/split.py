"""Assign rows to splits, which have numbers: 0 is train, 1 validation, 2 test."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.config.data_sections import Split
from hvdrec.errors import UserError, invalid_value

Array = NDArray[Any]
SPLITS = ("train", "validation", "test")
RANDOM = ("random", "random-per-user")
"""Split methods that ignore time."""
STATES = ("train", "validation", "all")
"""The features and histories of users change with each row. A state names the last split whose rows
they include: "train", "validation" (with the training split) or "all" (with test, too)."""


def user_states(method: str) -> dict[str, str]:
    """Return, for validation and test, the state of `STATES` with which users are evaluated.

    If the splits follow each other in time, the validation rows of a user are older than the test
    rows, so they are included for test. In a random split they are not, so only training rows are.
    """
    return {"validation": "train", "test": "train" if method in RANDOM else "validation"}


def count_copies(group: Array, split: Array) -> dict[str, int]:
    """Return, for validation and test, the number of rows that have a copy in an earlier split.

    Args:
        group: A number for each row, from 0; copies have the same number, int64 [n].
        split: Split of each row, as an index into `SPLITS`, int8 [n].
    """
    first = np.full(int(group.max(initial=-1)) + 1, len(SPLITS), dtype=split.dtype)
    np.minimum.at(first, group, split)
    is_copy = split > first[group]
    return {SPLITS[i]: int((is_copy & (split == i)).sum()) for i in (1, 2)}


def split_rows(split: Split, user: Array, time: Array | None, column: str) -> Array:
    """Assign each of n rows to a split; the result depends only on the arguments.

    Args:
        split: Method and fractions.
        user: User code of each row, int64 [n].
        time: Numbers by which the rows are ordered [n]; None for methods that ignore time.
        column: Name of the time column, for error messages.

    Returns:
        Split of each row, as an index into `SPLITS`, int8 [n].

    Raises:
        UserError: A split is empty.
    """
    match split.method:
        case "temporal":
            assert time is not None
            if split.boundaries:
                number = _cut(time > split.boundaries[0], time > split.boundaries[1])
            else:
                number = _by_time(split.fractions, time, column)
        case "random":
            number = _random(split, len(user))
        case "random-per-user":
            number = _random_per_user(split, user)
        case "leave-last-out":
            assert time is not None
            rank, count = _rank_in_user(user, time)
            # All rows of a user with fewer than three rows are training rows.
            number = np.where(count < 3, 0, _cut(rank >= count - 2, rank == count - 1))
    for i, name in enumerate(SPLITS):
        if not (number == i).any():
            raise _empty(split, name, user, time, column)
    return number.astype(np.int8)


def shuffled(rows: int, seed: int) -> Array:
    """Return a permutation of 0 to rows - 1, int64 [rows], the same on all machines."""
    return np.argsort(_hash(np.arange(rows), seed), kind="stable")


def _hash(values: Array, seed: int) -> Array:
    """Hash integers to uint64 with a seeded SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = values.astype(np.uint64)
    for salt in (np.uint64(seed % 2**64), np.uint64(0)):
        x = x + salt + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return x


def _cut(after_train: Array, after_validation: Array) -> Array:
    """Return 0, 1 or 2 for each row: the number of its split, given which splits it is after."""
    return after_train.astype(np.int8) + after_validation


def _by_time(fractions: tuple[float, float, float], time: Array, column: str) -> Array:
    """Split between distinct times, close to the fractions; each split gets at least one time."""
    distinct, rank, counts = np.unique(time, return_inverse=True, return_counts=True)
    if len(distinct) < len(SPLITS):
        problem = (
            f"has {len(distinct)} distinct values, a temporal split needs 3 or more "
            "(rows of one time stay together)"
        )
        raise invalid_value(
            "samples.split.column", column, problem, "choose another column or method = 'random'"
        )
    train, validation, _ = fractions
    ends = np.cumsum(counts)
    first = int(np.argmin(np.abs(ends[:-2] - train * len(time)))) + 1
    second = first + 1 + int(np.argmin(np.abs(ends[first:-1] - (train + validation) * len(time))))
    return _cut(rank >= first, rank >= second)


def _random(split: Split, rows: int) -> Array:
    train, validation, _ = split.fractions
    number, rank = np.empty(rows, dtype=np.int8), np.arange(rows)
    number[shuffled(rows, split.seed)] = _cut(
        rank >= round(train * rows), rank >= round((train + validation) * rows)
    )
    return number


def _random_per_user(split: Split, user: Array) -> Array:
    """Split the rows of each user at random.

    Counts are rounded down, but a user with three or more rows has a row in every split.
    """
    rank, count = _rank_in_user(user, _hash(np.arange(len(user)), split.seed))
    validation, test = (
        np.maximum(np.floor(fraction * count + 1e-9), 1).astype(np.int64)
        for fraction in split.fractions[1:]
    )
    return np.where(count < 3, 0, _cut(rank < validation + test, rank < test))


def _rank_in_user(user: Array, value: Array) -> tuple[Array, Array]:
    """Return each row's rank among its user's rows, by value then row, and the user's row count."""
    order = np.lexsort((value, user))
    ordered = user[order]
    start = np.searchsorted(ordered, ordered)
    rank = np.empty(len(user), dtype=np.int64)
    rank[order] = np.arange(len(user)) - start
    return rank, np.bincount(user)[user]


def _empty(split: Split, name: str, user: Array, time: Array | None, column: str) -> UserError:
    """Build the error for an empty split."""
    empty = f"the {name} split is empty"
    if split.method in ("random-per-user", "leave-last-out"):
        most = int(np.bincount(user).max())
        problem = f"{empty}: no user has 3 or more rows (the maximum is {most})"
        return invalid_value("samples.split.method", split.method, problem, "choose another method")
    if split.method == "temporal" and time is not None:
        problem = f"{empty}: '{column}' ranges from {time.min():g} to {time.max():g}"
        remedy = "choose boundaries that leave rows on each side"
        return invalid_value("samples.split.boundaries", list(split.boundaries), problem, remedy)
    problem = f"{empty} with {len(user)} rows"
    remedy = "provide more rows or other fractions"
    return invalid_value("samples.split.fractions", list(split.fractions), problem, remedy)
