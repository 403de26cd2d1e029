"""Choose names of columns, tensors and files that do not collide with names of the user.

A user may give features and keys nearly any name. If hvdrec needs a column or tensor of the same
name, its own gets a prefix. File names are made of characters that every file system allows.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Collection

PREFIX = "__hvdrec_"
"""Prefix of hvdrec's own names. No feature, key or raw column of the user may begin with it."""
LONGEST_FILE = 240
"""Largest length of a file name in bytes, without its suffix; file systems allow 255 with it."""


def own_name(name: str, taken: Collection[str]) -> str:
    """Return the name for a column or tensor of hvdrec itself.

    It gets a prefix if the user has a feature, key or column of this name, listed in `taken`.
    """
    return PREFIX + name if name in taken else name


def name_problem(name: str) -> str:
    """Return the reason why a feature or key cannot have this name; "" if it can."""
    if not name:
        return "is empty"
    if name.startswith(PREFIX):
        return f"names that start with '{PREFIX}' are hvdrec's own"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        return "contains a control character"
    return ""


def file_name(name: str) -> str:
    """Return a file name for a feature, without suffix.

    It is the name of the feature if this is an identifier. Other characters are encoded.
    """
    safe = "".join(c if f"_{c}".isidentifier() else f"%{ord(c):X}%" for c in name)
    if len(safe.encode()) <= LONGEST_FILE:
        return safe
    return f"{safe[:40]}%{hashlib.sha256(name.encode()).hexdigest()}"
