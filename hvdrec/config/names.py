"""Choose names of columns, tensors and files that do not collide with names of the user.

A user may give features and keys nearly any name. If hvdrec needs its own column or tensor of the
same name, the name of hvdrec's gets a prefix. File names are made of characters that every file
system allows.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Collection

PREFIX = "__hvdrec_"
"""Prefix of hvdrec's own names. No feature, key or raw column of the user may begin with it."""
LONGEST_FILE = 240
"""Largest length of a file name in bytes, without its suffix; file systems allow 255 bytes
including the suffix."""


def own_name(name: str, taken: Collection[str]) -> str:
    """Return the name for a column or tensor of hvdrec itself.

    The name gets a prefix if it is in `taken`, the names of the user's features, keys and columns.
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

    Characters that an identifier may not contain are encoded. A name that is then too long is cut
    and ends in a hash.
    """
    safe = "".join(c if f"_{c}".isidentifier() else f"%{ord(c):X}%" for c in name)
    if len(safe.encode()) <= LONGEST_FILE:
        return safe
    return f"{safe[:40]}%{hashlib.sha256(name.encode()).hexdigest()}"
