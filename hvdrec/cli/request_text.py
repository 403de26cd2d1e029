"""Parse the parts of a request from a command line: keys and FIELD=VALUE pairs."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from hvdrec.scoring.batching import Raw
from hvdrec.scoring.bundle import Field
from hvdrec.scoring.candidates import Key
from hvdrec.scoring.errors import invalid_request, unknown_field
from hvdrec.scoring.scorer import Scorer


def parse_key(scorer: Scorer, side: str, text: str) -> Key:
    """Convert text to a user or item key of the type that the bundle declares."""
    if scorer.key_dtype(side) == "string":
        return text
    try:
        return int(text)
    except ValueError:
        raise invalid_request(side, text, "the key is an integer") from None


def parse_user(scorer: Scorer, text: str) -> Key | Raw:
    """Convert text to the key of a user, or, if it is a JSON object, to raw features."""
    if not text.lstrip().startswith("{"):
        return parse_key(scorer, "user", text)
    try:
        raw: Raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise invalid_request("user", text, f"is not valid JSON ({error})") from None
    return raw


def parse_scene(scorer: Scorer, pairs: Sequence[str]) -> dict[str, Any]:
    """Parse fields of the scene (the context of a request), such as ``hour=21``.

    An empty value is a missing value.
    """
    fields = {field.name: field for field in scorer.info.side("scene")}
    scene: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = _split(pair, fields)
        if not equals:
            raise invalid_request("scene", pair, "must be FIELD=VALUE", "for example hour=21")
        if name not in fields:
            raise unknown_field(f"scene.{name}", fields)
        scene[name] = _parse(fields[name], text)
    return scene


def parse_allowed(scorer: Scorer, pairs: Sequence[str]) -> dict[str, list[Any]]:
    """Parse filters such as ``genres=Drama``; a field may occur several times."""
    fields = {field.name: field for field in scorer.info.side("item")}
    allowed: dict[str, list[Any]] = {}
    for pair in pairs:
        name, equals, text = _split(pair, fields)
        if not equals:
            raise invalid_request(
                "allowed", pair, "must be FIELD=VALUE", "for example genres=Drama"
            )
        field = fields.get(name)
        # A field that is not a filter is refused later, by `recommend`, which lists the filters.
        value = text if field is None else _parse_scalar(field, text)
        allowed.setdefault(name, []).append(value)
    return allowed


def _split(pair: str, fields: Collection[str]) -> tuple[str, str, str]:
    """Split FIELD=VALUE into field, equals sign and value.

    The name of a field may contain an equals sign, so the longest known field that fits is taken.
    """
    known = [name for name in fields if pair.startswith(f"{name}=")]
    if not known:
        return pair.partition("=")
    name = max(known, key=len)
    return name, "=", pair[len(name) + 1 :]


def _parse(field: Field, text: str) -> Any:
    if text == "":
        return None
    if field.is_list:
        return [_parse_scalar(field, part) for part in text.split(",")]
    return _parse_scalar(field, text)


def _parse_scalar(field: Field, text: str) -> str | int | float:
    try:
        if field.dtype == "string":
            return text
        return int(text) if field.dtype == "int" else float(text)
    except ValueError:
        wanted = "an integer" if field.dtype == "int" else "a number"
        raise invalid_request(field.path, text, f"must be {wanted}") from None
