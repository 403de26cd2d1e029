"""Read a configuration from an artifact, which an earlier version of hvdrec may have written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvdrec.config.root import Config
from hvdrec.config.structure import from_dict
from hvdrec.errors import UserError, invalid_value

RETIRED: Mapping[str, object] = {
    "train.compile": False,
    "train.dropout_schedule": "constant",
    "train.embedding_penalty": 0.0,
    "train.validate_every": 1,
}
"""Options that only earlier versions have: dotted key -> default value in that version.

A stored configuration may hold such a key with this value. In a TOML file such a key is unknown.
"""


def from_stored(raw: Mapping[str, Any]) -> Config:
    """Build the configuration with which a run, features or a bundle was made.

    Args:
        raw: The stored configuration, as `to_dict` wrote it.

    Raises:
        UserError: A key is unknown, a value is not allowed, or an option that no longer exists has
            another value than its default.
    """
    return from_dict(Config, without_retired(raw))


def without_retired(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a stored configuration without the retired options.

    Raises:
        UserError: A retired option has another value than its default.
    """
    kept = dict(raw)
    for key, default in RETIRED.items():
        *tables, name = key.split(".")
        inner: Any = kept
        for table in tables:
            if not isinstance(inner.get(table), Mapping):
                break
            inner[table] = dict(inner[table])
            inner = inner[table]
        else:
            if name in inner and inner.pop(name) != default:
                raise _in_use(raw, key, default)
    return kept


def _in_use(raw: Mapping[str, Any], key: str, default: object) -> UserError:
    value: Any = raw
    for name in key.split("."):
        value = value[name]
    return invalid_value(
        key,
        value,
        f"this option no longer exists and only its default ({default!r}) can be read",
        "train again without it, or use the version of hvdrec that wrote this",
    )
