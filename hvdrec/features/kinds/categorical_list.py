"""The kind ``categorical_list``."""

from hvdrec.features.kinds.kind import VocabularyKind


class CategoricalList(VocabularyKind):
    """A list of strings or integers with a vocabulary; its first max_length entries count."""

    column_kind = "categorical_list"
