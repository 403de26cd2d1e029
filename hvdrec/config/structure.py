"""Nested frozen dataclasses from plain values, strictly, and back."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from hvdrec.errors import UserError, choices

T = TypeVar("T")


def to_dict(value: Any) -> Any:
    """Return nested dataclasses as dicts, lists and scalars, ready for JSON; None is left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((f.name, to_dict(getattr(value, f.name))) for f in dataclasses.fields(value))
        return {name: plain for name, plain in pairs if plain is not None}
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_dict(item) for item in value]
    return value


def from_dict(kind: type[T], raw: Any, where: str = "") -> T:
    """Build a dataclass from plain values, strictly.

    Raises UserError that names the key (dotted, from the root), the value and what is allowed.
    """
    if not isinstance(raw, Mapping):
        raise UserError(f"{where or 'the file'}: must be a table, is {_shown(raw)}")
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(cast(Any, kind))}
    for key in raw:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"unknown key '{_join(where, key)}'; known: {choices(fields)}{hint}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in raw:
            raise UserError(f"key '{_join(where, name)}' is missing; it must be given")
    values = {key: _convert(hints[key], item, _join(where, key)) for key, item in raw.items()}
    return kind(**values)


def _convert(kind: Any, raw: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return raw
    if dataclasses.is_dataclass(kind):
        return from_dict(cast(type[Any], kind), raw, where)
    if origin is Literal:
        if raw not in arguments or isinstance(raw, bool):
            raise UserError(f"{where} = {_shown(raw)}: allowed are {choices(arguments)}")
        return raw
    if origin in (Union, types.UnionType):
        for option in arguments:
            if option is not type(None) and type(raw) is option:
                return raw
        names = [option.__name__ for option in arguments if option is not type(None)]
        raise UserError(f"{where} = {_shown(raw)}: allowed types are {choices(names)}")
    if origin is tuple:
        if not isinstance(raw, list):
            raise UserError(f"{where} = {_shown(raw)}: must be a list")
        if arguments[-1] is not Ellipsis and len(raw) != len(arguments):
            raise UserError(f"{where} = {_shown(raw)}: must hold {len(arguments)} values")
        kinds = [arguments[0]] * len(raw) if arguments[-1] is Ellipsis else list(arguments)
        return tuple(
            _convert(k, item, f"{where}[{i}]")
            for i, (k, item) in enumerate(zip(kinds, raw, strict=True))
        )
    if origin is dict:
        if not isinstance(raw, Mapping):
            raise UserError(f"{where} = {_shown(raw)}: must be a table")
        return {key: _convert(arguments[1], item, _join(where, key)) for key, item in raw.items()}
    if kind is float and type(raw) is int:
        return float(raw)
    if type(raw) is not kind:
        raise UserError(f"{where} = {_shown(raw)}: must be of type {kind.__name__}")
    return raw


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _shown(value: Any) -> str:
    """Return a value as it would stand in TOML, shortened."""
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
