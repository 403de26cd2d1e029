"""Checks of rows: label rates, duplicates, match rates of joins, and leakage between splits."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from hvdrec.checks.findings import Finding, PeriodFacts
from hvdrec.checks.source import SPLIT, SampleSource
from hvdrec.config.checks_section import Checks
from hvdrec.config.data_sections import History
from hvdrec.samples.split import SPLITS
from hvdrec.samples.sql import quoted

PERIODS = 10
"""Number of periods of equal length, if the times have no known unit and so cannot be days."""
ERRORS = 4.0
"""A label rate that differs by more standard errors is not due to chance."""
HISTORY_ROWS = 200_000
"""About this many rows are examined for later items in histories: all rows of some users."""


def label_rates(source: SampleSource) -> dict[str, float]:
    """Return split -> mean label."""
    found = source.by_split([f"avg({quoted(source.label)})"])
    return {split: float(found[split][0]) for split in SPLITS if split in found}


def measure_periods(source: SampleSource) -> tuple[PeriodFacts, ...]:
    """Measure the rows and the label rate of each period: a day, or a tenth of the time span.

    Without a time, there are no periods.
    """
    if not source.time:
        return ()
    time = quoted(source.time)
    [(dtype, low, high)] = source.rows(
        f"SELECT any_value(typeof({time})), min({time}), max({time}) FROM {source.view}"
    )
    if dtype == "DATE" or dtype.startswith("TIMESTAMP"):
        period = f"strftime({time}, '%Y-%m-%d')"
    elif low is not None and low >= 3e8 and high <= 4.2e9:
        period = f"strftime(make_timestamp(CAST({time} AS BIGINT) * 1000000), '%Y-%m-%d')"
    else:
        width = max((high - low) / PERIODS, 1e-9)
        start = f"{low} + least(floor(({time} - {low}) / {width}), {PERIODS - 1}) * {width}"
        period = f"format('{{:g}} to {{:g}}', {start}, {start} + {width})"
    rows = source.rows(
        f"SELECT {period} AS p, count(*), avg({quoted(source.label)}), min({time}) AS t "
        f"FROM {source.view} GROUP BY p ORDER BY t"
    )
    return tuple(PeriodFacts(str(p), int(n), float(rate)) for p, n, rate, _ in rows)


def label_findings(
    rates: Mapping[str, float], periods: tuple[PeriodFacts, ...], limits: Checks
) -> Iterator[Finding]:
    """Yield splits with labels of one class, and days whose label rate is far from the median."""
    for split, rate in rates.items():
        if rate in (0.0, 1.0):
            text = f"all labels are {rate:g}"
            yield Finding("labels", "label", split, rate, limits.labels, text)
    if len(periods) < 3:
        return
    median = statistics.median(period.label_rate for period in periods)
    for period in periods:
        error = math.sqrt(max(median * (1 - median), 1e-9) / period.rows)
        low, high = sorted((period.label_rate, median))
        factor = high / low if low else math.inf
        if factor > limits.labels and high - low > ERRORS * error:
            text = f"label rate {period.label_rate:.2%} of {period.rows} rows, median {median:.2%}"
            yield Finding("labels", period.period, "", min(factor, 1e9), limits.labels, text)


def duplicate_findings(source: SampleSource, limits: Checks) -> Iterator[Finding]:
    """Yield splits with rows that repeat other rows."""
    key = ", ".join([SPLIT, *_identity(source)])
    query = (
        f"SELECT {SPLIT}, sum(n - 1), sum(n) FROM (SELECT {SPLIT}, count(*) AS n "
        f"FROM {source.view} GROUP BY {key}) GROUP BY {SPLIT}"
    )
    for split, repeated, rows in source.rows(query):
        share = float(repeated) / float(rows)
        if share > limits.duplicates:
            text = f"{int(repeated)} of {int(rows)} rows repeat another row ({_shown(source)})"
            yield Finding("duplicates", "rows", split, share, limits.duplicates, text)


def match_findings(matches: Mapping[str, Mapping[str, Any]], limits: Checks) -> Iterator[Finding]:
    """Yield joined tables that few rows match; `matches` comes from the manifest of the samples."""
    for name, facts in matches.items():
        share = facts["matched"] / facts["rows"] if facts["rows"] else 0.0
        limit = limits.matches if name in ("samples.users", "samples.items") else 0.0
        if share < limit or not facts["matched"]:
            text = f"{share:.1%} of the rows match a row of {facts['file']}"
            yield Finding("matches", name, "", share, limit, text)


def leakage_findings(source: SampleSource, limits: Checks) -> Iterator[Finding]:
    """Yield leaks between splits: copied rows, wrong order, later items in histories."""
    yield from _copies(source, limits)
    yield from _order(source, limits)
    for history in source.config.samples.history:
        yield from _futures(source, history, limits)


def _copies(source: SampleSource, limits: Checks) -> Iterator[Finding]:
    names = _identity(source)
    on = " AND ".join(f"a.{name} IS NOT DISTINCT FROM b.{name}" for name in names)
    for split, earlier in (("validation", ("train",)), ("test", ("train", "validation"))):
        where = f"{SPLIT} IN ({', '.join(repr(each) for each in earlier)})"
        query = (
            f"SELECT count(*) FILTER (b.hit), count(*) FROM "
            f"(SELECT * FROM {source.view} WHERE {SPLIT} = '{split}') AS a LEFT JOIN "
            f"(SELECT DISTINCT {', '.join(names)}, true AS hit FROM {source.view} WHERE {where}) "
            f"AS b ON {on}"
        )
        [(copies, rows)] = source.rows(query)
        if rows and copies / rows > limits.leakage:
            text = f"{copies} rows also are in {' or '.join(earlier)} ({_shown(source)})"
            yield Finding("leakage", "rows", split, copies / rows, limits.leakage, text)


def _order(source: SampleSource, limits: Checks) -> Iterator[Finding]:
    split, time = source.config.samples.split, source.config.samples.time
    if split.method != "temporal" or not time or split.column not in ("", time):
        return
    name = quoted(source.time)
    for early, late in (("train", "validation"), ("validation", "test")):
        query = (
            f"SELECT count(*) FILTER ({name} >= (SELECT min({name}) FROM {source.view} "
            f"WHERE {SPLIT} = '{late}')), count(*) FROM {source.view} WHERE {SPLIT} = '{early}'"
        )
        [(later, rows)] = source.rows(query)
        if rows and later / rows > limits.leakage:
            text = f"{later} rows are not older than the first row of {late}"
            yield Finding("leakage", "time", early, later / rows, limits.leakage, text)


def _futures(source: SampleSource, history: History, limits: Checks) -> Iterator[Finding]:
    """Yield a history that holds items which the user had only later, or only in held-out rows.

    An item may be in the history of a row if the user has a row with this item that the history may
    use. With scope "before", this is an earlier row; with a random split, a training row.
    """
    user, item = map(quoted, source.keys)
    entry = quoted(history.column) if history.column else item
    before = history.scope == "before" and bool(source.time)
    time = quoted(source.time) if source.time else "0"
    allowed = f"{SPLIT} = 'train'" if source.is_random else "true"
    [(rows,)] = source.rows(f"SELECT count(*) FROM {source.view}")
    some = max(1, rows // HISTORY_ROWS)
    chosen = f"hash({user}) % {some} = 0"
    leaked = "e.first IS NULL" + (" OR e.first >= h.t" if before else "")
    query = f"""
        WITH h AS (
            SELECT {SPLIT} AS s, row_number() OVER () AS r, {user} AS u, {time} AS t,
                {quoted(history.name)} AS entries
            FROM {source.view} WHERE {chosen}
        ), flat AS (SELECT s, r, u, t, unnest(list_distinct(entries)) AS i FROM h),
        e AS (
            SELECT {user} AS u, {entry} AS i, min({time}) FILTER ({allowed}) AS first
            FROM {source.view} WHERE {chosen} GROUP BY ALL
        )
        SELECT h.s, count(DISTINCT h.r) FROM flat AS h JOIN e ON h.u = e.u AND h.i = e.i
        WHERE {leaked} GROUP BY h.s"""
    totals = {s: n for s, (n,) in source.by_split(["count(*)"], chosen).items()}
    for split, count in source.rows(query):
        share = count / totals[split]
        if share > limits.leakage:
            what = "only later" if before else "only in held-out rows"
            text = f"{share:.1%} of the examined histories hold items that the user had {what}"
            yield Finding("leakage", history.name, split, share, limits.leakage, text)


def _identity(source: SampleSource) -> list[str]:
    """Return the columns that identify a row: user, item, time and label."""
    names = [*source.keys, source.label]
    if source.time:
        return [quoted(name) for name in (*names, source.time)]
    others = [column.name for column in source.columns() if not column.is_list]
    return [quoted(name) for name in dict.fromkeys([*names, *others])]


def _shown(source: SampleSource) -> str:
    return "same user, item, time and label" if source.time else "same label and features"
