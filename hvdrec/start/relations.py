"""Compare columns of tables: find columns with the same keys, and the side that each describes."""

from __future__ import annotations

from collections.abc import Sequence

from hvdrec.config.schema import Side
from hvdrec.samples.engine import Engine
from hvdrec.samples.sql import quoted
from hvdrec.start.profile import TableProfile
from hvdrec.start.roles import Link, is_key_like
from hvdrec.start.words import words

UNIQUE = 0.99
"""A column may be the key of a table if at least this share of its values differ."""
SHARED = 0.2
"""Two columns with a smaller share of common values do not hold the same keys."""
CONSTANT = 0.98
"""A column describes users (or items) if at least this share of them have one value in all rows."""


def find_links(engine: Engine, log: TableProfile, sides: Sequence[TableProfile]) -> list[Link]:
    """Find, for each side table, the column whose values are the keys in a column of the log.

    The result has at most one link per side table, and per column of the log.
    """
    links = []
    for number, side in enumerate(sides):
        keys = [c for c in side.columns if c.distinct >= UNIQUE * side.rows and c.nulls == 0]
        for key in keys:
            for column in log.columns:
                if not is_key_like(column) or key.kind not in ("integer", "string"):
                    continue
                score = _shared(engine, (log.view, column.name), (side.view, key.name))
                is_same = not side.is_headerless and words(column.name) == words(key.name)
                if score >= SHARED or (is_same and score):
                    links.append(Link(number, key.name, column.name, score + 0.5 * is_same))
    chosen: list[Link] = []
    for link in sorted(links, key=lambda each: -each.score):
        if not any(link.table == c.table or link.column == c.column for c in chosen):
            chosen.append(link)
    return sorted(chosen, key=lambda link: link.table)


def _shared(engine: Engine, left: tuple[str, str], right: tuple[str, str]) -> float:
    """Return the common values of two columns as a share of all their values."""
    sets = (
        f"(SELECT DISTINCT CAST({quoted(column)} AS VARCHAR) AS k FROM {view} "
        f"WHERE {quoted(column)} IS NOT NULL)"
        for view, column in (left, right)
    )
    query = "SELECT count(a.k), count(b.k), count(*) FROM {} a FULL JOIN {} b USING (k)"
    [(first, second, total)] = engine.connection.sql(query.format(*sets)).fetchall()
    return (first + second - total) / total if total else 0.0


def find_sides(
    engine: Engine, log: TableProfile, user: str, item: str, columns: Sequence[str]
) -> dict[str, Side]:
    """Return column of the log -> the side that it describes.

    A column describes the item if it has one value in all rows of nearly every item, the user if
    it has one in all rows of nearly every user, and otherwise the scene.
    """
    if not columns:
        return {}
    shares = {}
    for key in (item, user):
        same = (f"avg(CAST(s{i} AS INT))" for i in range(len(columns)))
        tests = (
            f"min({quoted(c)}) IS NOT DISTINCT FROM max({quoted(c)}) "
            f"AND count({quoted(c)}) IN (0, count(*)) AS s{i}"
            for i, c in enumerate(columns)
        )
        query = (
            f"SELECT {', '.join(same)} FROM (SELECT {', '.join(tests)} FROM {log.view} "
            f"GROUP BY {quoted(key)} HAVING count(*) > 1)"
        )
        [row] = engine.connection.sql(query).fetchall()
        shares[key] = row
    sides: dict[str, Side] = {}
    for i, column in enumerate(columns):
        is_item, is_user = ((shares[key][i] or 0) >= CONSTANT for key in (item, user))
        sides[column] = "item" if is_item else "user" if is_user else "scene"
    return sides
