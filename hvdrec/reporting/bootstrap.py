"""Confidence intervals by resampling users: the rows of a user depend on each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
SAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A mean with the interval that holds the middle 95 % of its bootstrap samples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """A difference of two means on the same users.

    Attributes:
        p_value: Two-sided p-value of "there is no difference": twice the share of bootstrap samples
            in which the difference has the less frequent sign, but at least 2 / samples.
    """

    p_value: float

    @property
    def is_significant(self) -> bool:
        """True if the p-value is below 0.05."""
        return self.p_value < 0.05


def user_weights(users: int, samples: int = SAMPLES, seed: int = 0) -> Array:
    """Return how often each user is drawn in each bootstrap sample, float64 [samples, users].

    Each sample draws as many users as there are, with replacement.
    """
    random = np.random.default_rng(seed)
    return random.multinomial(users, np.full(users, 1 / users), size=samples).astype(np.float64)


def intervals(
    values: Array, user: Array, weights: Array, own: Array | None = None
) -> list[Interval]:
    """Return the mean of each column of values, with its interval.

    Args:
        values: A value for each of n rows and each metric, float64 [n, metrics].
        user: User of each row, int64 [n], numbered from 0 without gaps.
        weights: Result of `user_weights`.
        own: Weight of each row, float64 [n]; None for 1.
    """
    sampled, mean = _means(values, user, weights, own)
    low, high = np.percentile(sampled, [2.5, 97.5], axis=0)
    return [Interval(*map(float, each)) for each in zip(mean, low, high, strict=True)]


def difference(one: Array, other: Array, user: Array, weights: Array) -> Difference:
    """Return the mean of `one` minus that of `other`, which are float64 [n] for the same n rows."""
    sampled, mean = _means((one - other)[:, None], user, weights, None)
    sampled = sampled[:, 0]
    opposite = min((sampled <= 0).mean(), (sampled >= 0).mean())
    low, high = np.percentile(sampled, [2.5, 97.5])
    p_value = min(1.0, 2 * max(float(opposite), 1 / len(sampled)))
    return Difference(float(mean[0]), float(low), float(high), p_value)


def _means(values: Array, user: Array, weights: Array, own: Array | None) -> tuple[Array, Array]:
    """Return the means of the columns in each sample [samples, metrics] and over all rows."""
    users = weights.shape[1]
    own = np.ones(len(user)) if own is None else own
    total = np.bincount(user, own, users)
    columns = (np.bincount(user, own * column, users) for column in values.T)
    sums = np.stack(list(columns), axis=1)
    sampled = (weights @ sums) / np.maximum(weights @ total, 1e-300)[:, None]
    return sampled, sums.sum(axis=0) / total.sum()
