"""The kind ``crossed``."""

from __future__ import annotations

from collections.abc import Sequence

from hvdrec.config.schema import FIRST_CODE, MISSING, Column, Feature
from hvdrec.features.kinds.kind import FittedFeature, Kind
from hvdrec.features.kinds.nodes import Nodes, hash_coefficients
from hvdrec.features.kinds.training_split import TrainingSplit


class Crossed(Kind):
    """The combination of the codes of several features, hashed into a fixed number of buckets.

    The features usually have the same side as the cross. With ``side = "scene"``, a cross may
    combine features of users, items and the scene. A bundle then stores the codes of users and
    items with their embeddings, and the ranker combines them with the codes of the scene.
    """

    def check(self, feature: Feature) -> None:
        """Raise UserError unless ``columns`` names two or more different features."""
        if len(set(feature.columns)) < max(2, len(feature.columns)):
            columns = "crossed needs the names of two or more features, each once"
            raise feature.invalid("columns", columns)

    def columns(self, feature: Feature) -> tuple[Column, ...]:
        """Return (): a crossed feature reads no raw columns, but the codes of other features."""
        return ()

    def sources(self, feature: Feature) -> tuple[str, ...]:
        """Return the names of the features to combine."""
        return feature.columns

    def fit(self, feature: Feature, split: TrainingSplit) -> FittedFeature:
        """Set the number of codes, which follows from the number of buckets; nothing is learned."""
        return FittedFeature(feature, FIRST_CODE + feature.buckets)

    def compile(self, nodes: Nodes, fitted: FittedFeature, inputs: Sequence[str]) -> str:
        """Add the nodes that hash the codes; the result is MISSING if any of the codes is."""
        coefficients = hash_coefficients(fitted.feature.name, len(inputs))
        code = nodes.buckets(inputs, coefficients, fitted.feature.buckets)
        # MISSING is the smallest code. Use the minimum: a product of codes might overflow to 0.
        least = nodes.add("Min", *inputs)
        missing = nodes.add("Equal", least, nodes.integer(MISSING))
        return nodes.add("Where", missing, nodes.integer(MISSING), code)
