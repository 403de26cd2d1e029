"""Name the columns of files without a header, and give a key one name in all tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hvdrec.config.data_sections import TableFormat
from hvdrec.start.profile import TableProfile
from hvdrec.start.roles import Link
from hvdrec.start.words import words


def new_names(
    log: TableProfile,
    others: Sequence[TableProfile],
    links: Sequence[Link],
    user: str,
    item: str,
    time: str,
) -> dict[str, dict[str, str]]:
    """Return path of a table -> old name of a column -> its new name.

    Columns of files without a header get names, and a key has one name in all tables.
    """
    roles = {user: "user_id", item: "item_id", time: "time"} if log.is_headerless else {}
    names: dict[str, dict[str, str]] = {log.path: dict(roles)}
    if log.is_headerless:
        left = [c for c in log.columns if c.name not in roles]
        ratings = [c.name for c in left if c.values and c.is_number and 3 <= c.distinct <= 11]
        names[log.path] |= {name: "rating" for name in ratings[:1]}
    for number, table in enumerate(others):
        new: dict[str, str] = {}
        if table.is_headerless:
            stem = _identifier(table.path)
            new = {c.name: f"{stem}_{i}" for i, c in enumerate(table.columns)}
        link = next((link for link in links if link.table == number), None)
        if link and link.column in (user, item):
            key = names[log.path].get(link.column, link.column)
            if key != link.key:
                new[link.key] = key
        names[table.path] = new
    return names


def _identifier(path: str) -> str:
    """Return the longest word of a file name, without suffixes: ``u.user`` gives user."""
    found = [w for w in words(path.rsplit("/", 1)[-1]) if w.isalpha() and w not in _SUFFIXES]
    return max(found, key=len, default="column")


_SUFFIXES = ("csv", "tsv", "txt", "data", "dat", "gz", "jsonl", "ndjson", "log", "parquet")


def declared_format(
    table: TableProfile, renamed: TableProfile, names: Mapping[str, str]
) -> TableFormat | None:
    """Return the format to declare for a table; None if its suffix and header say enough."""
    declared = table.format
    changed = {old: new for old, new in names.items() if old != new}
    if table.is_headerless and declared:
        return replace(declared, columns=tuple(renamed.names))
    if not changed:
        return declared
    return replace(declared or TableFormat(path=table.path), rename=changed)
