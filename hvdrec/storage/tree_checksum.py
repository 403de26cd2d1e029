"""Compute checksums of large files that a reader can compare with several threads."""

from __future__ import annotations

import hashlib
from pathlib import Path

BLOCK_BYTES = 4 << 20
KINDS = ("bundle",)
"""Kinds of artifacts whose files get a tree checksum. A service verifies its whole bundle when it
starts, so the verification must be fast."""


def tree_facts(file: Path, kind: str) -> dict[str, str]:
    """Return the manifest entry ``tree`` of a file: the tree checksum of a large file.

    Each block of `BLOCK_BYTES` is hashed with SHA-256; the checksum is the hexadecimal SHA-256 of
    the concatenated digests. The result is empty for a file of one block and for artifacts of other
    kinds than `KINDS`.
    """
    if kind not in KINDS or file.stat().st_size <= BLOCK_BYTES:
        return {}
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(BLOCK_BYTES):
            digest.update(hashlib.sha256(block).digest())
    return {"tree": digest.hexdigest()}
