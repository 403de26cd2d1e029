"""Raw columns in the types that their features declare."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from hvdrec.config import Config
from hvdrec.errors import UserError, choices
from hvdrec.schema import Feature

ACCEPTED = {
    "string": ("string", "integer"),
    "int": ("integer", "boolean"),
    "float": ("float", "integer", "decimal"),
}
TARGET = {"string": pa.string(), "int": pa.int64(), "float": pa.float64()}


def cast(
    file: Path, name: str, column: pa.ChunkedArray, feature: Feature | None
) -> pa.ChunkedArray:
    """Return a column in its feature's declared type (a key that is no feature: as a string).

    Integers become canonical decimal strings where a string is declared; floats never do, since
    '1.0' is no key. Raises UserError for any other type, with the remedy.
    """
    dtype = feature.dtype if feature else "string"
    is_list = feature is not None and feature.is_list
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    value = kind
    if is_list:
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise UserError(
                f"{file}: column '{name}' is {kind}, feature '{name}' needs a list; derive one, "
                f"for example samples.derive.{name} = \"string_split({name}, '|')\""
            )
        value = kind.value_type
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        raise UserError(
            f"{file}: column '{name}' is {kind}, feature '{name}' takes one value; "
            "declare kind = 'categorical_list'"
        )
    if _family(value) not in (*ACCEPTED[dtype], "null"):
        raise UserError(
            f"{file}: column '{name}' is {kind}, dtype '{dtype}' takes {choices(ACCEPTED[dtype])} "
            f"columns; change the dtype, or cast the column in samples.derive"
        )
    target = TARGET[dtype]
    if is_list:
        return column.cast(pa.list_(value)).cast(pa.list_(target))
    return column.cast(target)


def key_type(file: Path, name: str, sql_type: str, config: Config) -> None:
    """Raise UserError if a key column is of a type that makes no key."""
    if (
        sql_type.startswith(("FLOAT", "DOUBLE", "DECIMAL", "BOOLEAN", "STRUCT", "MAP"))
        or "[" in sql_type
    ):
        raise UserError(
            f"{file}: key column '{name}' is {sql_type}, a key is {choices(['string', 'integer'])}; "
            "cast it in the table"
        )


def _family(kind: pa.DataType) -> str:
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_floating(kind):
        return "float"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "string"
    if pa.types.is_decimal(kind):
        return "decimal"
    return "null" if pa.types.is_null(kind) else str(kind)
