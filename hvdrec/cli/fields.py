"""Options for the fields of a configuration, such as ``--train.batch-size 4096``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from hvdrec.config import Config
from hvdrec.config.structure import field_docs, from_text, type_of
from hvdrec.errors import UserError, choices, unknown_key

METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", bool: "{true,false}"}


@dataclasses.dataclass(frozen=True)
class FieldOption:
    """A field as the command line shows it; N stands for a position and NAME for a key."""

    path: tuple[str, ...]
    kind: Any
    doc: str
    default: Any

    @property
    def dotted(self) -> str:
        """The field's name from the root."""
        return ".".join(self.path)


def add_field_options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Add an option for each field of the configuration that occurs in the arguments.

    Raises:
        UserError: There is no such field.
    """
    for option in dict.fromkeys(text.partition("=")[0] for text in arguments):
        dotted = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or not ("." in dotted or dotted in ("name", "seed")):
            continue
        try:
            kind = type_of(Config, dotted.split("."))
        except KeyError:
            raise unknown_key(option, [_option(each.dotted) for each in field_options()]) from None
        if dataclasses.is_dataclass(kind):
            names = [field.name for field in dataclasses.fields(kind)]
            raise UserError(f"{option}: is a table; known: {choices(names)}", field=option)
        nargs = "*" if get_origin(kind) in (tuple, dict) else None
        parser.add_argument(option, dest=dotted, nargs=nargs, default=argparse.SUPPRESS)


def read_fields(options: argparse.Namespace) -> dict[str, object]:
    """Return the values of the field options, by dotted field.

    Raises:
        UserError: A value is not of the field's type.
    """
    texts = {key: text for key, text in vars(options).items() if "." in key or key == "seed"}
    if isinstance(getattr(options, "name", None), str) and hasattr(options, "config"):
        texts["name"] = options.name
    return {field: _value(field, text) for field, text in texts.items()}


def _value(field: str, text: Any) -> object:
    kind = type_of(Config, field.split("."))
    if get_origin(kind) is dict:
        text = dict(zip(text[::2], text[1::2], strict=True))
    if get_origin(kind) in (Union, types.UnionType):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return from_text(kind, text, _option(field))


def describe_fields(
    parser: argparse.ArgumentParser, config: Config | None, prefixes: Sequence[str] = ("",)
) -> None:
    """Add all fields to a parser's help: type, default and documentation.

    Args:
        parser: The parser to extend.
        config: Its values are shown as defaults. None: the defaults of the fields.
        prefixes: Only fields whose dotted name starts with one of these.
    """
    group = parser.add_argument_group(
        "fields of the configuration",
        "N is the position of a table, from 0; NAME is a key of a table.",
    )
    for field in field_options(config):
        if not field.dotted.startswith(tuple(prefixes)):
            continue
        shown = "" if field.default is dataclasses.MISSING else f" (default: {_shown(field)})"
        group.add_argument(
            _option(field.dotted),
            metavar=_metavar(field.kind),
            help=f"{field.doc}{shown}".replace("%", "%%"),
        )


def field_options(config: Config | None = None) -> Iterator[FieldOption]:
    """Yield all fields of the configuration, with the values of `config` as defaults."""
    return _walk(Config, (), config)


def _walk(table: Any, path: tuple[str, ...], values: Any) -> Iterator[FieldOption]:
    docs = field_docs(table)
    for field in dataclasses.fields(table):
        kind, inner = type_of(table, [field.name]), (*path, field.name)
        default = field.default if values is None else getattr(values, field.name)
        item = get_args(kind)[0] if get_origin(kind) is tuple else None
        if dataclasses.is_dataclass(kind):
            yield from _walk(kind, inner, default)
        elif dataclasses.is_dataclass(item):
            yield from _walk(item, (*inner, "N"), None)
        elif get_origin(kind) is dict:
            yield FieldOption((*inner, "NAME"), get_args(kind)[1], docs[field.name], "none")
        else:
            yield FieldOption(inner, kind, docs[field.name], default)


def _option(dotted: str) -> str:
    return "--" + dotted.replace("_", "-")


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "{" + ",".join(get_args(kind)) + "}"
    if get_origin(kind) is tuple:
        return f"[{_metavar(type_of(kind, [0]))} ...]"
    return METAVARS.get(kind, "VALUE")


def _shown(field: FieldOption) -> str:
    value = field.default
    if isinstance(value, Mapping):
        return "none"
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return json.dumps(value) if isinstance(value, bool) or value is None else str(value) or "empty"
