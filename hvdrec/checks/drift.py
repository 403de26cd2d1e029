"""Drift: how much the values of a column differ from those of another run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hvdrec.checks.source import SPLIT, SampleSource, is_missing
from hvdrec.config.schema import Column
from hvdrec.samples.sql import literal, quoted

BINS = 10
"""Quantile bins of numbers."""
VALUES = 50
"""The most frequent values of the other run have a bin each; all further values share one."""
FLOOR = 1e-4
"""Smallest share of a bin, so that an empty bin does not make the index infinite."""


def psi(expected: Sequence[float], actual: Sequence[float]) -> float:
    """Return the population stability index of two histograms over the same bins.

    It is sum((a - e) * ln(a / e)) over the bins, with shares a and e of at least `FLOOR`.

    Source: Siddiqi, Credit Risk Scorecards, 2006.
    """
    first, second = (
        [max(value / max(sum(counts), 1e-300), FLOOR) for value in counts]
        for counts in (expected, actual)
    )
    return sum((a - e) * math.log(a / e) for e, a in zip(first, second, strict=True))


def measure_drift(source: SampleSource, other: SampleSource, column: Column) -> float:
    """Return the PSI of a column's training values against those of another run."""
    value = f"unnest({quoted(column.name)})" if column.is_list else quoted(column.name)
    present = f"{SPLIT} = 'train' AND NOT {is_missing(column)}"
    values = [f"(SELECT {value} AS v FROM {s.view} WHERE {present})" for s in (other, source)]
    if column.kind == "numeric" or column.dtype == "float":
        bins = _quantile_bin(other, values[0])
    else:
        bins = _value_bin(other, values[0])
    histograms = []
    for each, rows in zip((other, source), values, strict=True):
        counts = dict(each.rows(f"SELECT {bins} AS b, count(*) FROM {rows} GROUP BY b"))
        [(missing,)] = each.rows(
            f"SELECT count(*) FILTER ({is_missing(column)}) FROM {each.view} "
            f"WHERE {SPLIT} = 'train'"
        )
        histograms.append({**{str(k): n for k, n in counts.items()}, "missing": missing})
    names = sorted({*histograms[0], *histograms[1]})
    first, second = ([h.get(name, 0) for name in names] for h in histograms)
    return psi(first, second)


def _quantile_bin(other: SampleSource, rows: str) -> str:
    steps = ", ".join(str(i / BINS) for i in range(1, BINS))
    [(edges,)] = other.rows(f"SELECT approx_quantile(CAST(v AS DOUBLE), [{steps}]) FROM {rows}")
    tests = [f"CAST(v > CAST('{edge!r}' AS DOUBLE) AS INT)" for edge in sorted(set(edges or ()))]
    return " + ".join(tests) or "0"


def _value_bin(other: SampleSource, rows: str) -> str:
    top = other.rows(
        f"SELECT CAST(v AS VARCHAR) AS k FROM {rows} GROUP BY k "
        f"ORDER BY count(*) DESC, k LIMIT {VALUES}"
    )
    if not top:
        return "'other'"
    listed = ", ".join(literal(value) for (value,) in top)
    text = "CAST(v AS VARCHAR)"
    return f"CASE WHEN {text} IN ({listed}) THEN 'v' || {text} ELSE 'other' END"
