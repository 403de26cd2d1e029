"""Which split a row belongs to, as SQL that adds a column ``_split`` (0 train, 1 validation, 2 test)."""

from __future__ import annotations

from hvdrec.config import Samples
from hvdrec.errors import UserError
from hvdrec.samples.engine import quoted

SPLITS = ("train", "validation", "test")


def split_sql(samples: Samples, source: str) -> str:
    """Return a query over a relation with the columns ``_row`` and (where used) ``_time``.

    temporal cuts at values of time, so that rows of one time are never divided; the random methods
    depend on nothing but the row numbers and the seed.
    """
    split, user = samples.split, quoted(samples.user)
    validation, test = split.fractions[1], split.fractions[2]
    drawn = f"hash(_row, {split.seed})"
    match split.method:
        case "temporal":
            return _temporal(samples, source)
        case "random":
            return f"""
                SELECT * EXCLUDE (_rank, _count), CASE
                    WHEN _rank <= _count - round({validation + test} * _count) THEN 0
                    WHEN _rank <= _count - round({test} * _count) THEN 1 ELSE 2 END AS _split
                FROM (SELECT *, row_number() OVER (ORDER BY {drawn}, _row) AS _rank,
                             count(*) OVER () AS _count FROM {source})"""
        case "random-per-user":
            # As usual in the field: shares rounded down, but at least one row where there are three.
            def held(share: float) -> str:
                return f"greatest(floor({share} * _count + 1e-9), 1)"

            return f"""
                SELECT * EXCLUDE (_rank, _count), CASE
                    WHEN _count < 3 THEN 0
                    WHEN _rank <= {held(test)} THEN 2
                    WHEN _rank <= {held(test)} + {held(validation)} THEN 1 ELSE 0 END AS _split
                FROM (SELECT *, row_number() OVER (PARTITION BY {user} ORDER BY {drawn}, _row) AS _rank,
                             count(*) OVER (PARTITION BY {user}) AS _count FROM {source})"""
        case "leave-last-out":
            _needs_time(samples)
            return f"""
                SELECT * EXCLUDE (_rank, _count), CASE
                    WHEN _count < 3 THEN 0 WHEN _rank = 1 THEN 2 WHEN _rank = 2 THEN 1 ELSE 0
                    END AS _split
                FROM (SELECT *, row_number() OVER (PARTITION BY {user} ORDER BY _time DESC, _row DESC)
                             AS _rank, count(*) OVER (PARTITION BY {user}) AS _count FROM {source})"""


def _temporal(samples: Samples, source: str) -> str:
    split = samples.split
    if not split.column:
        _needs_time(samples)
    column = quoted(split.column) if split.column else "_time"
    if split.boundaries:
        train, validation = split.boundaries
        return f"""
            SELECT *, CASE WHEN {column} <= {train} THEN 0
                           WHEN {column} <= {validation} THEN 1 ELSE 2 END AS _split
            FROM {source}"""
    train, validation, _ = split.fractions
    return f"""
        SELECT s.*, CASE WHEN {column} < c.first THEN 0
                         WHEN {column} < c.second THEN 1 ELSE 2 END AS _split
        FROM {source} s, (
            SELECT min({column}) FILTER (_rank > round({train} * _count)) AS first,
                   min({column}) FILTER (_rank > round({train + validation} * _count)) AS second
            FROM (SELECT {column}, row_number() OVER (ORDER BY {column}) AS _rank,
                         count(*) OVER () AS _count FROM {source})) c"""


def _needs_time(samples: Samples) -> None:
    if not samples.time:
        raise UserError(
            f"samples.split.method = '{samples.split.method}': needs samples.time (or "
            "samples.split.column); name the column of the time, or take method = 'random'"
        )
