"""Checks of single columns: nulls, ranges, cardinality, unseen values, constant scene fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hvdrec.checks.findings import ColumnFacts, Finding
from hvdrec.checks.source import HELD_OUT, SPLIT, SampleSource, is_missing
from hvdrec.config.checks_section import CheckName, Checks
from hvdrec.config.schema import Column
from hvdrec.samples.sql import quoted


def measure_columns(source: SampleSource) -> tuple[ColumnFacts, ...]:
    """Measure the missing values, the range, the cardinality and the unseen values of columns."""
    columns = source.columns()
    nulls = source.by_split([f"avg(CAST({is_missing(c)} AS INT))" for c in columns])
    facts = []
    for i, column in enumerate(columns):
        shares = {split: float(row[i]) for split, row in nulls.items()}
        name = quoted(column.name)
        value = f"unnest({name})" if column.is_list else name
        is_number = column.kind == "numeric" or column.dtype == "float"
        low = high = None
        where = f"WHERE {SPLIT} = 'train' AND NOT {is_missing(column)}"
        inner = f"(SELECT {value} AS v FROM {source.view} {where})"
        ends = "min(v), max(v)" if is_number else "NULL, NULL"
        [(distinct, low, high)] = source.rows(
            f"SELECT approx_count_distinct(v), {ends} FROM {inner}"
        )
        has_codes = column.kind == "categorical"
        facts.append(
            ColumnFacts(
                column.name,
                column.side,
                shares,
                int(distinct),
                None if low is None else float(low),
                None if high is None else float(high),
                _unseen(source, column) if has_codes else {},
            )
        )
    return tuple(facts)


def _unseen(source: SampleSource, column: Column) -> dict[str, float]:
    """Return, for validation and test, the share of rows whose value is not in train."""
    name, view = quoted(column.name), source.view
    present = f"NOT {is_missing(column)}"
    query = (
        f"SELECT {SPLIT}, avg(CAST(seen.k IS NULL AS INT)) FROM {view} LEFT JOIN "
        f"(SELECT DISTINCT {name} AS k FROM {view} WHERE {SPLIT} = 'train' AND {present}) AS seen "
        f"ON {name} = seen.k WHERE {SPLIT} <> 'train' AND {present} GROUP BY {SPLIT}"
    )
    return {split: float(share) for split, share in source.rows(query)}


def column_findings(
    source: SampleSource, facts: tuple[ColumnFacts, ...], limits: Checks, rows: int
) -> Iterator[Finding]:
    """Yield the columns that are beyond a limit; `rows` is the number of training rows."""
    columns: dict[str, Column] = {column.name: column for column in source.columns()}
    for fact in facts:
        yield from _nulls(fact, limits)
    for fact in facts:
        if fact.low is not None and fact.high is not None:
            yield from _ranges(source, columns[fact.name], fact, limits)
    for fact in facts:
        yield from _cardinality(source, columns[fact.name], fact, limits, rows)
    for fact in facts:
        for split, share in (fact.unseen or {}).items():
            if share > limits.unseen:
                text = f"{share:.1%} of the rows have a value that no training row has"
                yield Finding("unseen", fact.name, split, share, limits.unseen, text)


def _nulls(fact: ColumnFacts, limits: Checks) -> Iterator[Finding]:
    for split, share in fact.nulls.items():
        if share > limits.nulls:
            text = f"{share:.1%} of the values are missing"
            yield Finding("nulls", fact.name, split, share, limits.nulls, text)


def _ranges(
    source: SampleSource, column: Column, fact: ColumnFacts, limits: Checks
) -> Iterator[Finding]:
    name = quoted(column.name)
    value = f"CAST({name} AS DOUBLE)"
    low, high = (f"CAST('{end!r}' AS DOUBLE)" for end in (fact.low, fact.high))
    outside = f"avg(CAST({value} < {low} OR {value} > {high} AS INT))"
    found: dict[str, Any] = source.by_split([outside], f"NOT {is_missing(column)}")
    for split in HELD_OUT:
        share = float(found[split][0] or 0) if split in found else 0.0
        if share > limits.ranges:
            span = f"{fact.low:g} to {fact.high:g}"
            text = f"{share:.1%} of the numbers are outside {span}, the range of train"
            yield Finding("ranges", fact.name, split, share, limits.ranges, text)


def _cardinality(
    source: SampleSource, column: Column, fact: ColumnFacts, limits: Checks, rows: int
) -> Iterator[Finding]:
    if fact.distinct <= 1:
        is_scene = column.side == "scene"
        text = (
            "all training rows have one value" if fact.distinct else "no training row has a value"
        )
        if is_scene:
            text += ": a model cannot learn from this scene field"
        check: CheckName = "scene" if is_scene else "cardinality"
        yield Finding(check, fact.name, "train", fact.distinct, 1, text)
    elif column.kind == "categorical" and column.name not in source.keys:
        share = fact.distinct / max(rows, 1)
        if share > limits.cardinality:
            text = f"{fact.distinct} different values in {rows} rows: nearly every row has its own"
            yield Finding("cardinality", fact.name, "train", share, limits.cardinality, text)
