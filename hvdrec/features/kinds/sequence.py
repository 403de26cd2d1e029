"""The kind ``sequence``."""

from hvdrec.config.schema import Feature
from hvdrec.features.kinds.kind import VocabularyKind


class Sequence(VocabularyKind):
    """The keys of the items in a user's history, oldest first; the last ``max_length`` are used."""

    column_kind = "sequence"
    sides = ("user",)

    def vocabulary(self, feature: Feature, item_key: str) -> str:
        """Return the feature whose vocabulary and table are shared; by default the item key."""
        return feature.shares or item_key
