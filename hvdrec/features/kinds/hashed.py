"""The kind ``hashed``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvdrec.config.schema import FIRST_CODE, MISSING, MISSING_INT, Feature
from hvdrec.features.kinds.kind import FittedFeature, Kind
from hvdrec.features.kinds.nodes import HASH_PRIME, Nodes, hash_coefficients
from hvdrec.features.kinds.training_split import TrainingSplit


class Hashed(Kind):
    """One integer per row, hashed into a fixed number of buckets."""

    column_kind = "hashed"
    dtypes = ("int",)

    def fit(self, feature: Feature, split: TrainingSplit) -> FittedFeature:
        """Set the number of codes, which follows from the number of buckets; nothing is learned."""
        return FittedFeature(feature, FIRST_CODE + feature.buckets)

    def compile(self, nodes: Nodes, fitted: FittedFeature, inputs: Sequence[str]) -> str:
        """Add the nodes that hash an int64 x by low = x mod p and high = floor(x / p) mod p.

        Here p is `HASH_PRIME`. Integers that differ by a multiple of p^2 (about 2^62) always get
        the same bucket; two other integers do so only by chance.
        """
        [raw] = inputs
        zero, prime = nodes.integer(0), nodes.integer(HASH_PRIME)
        low = nodes.add("Mod", raw, prime)
        # ONNX truncates the quotient of integers. For negative x, floor(x / p) is
        # (x + 1) / p - 1, which cannot overflow.
        negative = nodes.cast(nodes.add("Less", raw, zero), np.int64)
        quotient = nodes.add("Div", nodes.add("Add", raw, negative), prime)
        high = nodes.add("Mod", nodes.add("Sub", quotient, negative), prime)
        coefficients = hash_coefficients(fitted.feature.name, 2)
        code = nodes.buckets([low, high], coefficients, fitted.feature.buckets)
        missing = nodes.add("Equal", raw, nodes.integer(MISSING_INT))
        return nodes.add("Where", missing, nodes.integer(MISSING), code)
