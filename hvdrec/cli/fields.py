"""Command-line options for the fields of a configuration, such as ``--train.batch-size 4096``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import types
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from hvdrec.config import Config
from hvdrec.config.structure import field_docs, from_text, type_of
from hvdrec.errors import UserError, choices, invalid_value, unknown_key

DEST = "field "
"""Prefix of the attributes in which the parsed options hold the values of configuration fields."""
METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", bool: "{true,false}"}


@dataclasses.dataclass(frozen=True)
class FieldOption:
    """A configuration field as --help shows it. In its name, N stands for the number of an entry in
    a list, and NAME for a key that the user chooses.
    """

    path: tuple[str, ...]
    kind: Any
    doc: str
    default: Any

    @property
    def dotted(self) -> str:
        """The full name of the field, such as ``train.batch_size``."""
        return ".".join(self.path)


def add_field_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str], allowed: tuple[str, ...] = ("",)
) -> None:
    """Add an option to a parser for each configuration field that occurs in the arguments.

    Args:
        parser: The parser to extend.
        arguments: The arguments of the command line.
        allowed: Prefixes of the dotted names of the fields that the command takes.

    Raises:
        UserError: An argument names a field that does not exist or that the command does not take.
    """
    for option in dict.fromkeys(text.partition("=")[0] for text in arguments):
        dotted = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or not ("." in dotted or dotted in ("name", "seed")):
            continue
        if not re.sub(r"\.\d+", ".N", dotted).startswith(allowed):
            names = [_option(f.dotted) for f in field_options() if f.dotted.startswith(allowed)]
            problem = f"{option}: cannot change after training; known: {choices(names)}"
            raise UserError(problem, field=option)
        kind = _kind_of(dotted.split("."))
        nargs = "*" if get_origin(kind) in (tuple, dict) else None
        parser.add_argument(option, dest=f"{DEST}{dotted}", nargs=nargs, default=argparse.SUPPRESS)


def _kind_of(path: Sequence[str]) -> Any:
    """Return the type of a field; raise UserError if it does not exist or is a whole table."""
    kind: Any = Config
    for end, name in enumerate(path, start=1):
        option = _option(".".join(path[:end]))
        try:
            inner = type_of(kind, [name])
        except KeyError:
            raise unknown_key(option, _names(kind)) from None
        kind = inner
    if dataclasses.is_dataclass(kind):
        raise UserError(f"{option}: is a table; known: {choices(_names(kind))}", field=option)
    return kind


def _names(kind: Any) -> list[str]:
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return [field.name.replace("_", "-") for field in fields]


def read_fields(options: argparse.Namespace) -> dict[str, object]:
    """Return the configuration fields in parsed options: dotted name -> value.

    Raises:
        UserError: A value does not have the field's type.
    """
    texts = {key.removeprefix(DEST): text for key, text in vars(options).items() if DEST in key}
    return {field: _value(field, text) for field, text in texts.items()}


def _value(field: str, text: Any) -> object:
    kind = type_of(Config, field.split("."))
    if get_origin(kind) is dict:
        if len(text) % 2:
            raise invalid_value(_option(field), text, "must be pairs of a name and a value")
        return from_text(kind, dict(zip(text[::2], text[1::2], strict=True)), _option(field))
    if get_origin(kind) in (Union, types.UnionType):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return from_text(kind, text, _option(field))


def describe_fields(
    parser: argparse.ArgumentParser, config: Config | None, prefixes: tuple[str, ...] = ("",)
) -> None:
    """Add all fields to a parser's help, each with type, default and documentation.

    Args:
        parser: The parser to extend.
        config: The configuration whose values are shown as defaults; None for the fields' defaults.
        prefixes: Only fields whose dotted name starts with one of these are added.
    """
    usage = parser.format_usage().removeprefix("usage: ").rstrip()
    parser.usage = f"{usage} [--FIELD VALUE ...]"
    groups: dict[str, Any] = {}
    for field in field_options(config):
        if not field.dotted.startswith(prefixes):
            continue
        table = ".".join(field.path[:-1])
        if table not in groups:
            groups[table] = parser.add_argument_group(f"fields of [{table}]" if table else "fields")
        shown = "" if field.default is dataclasses.MISSING else f" (default: {show_default(field)})"
        groups[table].add_argument(
            _option(field.dotted),
            metavar=show_type(field.kind),
            help=f"{field.doc}{shown}".replace("%", "%%"),
        )
    if "N" in " ".join(groups):
        parser.epilog = f"N is the position of a table, from 0.\n\n{parser.epilog or ''}"


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


def show_type(kind: Any) -> str:
    """Format a field's type for --help, such as ``INT``, ``{a,b}`` or ``[TEXT ...]``."""
    if get_origin(kind) is Literal:
        return "{" + ",".join(get_args(kind)) + "}"
    if get_origin(kind) is tuple:
        return f"[{show_type(type_of(kind, [0]))} ...]"
    return METAVARS.get(kind, "VALUE")


def show_default(field: FieldOption) -> str:
    """Format a field's default as it would be written on the command line."""
    value = field.default
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return json.dumps(value) if isinstance(value, bool) or value is None else str(value) or "empty"
