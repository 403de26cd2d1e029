"""What a feature is: its name, its side, its kind, and how its raw value is turned into inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeInt, PositiveInt

from hvdrec.errors import UserError, choices

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from hvdrec.config.structure import dataclass

Side = Literal["user", "item", "scene"]
SIDES: tuple[Side, ...] = ("user", "item", "scene")
Kind = Literal["categorical", "categorical_list", "sequence", "numeric", "hashed"]
RawType = Literal["string", "int", "float"]
Pooling = Literal["mean", "sqrt", "attention", "self-attention"]
Transform = Literal["standardize", "log", "quantile"]

MISSING = 0
"""The code of a missing, null, NaN or empty value; in lists also of padding, and then left out."""
UNKNOWN = 1
"""The code of a value that the fitted vocabulary does not hold."""
FIRST_CODE = 2
"""The code of the first value of a vocabulary (of the first hash or quantile bucket)."""

MISSING_INT = -(2**63)
"""How a missing value enters the preprocessing graph among int64 (strings: "", floats: NaN)."""

KEY_COLUMNS = ("user_index", "item_index", "label", "weight")
"""Columns of an encoded shard that are no features."""


@dataclass(frozen=True)
class Feature:
    """One feature of a user, an item or the scene."""

    name: str
    """Column of the samples, and the name used at scoring time."""
    side: Side = "user"
    """Whose feature it is: user, item or scene."""
    kind: Kind = "categorical"
    """categorical: one value with a vocabulary. categorical_list: several, pooled. sequence: item
    keys in order of time, sharing the item key's vocabulary and table. numeric: one number.
    hashed: one integer, hashed into a fixed number of buckets, no vocabulary."""
    dtype: RawType = "string"
    """Type of the raw value. Integer columns may feed a string feature; nothing else is cast."""
    dimension: NonNegativeInt = 0
    """Width of its embedding; 0 takes model.dimension. Must agree for shared tables."""
    min_count: PositiveInt = 1
    """Values seen less often in the training split share the unknown code."""
    max_length: PositiveInt = 50
    """Lists keep their first, sequences their last max_length values."""
    transform: Transform = "standardize"
    """numeric only. standardize: (x - mean) / deviation. log: sign(x) log(1 + |x|), then
    standardized. quantile: a code per quantile bucket, embedded."""
    buckets: PositiveInt = 32
    """Number of quantile buckets, or of hash buckets."""
    shares: str = ""
    """Name of the feature whose vocabulary and table this one uses; a sequence takes item_key's."""
    default: str | int | float | None = None
    """Value of a scene field that the caller leaves out; none means missing."""

    def __post_init__(self) -> None:
        where = f"feature '{self.name}'"
        if not self.name.isidentifier():
            raise UserError(f"{where}: a name is letters, digits and underscores")
        if self.name in KEY_COLUMNS:
            raise UserError(
                f"{where}: the names {choices(KEY_COLUMNS)} are taken; rename the column"
            )
        if self.kind == "numeric" and self.dtype == "string":
            raise UserError(
                f"{where}: numeric needs dtype {choices(['int', 'float'])}, not 'string'"
            )
        if self.kind == "hashed" and self.dtype != "int":
            raise UserError(f"{where}: hashed needs dtype 'int', not '{self.dtype}'")
        if self.kind not in ("numeric",) and self.dtype == "float":
            raise UserError(
                f"{where}: {self.kind} needs dtype {choices(['string', 'int'])}, not 'float'"
            )
        if self.kind == "sequence" and self.side != "user":
            raise UserError(
                f"{where}: a sequence of items belongs to side 'user', not '{self.side}'"
            )
        if self.default is not None and self.side != "scene":
            raise UserError(f"{where}: a default is for scene features only")

    @property
    def is_list(self) -> bool:
        """Whether a raw value is a list."""
        return self.kind in ("categorical_list", "sequence")

    @property
    def is_embedded(self) -> bool:
        """Whether the graph gives int64 codes for a table (else a float32 value)."""
        return self.kind != "numeric" or self.transform == "quantile"

    @property
    def has_vocabulary(self) -> bool:
        """Whether fitting learns a vocabulary of its raw values."""
        return self.kind in ("categorical", "categorical_list", "sequence")


@dataclass(frozen=True)
class Schema:
    """The features of a run and which of them are the keys of users and items."""

    features: tuple[Feature, ...]
    user_key: str
    item_key: str

    def __post_init__(self) -> None:
        names = [feature.name for feature in self.features]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"feature '{name}': declared {names.count(name)} times")
        for side, key in (("user", self.user_key), ("item", self.item_key)):
            if not key.isidentifier():
                raise UserError(f"samples.{side}: '{key}' is no column name")
            if key in names and self[key].side != side:
                raise UserError(f"feature '{key}': is the {side} key, side must be '{side}'")
            if key in names and self[key].is_list:
                raise UserError(f"feature '{key}': is the {side} key and cannot be a list")
        for feature in self.features:
            shared = self.vocabulary_of(feature)
            if shared not in names:
                raise UserError(
                    f"feature '{feature.name}': shares '{shared}', which is no feature; "
                    f"known: {choices(names)}"
                )
            other = self[shared]
            if shared != feature.name and (
                not (feature.has_vocabulary and other.has_vocabulary)
                or other.dtype != feature.dtype
            ):
                raise UserError(
                    f"feature '{feature.name}': cannot share '{shared}' "
                    f"({other.kind}, dtype {other.dtype}); both need a vocabulary of one dtype"
                )
            if shared != feature.name and self.vocabulary_of(other) != other.name:
                raise UserError(
                    f"feature '{feature.name}': '{shared}' itself shares another; name that"
                )

    def __getitem__(self, name: str) -> Feature:
        for feature in self.features:
            if feature.name == name:
                return feature
        raise KeyError(name)

    def side(self, side: Side) -> tuple[Feature, ...]:
        """Return the features of one side, in the order of declaration."""
        return tuple(feature for feature in self.features if feature.side == side)

    def vocabulary_of(self, feature: Feature) -> str:
        """Return the name of the feature that owns this feature's vocabulary and table."""
        if feature.shares:
            return feature.shares
        return self.item_key if feature.kind == "sequence" else feature.name

    def matched(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """Return the pairs of a user's and an item's feature, of those named, sharing a table."""
        tables = {n: self.vocabulary_of(self[n]) for n in names if self[n].is_embedded}
        users, items = ([n for n in tables if self[n].side == side] for side in ("user", "item"))
        return [(u, i) for u in users for i in items if tables[u] == tables[i]]
