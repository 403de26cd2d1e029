"""The kind ``categorical``."""

from hvdrec.features.kinds.kind import VocabularyKind


class Categorical(VocabularyKind):
    """One string or integer per row, whose code is looked up in a vocabulary."""
