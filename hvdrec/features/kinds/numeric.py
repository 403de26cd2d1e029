"""The kind ``numeric``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.config.schema import FIRST_CODE, MISSING, Feature
from hvdrec.errors import invalid_value
from hvdrec.features.kinds.kind import FittedFeature, Kind
from hvdrec.features.kinds.nodes import Nodes
from hvdrec.features.kinds.training_split import SortedNumbers, TrainingSplit, in_precision

TYPES: dict[str, type[np.floating[Any]]] = {"float32": np.float32, "double": np.float64}
LARGEST = 1e6
"""Standardized numbers are clipped to this many standard deviations."""


class Numeric(Kind):
    """One number per row: standardized, or replaced by the code of its quantile bucket.

    The fitted statistics are:

    - ``mean`` and ``deviation`` (the population standard deviation) of the finite values or of
      their logarithms;
    - ``boundaries``: the lower limits of all quantile buckets but the first, ascending and
      distinct;
    - ``precision``, "float32" or "double": the type in which values are compared with the
      boundaries.

    A boundary lies between two neighbouring training values. Floats are compared in float32, so
    that a price gets the same code whether it is stored in 32 or 64 bits. Integers, and floats with
    boundaries that would be equal in float32, are compared in double.
    """

    column_kind = "numeric"
    dtypes = ("int", "float")

    def is_embedded(self, feature: Feature) -> bool:
        """Return True if values become codes of quantile buckets."""
        return feature.transform == "quantile"

    def fit(self, feature: Feature, split: TrainingSplit) -> FittedFeature:
        """Learn mean and deviation, or the quantiles.

        Raises:
            UserError: The values have no finite mean or deviation.
        """
        [column] = self.columns(feature)
        if feature.transform == "quantile":
            with split.sorted_numbers(column) as numbers:
                boundaries, precision = _quantiles(numbers, feature)
            size = FIRST_CODE + len(boundaries) + 1
            statistics = {"boundaries": boundaries.tolist(), "precision": precision}
            return FittedFeature(feature, size, statistics=statistics)
        mean, deviation = _moments(split.moments(column, feature.transform), feature)
        return FittedFeature(feature, statistics={"mean": mean, "deviation": deviation})

    def compile(self, nodes: Nodes, fitted: FittedFeature, inputs: Sequence[str]) -> str:
        """Standardize the number or find its bucket."""
        number, missing = nodes.number(inputs[0], fitted.feature.dtype)
        if fitted.feature.transform == "quantile":
            # Earlier versions did not record the precision and always compared in double.
            dtype = TYPES[fitted.statistics.get("precision", "double")]
            limits = np.array(fitted.statistics["boundaries"], dtype)
            return _bucket(nodes, nodes.cast(number, dtype), missing, limits)
        if fitted.feature.transform == "log":
            magnitude = nodes.add("Add", nodes.add("Abs", number), nodes.double(1.0))
            number = nodes.add("Mul", nodes.add("Sign", number), nodes.add("Log", magnitude))
        centered = nodes.add("Sub", number, nodes.double(fitted.statistics["mean"]))
        scaled = nodes.add("Div", centered, nodes.double(fitted.statistics["deviation"]))
        # Clip before the cast to float32, in which far outliers would become infinite.
        scaled = nodes.add("Clip", scaled, nodes.double(-LARGEST), nodes.double(LARGEST))
        known = nodes.add("Where", missing, nodes.double(0.0), scaled)
        return nodes.cast(known, np.float32)


def _bucket(nodes: Nodes, number: str, missing: str, boundaries: NDArray[Any]) -> str:
    """Return the code of a number's bucket: FIRST_CODE plus the count of boundaries <= number."""
    axis = nodes.constant(np.array([1], np.int64))
    column = nodes.add("Unsqueeze", number, axis)
    limits = nodes.constant(boundaries[None, :])
    passed = nodes.cast(nodes.add("GreaterOrEqual", column, limits), np.int64)
    bucket = nodes.add("ReduceSum", passed, axis, keepdims=0)
    code = nodes.add("Add", bucket, nodes.integer(FIRST_CODE))
    return nodes.add("Where", missing, nodes.integer(MISSING), code)


def _quantiles(numbers: SortedNumbers, feature: Feature) -> tuple[NDArray[Any], str]:
    """Return the boundaries between quantile buckets, ascending and distinct, and their precision.

    For each q = 1/buckets, 2/buckets, ..., a boundary lies between the q-quantile and the next
    smaller value. The q-quantile of n values is the ceil(q * n)-th smallest.
    """
    buckets = feature.buckets
    # Use integers: with floats, rounding could give the next position.
    positions = [-(-share * numbers.count // buckets) - 1 for share in range(1, buckets)]
    positions = sorted({max(0, position) for position in positions})
    if not positions or not numbers.count:
        return np.empty(0), "double"
    uppers, precision = np.unique(numbers.at(positions)), "double"
    if feature.dtype == "float" and _fit_float32(uppers):
        precision = "float32"
        uppers = np.unique(in_precision(uppers, np.float32))
    lowers = numbers.largest_below(uppers)
    middles = (lowers / 2 + uppers / 2).astype(uppers.dtype)
    # Use the upper value itself if there is no number between the two, or no lower value.
    return np.where((middles > lowers) & (middles < uppers), middles, uppers), precision


def _fit_float32(values: NDArray[np.float64]) -> bool:
    """Return False if values that float32 cannot hold exactly become equal in float32.

    A value may become equal to its own rounding to float32: the two are one number, stored in two
    precisions.
    """
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32)
    inexact = rounded[rounded != values]
    return len(np.unique(inexact)) == len(inexact)


def _moments(moments: tuple[float | None, float | None], feature: Feature) -> tuple[float, float]:
    """Check mean and deviation; return (0, 1) without numbers, and deviation 1 instead of 0."""
    mean, deviation = moments[0] or 0.0, moments[1] or 1.0
    if not (math.isfinite(mean) and math.isfinite(deviation)):
        problem = f"the training values have mean {mean} and deviation {deviation}"
        remedy = "both must be finite: use 'log' or 'quantile'"
        raise invalid_value(
            f"features.{feature.name}.transform", feature.transform, problem, remedy
        )
    return mean, deviation
