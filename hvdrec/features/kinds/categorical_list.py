"""The kind ``categorical_list``."""

from hvdrec.features.kinds.kind import VocabularyKind


class CategoricalList(VocabularyKind):
    """A list of strings or integers, looked up in a vocabulary; ``max_length`` entries are used."""

    column_kind = "categorical_list"
