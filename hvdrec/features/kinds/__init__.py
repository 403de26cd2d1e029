"""Feature kinds: one class per kind, found by name through `hvdrec.config.kinds`.

A kind of your own subclasses `Kind` and is registered with `register_kind`.
"""

from hvdrec.config.kinds import register_kind
from hvdrec.config.schema import Column, Feature
from hvdrec.features.kinds.kind import FittedFeature, Kind
from hvdrec.features.kinds.nodes import Nodes
from hvdrec.features.kinds.training_split import TrainingSplit

__all__ = [
    "Column",
    "Feature",
    "FittedFeature",
    "Kind",
    "Nodes",
    "TrainingSplit",
    "register_kind",
]
