"""Write SQL text: quoted names and literals, and expressions over columns of any type."""

from __future__ import annotations

import json

import duckdb
from duckdb.sqltypes import DuckDBPyType


def quoted(name: str) -> str:
    """Return a name as an SQL identifier in double quotes."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Return text as an SQL literal in single quotes."""
    return "'" + text.replace("'", "''") + "'"


def written(name: str) -> str:
    """Return a name as a user would write it in SQL: in quotes only if it needs them."""
    tokens = duckdb.tokenize(name)
    plain = name.isascii() and name.isidentifier() and len(tokens) == 1
    return name if plain and tokens[0][1] == duckdb.token_type.identifier else quoted(name)


def basic_string(text: str) -> str:
    """Return text as a TOML string in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def derivation(name: str, expression: str) -> str:
    """Return the TOML line that derives a column: ``samples.derive.NAME = "EXPRESSION"``."""
    bare = name.isascii() and name.replace("_", "a").replace("-", "a").isalnum()
    key = name if bare else basic_string(name)
    return f"samples.derive.{key} = {basic_string(expression)}"


def without_nan(value: str, dtype: DuckDBPyType) -> str:
    """Return SQL that replaces each NaN in `value` by NULL, also inside lists and structs."""
    if not _holds_floats(dtype):
        return value
    if dtype.id in ("float", "double"):
        return f"CASE WHEN isnan({value}) THEN NULL ELSE {value} END"
    if dtype.id == "struct":
        fields = (
            f"{quoted(name)} := {without_nan(f'({value}).{quoted(name)}', child)}"
            for name, child in _parts(dtype)
        )
        return f"CASE WHEN {value} IS NULL THEN NULL ELSE struct_pack({', '.join(fields)}) END"
    (_, child), *_ = _parts(dtype)
    return f"list_transform({value}, lambda entry: {without_nan('entry', child)})"


def _holds_floats(dtype: DuckDBPyType) -> bool:
    if dtype.id in ("list", "array", "struct"):
        return any(_holds_floats(child) for _, child in _parts(dtype))
    return dtype.id in ("float", "double")


def _parts(dtype: DuckDBPyType) -> list[tuple[str, DuckDBPyType]]:
    # DuckDB also lists the size of a fixed-size array as a child; it is not a type.
    return [(name, part) for name, part in dtype.children if isinstance(part, DuckDBPyType)]
