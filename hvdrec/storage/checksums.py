"""Checksums of files, and of JSON documents that contain their own checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvdrec.storage.json_text import json_text

CHECKSUM = "checksum"
"""Key under which a JSON document holds the checksum of its other entries."""


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(document: Mapping[str, Any], indent: int | None = 1) -> str:
    """Format a JSON document with a checksum as its last entry.

    The checksum is the hexadecimal SHA-256 of the other entries, written as compact JSON with
    sorted keys. Numbers that are NaN or infinite become null.
    """
    plain = json.loads(json_text(document))
    return json.dumps({**plain, CHECKSUM: _checksum(plain)}, indent=indent) + "\n"


def unsealed(text: bytes | str) -> dict[str, Any]:
    """Parse a JSON document and verify its checksum, if it has one; earlier versions wrote none.

    Returns:
        The document without its checksum.

    Raises:
        ValueError: The text is not a JSON object in UTF-8, or its checksum differs.
    """
    try:
        plain = json.loads(text.decode() if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(plain, dict):
        raise ValueError("is not a JSON object")
    expected = plain.pop(CHECKSUM, None)
    if expected is not None and expected != _checksum(plain):
        raise ValueError("its contents differ from its checksum")
    return plain


def _checksum(plain: Mapping[str, Any]) -> str:
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
