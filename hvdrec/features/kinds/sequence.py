"""The kind ``sequence``."""

from hvdrec.config.schema import Feature
from hvdrec.features.kinds.kind import VocabularyKind


class Sequence(VocabularyKind):
    """A user's item keys in time order; the last max_length entries count."""

    column_kind = "sequence"
    sides = ("user",)

    def vocabulary(self, feature: Feature, item_key: str) -> str:
        """Return the item key: a sequence shares its vocabulary and table."""
        return feature.shares or item_key
