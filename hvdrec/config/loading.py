"""Load a configuration from TOML and replace single fields."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

from hvdrec.config.root import Config
from hvdrec.config.structure import from_dict, to_dict, type_of
from hvdrec.errors import UserError, invalid_file, invalid_value


def load_config(path: str | Path, overrides: Mapping[str, object] | None = None) -> Config:
    """Load a configuration from a TOML file.

    Args:
        path: The TOML file of a run.
        overrides: Dotted field -> value that replaces the one in the file, such as
            ``{"train.epochs": 3, "tasks.0.share": 2.0}``.

    Raises:
        UserError: The file cannot be read, a key is unknown, or a value is not allowed. The message
            starts with the file's name.
    """
    try:
        raw = tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise invalid_file(path, "no such file", "give the TOML file of a run") from None
    except (OSError, UnicodeDecodeError) as error:
        raise invalid_file(path, f"cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise invalid_file(path, f"is not valid TOML: {error}") from None
    try:
        config = from_dict(Config, raw)
    except UserError as error:
        raise UserError(f"{path}: {error}", field=error.field, value=error.value) from None
    return with_fields(config, overrides or {})


def with_fields(config: Config, overrides: Mapping[str, object]) -> Config:
    """Return a configuration with some fields replaced.

    Args:
        config: The configuration to start from.
        overrides: Dotted field -> new value, such as ``{"model.ranker.hidden": [256, 128]}``. All
            values are set before the rules between fields are checked.

    Raises:
        UserError: There is no such field, or the value is not allowed.
    """
    if not overrides:
        return config
    raw = to_dict(config)
    for field, value in overrides.items():
        *tables, name = field.split(".")
        try:
            type_of(Config, field.split("."))
            table = raw
            for part in tables:
                table = table[int(part)] if isinstance(table, list) else table[part]
            table[int(name) if isinstance(table, list) else name] = value
        except (KeyError, IndexError, ValueError):
            raise invalid_value(field, value, "there is no such field") from None
    return from_dict(Config, raw)
