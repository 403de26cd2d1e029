"""The kind ``categorical``."""

from hvdrec.features.kinds.kind import VocabularyKind


class Categorical(VocabularyKind):
    """One string or integer with a vocabulary."""
