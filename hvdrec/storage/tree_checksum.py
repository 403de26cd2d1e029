"""Checksums of large files that several threads can compare at the same time."""

from __future__ import annotations

import hashlib
from pathlib import Path

BLOCK_BYTES = 4 << 20
KINDS = ("bundle",)
"""Kinds of artifacts that are read as a whole while somebody waits."""


def tree_facts(file: Path, kind: str) -> dict[str, str]:
    """Return ``tree`` for a file of more than `BLOCK_BYTES` in an artifact of one of `KINDS`.

    It is the hexadecimal SHA-256 of the concatenated SHA-256 digests of the file's blocks.
    """
    if kind not in KINDS or file.stat().st_size <= BLOCK_BYTES:
        return {}
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(BLOCK_BYTES):
            digest.update(hashlib.sha256(block).digest())
    return {"tree": digest.hexdigest()}
