"""The kind ``numeric``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hvdrec.config.schema import FIRST_CODE, MISSING, Feature
from hvdrec.errors import invalid_value
from hvdrec.features.kinds.kind import FittedFeature, Kind, TrainingSplit
from hvdrec.features.kinds.nodes import Nodes

if TYPE_CHECKING:
    import duckdb

LARGEST = 1e6
"""Standardized numbers are clipped to this many standard deviations."""


class Numeric(Kind):
    """One number per row: standardized, or replaced by the code of its quantile bucket.

    The fitted statistics are ``mean`` and ``deviation``, the population standard deviation, of the
    finite values or of their logarithms; and ``boundaries``, the lower limits of all quantile
    buckets but the first, ascending and distinct.
    """

    column_kind = "numeric"
    dtypes = ("int", "float")

    def is_embedded(self, feature: Feature) -> bool:
        """Return True if values become codes of quantile buckets."""
        return feature.transform == "quantile"

    def fit(self, feature: Feature, split: TrainingSplit) -> FittedFeature:
        """Learn mean and deviation, or the quantiles, which take 8 bytes of memory per row.

        Raises:
            UserError: The values have no finite mean or deviation.
        """
        [column] = self.columns(feature)
        numbers = split.values(column).project("CAST(v AS DOUBLE) AS v").filter("isfinite(v)")
        if feature.transform == "quantile":
            boundaries = _quantiles(numbers, feature.buckets)
            size = FIRST_CODE + len(boundaries) + 1
            return FittedFeature(feature, size, statistics={"boundaries": boundaries.tolist()})
        with split.in_row_order():
            mean, deviation = _moments(numbers, feature)
        return FittedFeature(feature, statistics={"mean": mean, "deviation": deviation})

    def compile(self, nodes: Nodes, fitted: FittedFeature, inputs: Sequence[str]) -> str:
        """Standardize the number or find its bucket."""
        number, missing = nodes.number(inputs[0], fitted.feature.dtype)
        if fitted.feature.transform == "quantile":
            return _bucket(nodes, number, missing, fitted.statistics["boundaries"])
        if fitted.feature.transform == "log":
            magnitude = nodes.add("Add", nodes.add("Abs", number), nodes.double(1.0))
            number = nodes.add("Mul", nodes.add("Sign", number), nodes.add("Log", magnitude))
        centered = nodes.add("Sub", number, nodes.double(fitted.statistics["mean"]))
        scaled = nodes.add("Div", centered, nodes.double(fitted.statistics["deviation"]))
        # Clip before the cast to float32, in which far outliers would become infinite.
        scaled = nodes.add("Clip", scaled, nodes.double(-LARGEST), nodes.double(LARGEST))
        known = nodes.add("Where", missing, nodes.double(0.0), scaled)
        return nodes.cast(known, np.float32)


def _bucket(nodes: Nodes, number: str, missing: str, boundaries: Sequence[float]) -> str:
    """Return the code of a number's bucket: FIRST_CODE plus the count of boundaries <= number."""
    axis = nodes.constant(np.array([1], np.int64))
    column = nodes.add("Unsqueeze", number, axis)
    limits = nodes.constant(np.array(boundaries, np.float64)[None, :])
    passed = nodes.cast(nodes.add("GreaterOrEqual", column, limits), np.int64)
    bucket = nodes.add("ReduceSum", passed, axis, keepdims=0)
    code = nodes.add("Add", bucket, nodes.integer(FIRST_CODE))
    return nodes.add("Where", missing, nodes.integer(MISSING), code)


def _quantiles(numbers: duckdb.DuckDBPyRelation, buckets: int) -> NDArray[np.float64]:
    """Return the boundaries between quantile buckets: q-quantiles for q = 1/buckets, 2/buckets, ...

    The q-quantile of n numbers is the ceil(q * n)-th smallest, which always occurs among them.
    Equal boundaries are returned once.
    """
    values: NDArray[np.float64] = numbers.to_arrow_table()["v"].to_numpy()
    # Use integers: with floats, rounding could give the next position.
    positions = [-(-share * len(values) // buckets) - 1 for share in range(1, buckets)]
    positions = sorted({max(0, position) for position in positions})
    if not positions or not len(values):
        return np.empty(0)
    boundaries: NDArray[np.float64] = np.unique(np.partition(values, positions)[positions])
    return boundaries


def _moments(numbers: duckdb.DuckDBPyRelation, feature: Feature) -> tuple[float, float]:
    """Return mean and population standard deviation; (0, 1) without numbers, and 1 instead of 0."""
    value = "sign(v) * ln(1 + abs(v))" if feature.transform == "log" else "v"
    [(mean, deviation)] = numbers.aggregate(
        f"avg({value}) AS m, stddev_pop({value}) AS d"
    ).fetchall()
    mean, deviation = mean or 0.0, deviation or 1.0
    if not (math.isfinite(mean) and math.isfinite(deviation)):
        problem = f"the training values have mean {mean} and deviation {deviation}"
        remedy = "both must be finite: use 'log' or 'quantile'"
        raise invalid_value(
            f"features.{feature.name}.transform", feature.transform, problem, remedy
        )
    return mean, deviation
