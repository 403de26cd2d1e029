"""Names: the user's own are free; hvdrec's give way, and files get names that any disk takes."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Collection

PREFIX = "__hvdrec_"
"""Start of the names that no feature, key or raw column of the user may have."""
LONGEST_FILE = 240
"""Bytes of a file name without its suffix; file systems allow 255 in all."""


def own_name(name: str, taken: Collection[str]) -> str:
    """Return the name of a column or tensor of hvdrec's own, prefixed if it is the user's."""
    return PREFIX + name if name in taken else name


def name_problem(name: str) -> str:
    """Return why a text cannot name a feature or key; empty if it can."""
    if not name:
        return "is empty"
    if name.startswith(PREFIX):
        return f"names that start with '{PREFIX}' are hvdrec's own"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        return "contains a control character"
    return ""


def file_name(name: str) -> str:
    """Return a file name for a feature, without suffix; identifiers are their own file names."""
    safe = "".join(c if f"_{c}".isidentifier() else f"%{ord(c):X}%" for c in name)
    if len(safe.encode()) <= LONGEST_FILE:
        return safe
    return f"{safe[:40]}%{hashlib.sha256(name.encode()).hexdigest()}"
