"""Convert nested frozen dataclasses from plain values and back, with checks."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import pydantic.dataclasses
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import to_json, to_jsonable_python

from hvdrec.errors import UserError, invalid_value, unknown_key

T = TypeVar("T")
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(*, frozen: bool) -> Callable[[type], type]:
        """Make a dataclass that checks the types and constraints of its fields when it is built.

        No value is converted, except an int to a float. A wrong value raises UserError.
        """

        def decorate(cls: type) -> type:
            checked = pydantic.dataclasses.dataclass(cls, frozen=frozen, config=STRICT)
            build = checked.__init__

            @functools.wraps(build)
            def init(self: Any, *args: Any, **kwargs: Any) -> None:
                try:
                    build(self, *args, **kwargs)
                except ValidationError as error:
                    raise _user_error(error, checked, checked.__name__) from None

            checked.__init__ = init
            return checked

        return decorate


__all__ = ["dataclass", "field_docs", "from_dict", "from_text", "to_dict", "type_of"]


def to_dict(value: Any) -> Any:
    """Convert nested dataclasses to dicts, lists and scalars, ready for JSON, without None."""
    return to_jsonable_python(value, exclude_none=True)


def from_dict(kind: type[T], raw: Any) -> T:
    """Build a dataclass from plain values.

    Raises:
        UserError: A key is unknown or a value is not allowed; the error names the dotted key.
    """
    try:
        # Strict validation accepts lists for tuples and dicts for dataclasses only in JSON.
        return TypeAdapter(kind).validate_json(to_json(raw, fallback=str))
    except ValidationError as error:
        raise _user_error(error, kind) from None


def from_text(kind: Any, text: str | list[str] | dict[str, str], field: str) -> Any:
    """Convert text from a command line to the type of a field.

    Raises:
        UserError: The text is not of that type; `field` names it.
    """
    try:
        return TypeAdapter(kind).validate_python(text)
    except ValidationError as error:
        raise _user_error(error, kind, field) from None


def field_docs(kind: Any) -> dict[str, str]:
    """Return for each field of a dataclass the docstring under it, on one line."""
    fields = kind.__pydantic_fields__
    return {name: " ".join((info.description or "").split()) for name, info in fields.items()}


def type_of(kind: Any, path: Sequence[str | int]) -> Any:
    """Return the type of a nested field, without its constraints.

    Args:
        kind: The dataclass at the root.
        path: Names of fields, keys of dicts and positions in tuples (as int or text).

    Raises:
        KeyError: There is no such field.
    """
    for part in path:
        arguments = get_args(kind)
        if dataclasses.is_dataclass(kind):
            kind = get_type_hints(kind)[str(part)]
        elif get_origin(kind) is dict:
            kind = arguments[1]
        elif get_origin(kind) is tuple and str(part).isdecimal():
            kind = arguments[0]
        else:
            raise KeyError(part)
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _user_error(error: ValidationError, kind: Any, root: str = "") -> UserError:
    """Return the error about an unknown key, if there is one, else about the first mistake.

    A mistyped key causes two errors: the key as written is unknown, and the right key is missing.
    The error about the unknown key explains the mistake.
    """
    details = error.errors(include_url=False)
    first = min(details, key=lambda each: each["type"] != "unexpected_keyword_argument")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return cause
    if first["type"] == "unexpected_keyword_argument":
        table = type_of(kind, first["loc"][:-1])
        names = [each.name for each in dataclasses.fields(table)]
        return unknown_key(_dotted(root, first["loc"]), names)
    location = list(first["loc"])
    if root and location and isinstance(location[0], int) and dataclasses.is_dataclass(kind):
        location[0] = dataclasses.fields(kind)[location[0]].name  # a positional argument
    path = _path(kind, location)
    field, value = _dotted(root, path), first["input"]
    if first["type"] == "missing":
        return UserError(f"{field}: is missing; it has no default", field=field)
    same = [each for each in details if _path(kind, each["loc"]) == path]  # one per type of a union
    problem = " or ".join(dict.fromkeys(_problem(each["msg"]) for each in same or [first]))
    problem = problem.replace(" or must be", " or")
    return invalid_value(field or "the file", value, problem)


def _path(kind: Any, location: Sequence[str | int]) -> tuple[str | int, ...]:
    """Return a location without the names that pydantic inserts for the types of a union."""
    for end in range(len(location), 0, -1):
        try:
            type_of(kind, location[:end])
            return tuple(location[:end])
        except KeyError:
            continue
    return ()


def _problem(message: str) -> str:
    """Rephrase the library's message: ``Input should be ...`` becomes ``must be ...``."""
    text = re.sub(r"^(Input|\w+) should ", "must ", message.removeprefix("Value error, "))
    text = re.sub(r" after validation, not \d+$", "", text)
    return text.replace("an object", "a table").replace("array", "list")


def _dotted(root: str, path: Sequence[str | int]) -> str:
    text = root
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")
