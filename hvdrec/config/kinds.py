"""The registry of feature kinds: it maps the names in a configuration to classes.

The classes are in `hvdrec.features.kinds`. The registry holds their import paths, so that reading a
configuration imports only the kinds that it uses.
"""

from __future__ import annotations

import importlib
from typing import Any

_PACKAGE = "hvdrec.features.kinds"
_CLASSES = {
    "categorical": f"{_PACKAGE}.categorical:Categorical",
    "categorical_list": f"{_PACKAGE}.categorical_list:CategoricalList",
    "sequence": f"{_PACKAGE}.sequence:Sequence",
    "numeric": f"{_PACKAGE}.numeric:Numeric",
    "hashed": f"{_PACKAGE}.hashed:Hashed",
    "crossed": f"{_PACKAGE}.crossed:Crossed",
}
_kinds: dict[str, Any] = {}


def register_kind(name: str, kind: Any) -> None:
    """Let configurations use a feature kind under a name.

    Worker processes import the module that defines a kind again, so call this at the top level of
    a module, not under ``if __name__ == "__main__"``.

    Args:
        name: Value of ``kind`` in ``[[features]]``.
        kind: An instance of a subclass of `hvdrec.features.kinds.Kind`.

    Raises:
        ValueError: The name belongs to another kind.
    """
    if name in _CLASSES or type(_kinds.get(name, kind)) is not type(kind):
        raise ValueError(f"feature kind '{name}' is already registered; choose another name")
    _kinds[name] = kind


def kind_names() -> tuple[str, ...]:
    """Return the names of all registered kinds."""
    return tuple(dict.fromkeys([*_CLASSES, *_kinds]))


def find_kind(name: str) -> Any:
    """Return the kind that is registered under a name.

    Raises:
        KeyError: No kind has this name.
    """
    if name not in _kinds:
        module, class_name = _CLASSES[name].split(":")
        _kinds[name] = getattr(importlib.import_module(module), class_name)()
    return _kinds[name]
