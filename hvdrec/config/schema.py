"""Features and their schema.

A *side* is what a feature describes: the user, the item or the *scene*, which is the context of a
request (time, place, device, placement). A *code* is the row number of a value in an embedding
table.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt

from hvdrec.config.kinds import find_kind, kind_names
from hvdrec.config.names import name_problem, own_name
from hvdrec.errors import UserError, choices, invalid_value, unknown_name

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from hvdrec.config.structure import dataclass

Side = Literal["user", "item", "scene"]
SIDES: tuple[Side, ...] = ("user", "item", "scene")
RawType = Literal["string", "int", "float"]
ColumnKind = Literal["categorical", "hashed", "numeric", "categorical_list", "sequence"]
Pooling = Literal["mean", "sqrt", "attention", "self-attention"]
Transform = Literal["standardize", "log", "quantile"]

MISSING = 0
"""Code of a missing, null, NaN or empty value, and of padding in lists."""
UNKNOWN = 1
"""Code of a value that is not in the fitted vocabulary."""
FIRST_CODE = 2
"""Code of the first value of a vocabulary, or of the first hash or quantile bucket."""

MISSING_INT = -(2**63)
"""The int64 input of the preprocessing graph for missing; strings use "" and floats NaN."""

KEY_COLUMNS = ("user_index", "item_index", "label", "weight")
"""Columns of an encoded shard that are not features. If the user has a column of the same name,
`Schema.own_name` gives the name that is used instead."""


@dataclass(frozen=True)
class Column:
    """A raw column of the samples that a feature reads, and a field of a scoring request."""

    name: str
    """Name of the column and of the field."""
    side: Side
    """Side that the column describes."""
    dtype: RawType
    """Type of a value, or of a list's entries."""
    kind: ColumnKind = "categorical"
    """Form of the value. categorical, hashed and numeric: one value. categorical_list: a list whose
    first max_length entries count. sequence: a list in time order whose last max_length entries
    count."""
    max_length: int = 50
    """Maximum number of entries of a list that count."""
    default: str | int | float | None = None
    """Value of a scene field that a request leaves out; None means missing."""

    @property
    def is_list(self) -> bool:
        """True if a value is a list."""
        return self.kind in ("categorical_list", "sequence")

    @property
    def is_sequence(self) -> bool:
        """True if a value is a list in time order, padded and cut on the left."""
        return self.kind == "sequence"


class FeatureKind(ABC):  # noqa: B024 (the abstract methods are in hvdrec.features.kinds.Kind)
    """A kind of feature, as the configuration sees it; `hvdrec.features.kinds.Kind` does the work.

    A kind has no state: every method takes the feature as an argument.
    """

    column_kind: ClassVar[ColumnKind] = "categorical"
    """Form of the raw column (or columns)."""
    dtypes: ClassVar[tuple[RawType, ...]] = ("string", "int")
    """Allowed values of ``dtype``."""
    sides: ClassVar[tuple[Side, ...]] = SIDES
    """Allowed values of ``side``."""
    has_vocabulary: ClassVar[bool] = False
    """True if fitting learns a vocabulary, which features can share."""

    def check(self, feature: Feature) -> None:
        """Raise UserError if a field of the feature does not fit this kind."""
        if feature.dtype not in self.dtypes:
            raise feature.invalid("dtype", f"{feature.kind} needs {choices(self.dtypes)}")
        if feature.side not in self.sides:
            raise feature.invalid("side", f"{feature.kind} needs {choices(self.sides)}")
        if feature.columns:
            raise feature.invalid("columns", f"{feature.kind} reads the column of its own name")

    def columns(self, feature: Feature) -> tuple[Column, ...]:
        """Return the raw columns that the feature reads."""
        return (feature.raw_column(feature.column or feature.name, self.column_kind),)

    def sources(self, feature: Feature) -> tuple[str, ...]:
        """Return the names of the features whose codes this feature combines."""
        return ()

    def is_embedded(self, feature: Feature) -> bool:
        """True if the feature is encoded as codes, False if as a float32 number."""
        return True

    def vocabulary(self, feature: Feature, item_key: str) -> str:
        """Return the name of the feature that owns this feature's vocabulary and table."""
        return feature.shares or feature.name


@dataclass(frozen=True)
class Feature:
    """One feature of a user, an item or the scene.

    Properties that follow from the kind are cached, because every training step reads them.
    """

    name: str
    """Name of the feature; most kinds read the column of this name."""
    side: Side = "user"
    """user, item, or scene (the context of a request). Only the ranker reads scene features."""
    kind: str = "categorical"
    """categorical: one value with a vocabulary. categorical_list: several values, pooled. sequence:
    item keys in time order, which share the vocabulary and table of the item key. numeric: one
    number. hashed: one integer, hashed into buckets, without a vocabulary. crossed: a hashed
    combination of several features. Python code can register more kinds."""
    dtype: RawType = "string"
    """Type of the raw value. A string feature also accepts an integer column; no other types are
    converted."""
    dimension: NonNegativeInt = 0
    """Width of the embedding; 0 means model.dimension. Features that share a table must have the
    same width."""
    min_count: PositiveInt = 1
    """Values that occur less often in the training split share the unknown code."""
    max_length: PositiveInt = 50
    """Maximum length. Longer lists keep their first values, longer sequences their last."""
    transform: Transform = "standardize"
    """numeric only. standardize: (x - mean) / deviation. log: sign(x) log(1 + |x|), then
    standardized. quantile: one code per quantile bucket, embedded."""
    buckets: PositiveInt = 32
    """Number of quantile or hash buckets."""
    shares: str = ""
    """Name of the feature whose vocabulary and embedding table to use. Empty: the feature has its
    own; a sequence uses those of the item key."""
    column: str = ""
    """Raw column to read, which is also the field of a scoring request. Several features may read
    one column. Empty: the column with the name of the feature."""
    columns: tuple[str, ...] = ()
    """crossed: the features to combine. Kinds of your own: the raw columns to read."""
    default: str | int | float | None = None
    """Value of a scene field that a request leaves out. Without it, the value is missing."""

    def __post_init__(self) -> None:
        """Raise UserError if the name is not allowed or a field does not fit the kind."""
        if problem := name_problem(self.name):
            raise self.invalid("name", problem, "rename the column, or derive one of another name")
        if self.kind not in kind_names():
            raise unknown_name(self._field("kind"), self.kind, kind_names())
        self.definition.check(self)
        if self.column and self.columns:
            raise self.invalid("column", "a feature has either column or columns", "remove one")
        if self.column and (problem := name_problem(self.column)):
            raise self.invalid("column", problem, "rename the column")
        if self.default is not None and self.side != "scene":
            raise self.invalid("default", "only scene features have a default")

    def _field(self, name: str) -> str:
        return f"features.{self.name}.{name}"

    def invalid(self, name: str, problem: str, remedy: str = "") -> UserError:
        """Build the UserError for one of this feature's fields."""
        return invalid_value(self._field(name), getattr(self, name), problem, remedy)

    @cached_property
    def definition(self) -> FeatureKind:
        """The `FeatureKind` object of the feature's kind, from the registry."""
        kind: FeatureKind = find_kind(self.kind)
        return kind

    def raw_column(self, name: str, kind: ColumnKind = "categorical") -> Column:
        """Return a raw column with this feature's side, dtype, length and default."""
        return Column(name, self.side, self.dtype, kind, self.max_length, self.default)

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of the features whose codes this feature combines; most features have none."""
        return self.definition.sources(self)

    @cached_property
    def is_list(self) -> bool:
        """True if the feature has a list of codes per row."""
        return self.definition.column_kind in ("categorical_list", "sequence")

    @cached_property
    def is_sequence(self) -> bool:
        """True if the feature is a list in time order, padded and cut on the left."""
        return self.definition.column_kind == "sequence"

    @cached_property
    def is_embedded(self) -> bool:
        """True if the feature is encoded as int64 codes, False if as a float32 number."""
        return self.definition.is_embedded(self)

    @cached_property
    def has_vocabulary(self) -> bool:
        """True if fitting learns a vocabulary of the feature's raw values."""
        return self.definition.has_vocabulary


@dataclass(frozen=True)
class Schema:
    """The features of a run and which of them are the keys of users and items."""

    features: tuple[Feature, ...]
    user_key: str
    item_key: str

    def __post_init__(self) -> None:
        """Raise UserError if features contradict each other."""
        names = [feature.name for feature in self.features]
        for feature in self.features:
            if names.count(feature.name) > 1:
                raise feature.invalid("name", f"declared {names.count(feature.name)} times")
        self._check_key("user", self.user_key)
        self._check_key("item", self.item_key)
        for feature in self.features:
            self._check_sharing(feature, names)
            self._check_sources(feature, names)
        self._check_columns()

    def _check_key(self, side: Side, key: str) -> None:
        if problem := name_problem(key):
            raise invalid_value(f"samples.{side}", key, problem, "name the column of the key")
        feature = next((feature for feature in self.features if feature.name == key), None)
        if feature is None:
            return
        if feature.side != side:
            raise feature.invalid("side", f"must be '{side}', the feature is the {side} key")
        if feature.is_list or feature.sources:
            raise feature.invalid("kind", f"the {side} key must hold one value")

    def _check_sharing(self, feature: Feature, names: list[str]) -> None:
        shared = self.vocabulary_of(feature)
        if shared == feature.name:
            return
        field = f"features.{feature.name}.shares"
        if shared not in names:
            raise unknown_name(field, shared, names)
        owner = self[shared]
        if not (feature.has_vocabulary and owner.has_vocabulary) or owner.dtype != feature.dtype:
            problem = (
                f"both features need a vocabulary and the same dtype; this one is {feature.kind} "
                f"of {feature.dtype}, '{shared}' is {owner.kind} of {owner.dtype}"
            )
            raise invalid_value(field, shared, problem)
        owners_owner = self.vocabulary_of(owner)
        if owners_owner != shared:
            problem = f"'{shared}' itself shares '{owners_owner}'"
            raise invalid_value(field, shared, problem, f"name '{owners_owner}'")

    def _check_sources(self, feature: Feature, names: list[str]) -> None:
        for name in feature.sources:
            field = f"features.{feature.name}.columns"
            if name not in names:
                raise unknown_name(field, name, names)
            source = self[name]
            if source.sources or source.is_list or not source.is_embedded:
                problem = f"'{name}' does not have one code per row"
                remedy = "name categorical, hashed or quantile features"
                raise invalid_value(field, list(feature.columns), problem, remedy)
            if feature.side not in ("scene", source.side):
                problem = f"'{name}' is on side '{source.side}'"
                remedy = "a feature that combines several sides needs side = 'scene'"
                raise invalid_value(field, list(feature.columns), problem, remedy)

    def _check_columns(self) -> None:
        declared: dict[str, Column] = {}
        for feature in self.features:
            for column in feature.definition.columns(feature):
                other = declared.setdefault(column.name, column)
                if (other.side, other.dtype) != (column.side, column.dtype):
                    problem = (
                        f"column '{column.name}' is {column.dtype} of side '{column.side}' here, "
                        f"{other.dtype} of side '{other.side}' in another feature"
                    )
                    raise invalid_value(f"features.{feature.name}", feature.kind, problem)
                lists = (other.is_list, other.is_sequence, other.is_list and other.max_length)
                mine = (column.is_list, column.is_sequence, column.is_list and column.max_length)
                if lists != mine or other.default != column.default:
                    problem = f"another feature reads '{column.name}' with another form, "
                    problem += "max_length or default"
                    raise feature.invalid("column", problem, "use the same in both features")

    def __getitem__(self, name: str) -> Feature:
        """Return the feature of this name; raise KeyError if there is none."""
        for feature in self.features:
            if feature.name == name:
                return feature
        raise KeyError(name)

    @cached_property
    def _taken(self) -> frozenset[str]:
        """All names that the user has given: keys, features and raw columns."""
        columns = (column.name for column in self.columns())
        return frozenset({self.user_key, self.item_key, *columns, *(f.name for f in self.features)})

    def own_name(self, name: str) -> str:
        """Return the name for a column or tensor of hvdrec itself, such as ``label``.

        The name gets a prefix if a feature, a key or a raw column has the same name.
        """
        return own_name(name, self._taken)

    @property
    def row_columns(self) -> tuple[str, ...]:
        """The columns of a shard that are not features: user index, item index, label, weight."""
        return tuple(map(self.own_name, KEY_COLUMNS))

    def key(self, side: Side) -> str:
        """Return the name of the user key or the item key."""
        return self.user_key if side == "user" else self.item_key

    def side(self, side: Side) -> tuple[Feature, ...]:
        """Return the features of one side, in the order of declaration."""
        return tuple(feature for feature in self.features if feature.side == side)

    def columns(self, side: Side | None = None) -> tuple[Column, ...]:
        """Return the raw columns of all features, or of one side's features, each once."""
        features = self.features if side is None else self.side(side)
        columns: dict[str, Column] = {}
        for feature in features:
            for column in feature.definition.columns(feature):
                columns.setdefault(column.name, column)
        return tuple(columns.values())

    def carried(self, side: Side) -> tuple[Feature, ...]:
        """Return the user (or item) features that scene features combine (`crossed`).

        A bundle does not store the raw values of users and items, so it stores the codes of these
        features with the embeddings.
        """
        read = {name for feature in self.side("scene") for name in feature.sources}
        return tuple(feature for feature in self.side(side) if feature.name in read)

    def vocabulary_of(self, feature: Feature) -> str:
        """Return the name of the feature that owns this feature's vocabulary and table."""
        return feature.definition.vocabulary(feature, self.item_key)

    def matched(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """Return the pairs of a user and an item feature in `names` that share a table."""
        tables = {n: self.vocabulary_of(self[n]) for n in names if self[n].is_embedded}
        users, items = ([n for n in tables if self[n].side == side] for side in ("user", "item"))
        return [(u, i) for u in users for i in items if tables[u] == tables[i]]
