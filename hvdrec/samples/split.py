"""Which split a row belongs to: 0 train, 1 validation, 2 test."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.config.sections import Samples
from hvdrec.errors import UserError

Array = NDArray[Any]
SPLITS = ("train", "validation", "test")
RANDOM = ("random", "random-per-user")
"""Methods that divide without regard to time."""


def split_rows(samples: Samples, user: Array, time: Array | None) -> Array:
    """Return int8 [n].

    user: int64 codes [n]; time: sortable numbers [n], the column that orders the rows, if there is
    one. Rows come in an order that depends on the data alone; the random methods depend on nothing
    but that order and the seed. Raises UserError where a split would be empty.
    """
    split = samples.split
    match split.method:
        case "temporal":
            assert time is not None
            found = _by_boundaries(samples, time) if split.boundaries else _by_time(samples, time)
        case "random":
            found = _random(len(user), split.fractions, split.seed)
        case "random-per-user":
            found = _random_per_user(user, split.fractions, split.seed)
        case "leave-last-out":
            assert time is not None
            found = _last_out(user, time)
    for number, name in enumerate(SPLITS):
        if not (found == number).any():
            raise UserError(
                f"samples.split: the {name} split is empty: {_reason(samples, time, user)}"
            )
    return found


def shuffled(rows: int, seed: int) -> Array:
    """Return a permutation of 0 … rows - 1, int64 [rows], the same on every machine and version."""
    return np.argsort(_mixed(np.arange(rows), seed), kind="stable")


def _mixed(values: Array, seed: int) -> Array:
    """Return uint64 hashes of integers: SplitMix64 (Steele, Lea and Flood, 2014), seeded."""
    x = values.astype(np.uint64)
    for salt in (np.uint64(seed % 2**64), np.uint64(0)):
        x = x + salt + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return x


def _by_time(samples: Samples, time: Array) -> Array:
    """Cut between different times, as near to the fractions as three filled splits allow."""
    distinct, rank, counts = np.unique(time, return_inverse=True, return_counts=True)
    if len(distinct) < len(SPLITS):
        column = samples.split.column or samples.time
        raise UserError(
            f"samples.split: '{column}' has {len(distinct)} different values, a temporal split "
            "needs 3 or more (rows of one time stay together); take another column "
            "or method = 'random'"
        )
    train, validation, _ = samples.split.fractions
    ends = np.cumsum(counts)
    first = int(np.argmin(np.abs(ends[:-2] - train * len(time)))) + 1
    second = first + 1 + int(np.argmin(np.abs(ends[first:-1] - (train + validation) * len(time))))
    return (rank >= first).astype(np.int8) + (rank >= second)


def _by_boundaries(samples: Samples, time: Array) -> Array:
    train, validation = samples.split.boundaries
    return (time > train).astype(np.int8) + (time > validation)


def _random(rows: int, fractions: tuple[float, float, float], seed: int) -> Array:
    found = np.empty(rows, dtype=np.int8)
    first, second = round(fractions[0] * rows), round((fractions[0] + fractions[1]) * rows)
    rank = np.arange(rows)
    found[shuffled(rows, seed)] = (rank >= first).astype(np.int8) + (rank >= second)
    return found


def _random_per_user(user: Array, fractions: tuple[float, float, float], seed: int) -> Array:
    """Shares of validation and test are rounded down, but at least one row of a user with three."""
    rank, count = _rank_in_user(user, _mixed(np.arange(len(user)), seed))
    validation, test = (
        np.maximum(np.floor(share * count + 1e-9), 1).astype(np.int64) for share in fractions[1:]
    )
    found = (rank < validation + test).astype(np.int8) + (rank < test)
    return np.where(count < len(SPLITS), 0, found).astype(np.int8)


def _last_out(user: Array, time: Array) -> Array:
    """A user's last row is test, the one before validation; users with fewer than 3 only train."""
    rank, count = _rank_in_user(user, time)
    found = (rank >= count - 2).astype(np.int8) + (rank == count - 1)
    return np.where(count < len(SPLITS), 0, found).astype(np.int8)


def _rank_in_user(user: Array, value: Array) -> tuple[Array, Array]:
    """Return each row's place among its user's rows, by value, then row, and their number."""
    order = np.lexsort((value, user))
    ordered = user[order]
    start = np.searchsorted(ordered, ordered)
    rank = np.empty(len(user), dtype=np.int64)
    rank[order] = np.arange(len(user)) - start
    return rank, np.bincount(user)[user]


def _reason(samples: Samples, time: Array | None, user: Array) -> str:
    split = samples.split
    if split.method in ("random-per-user", "leave-last-out"):
        most = int(np.bincount(user).max())
        return f"no user has 3 rows or more (the most is {most}); take another samples.split.method"
    if split.method == "temporal" and time is not None:
        column = split.column or samples.time
        return (
            f"samples.split.boundaries = {list(split.boundaries)}, '{column}' runs from "
            f"{time.min():g} to {time.max():g}; choose boundaries that leave rows on each side"
        )
    return (
        f"samples.split.fractions = {list(split.fractions)} of {len(user)} rows; "
        "give more rows or other fractions"
    )
