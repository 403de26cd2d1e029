"""Count the rows of the log that match each joined table; warn if few match, fail if none do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hvdrec.errors import UserError, invalid_file, shown
from hvdrec.samples.columns import compact, plain
from hvdrec.samples.join import JoinedTable, LabelJoin, SideTable, matched
from hvdrec.samples.rows import SortedRows
from hvdrec.samples.sql import derivation, quoted, written

LOW_ENTITIES = 0.5
"""If a smaller share of rows matches samples.users or samples.items, a warning is given: usually
these tables describe most users and items."""
LOW_JOINS = 0.02
"""The same limit for samples.joins. It is low because these tables may hold rare facts, such as
promotions."""


def report_matches(
    join: LabelJoin, joined: JoinedTable, rows: SortedRows, notify: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Report the share of rows that have a match in each joined table; warn if it is low.

    Args:
        join: The tables.
        joined: The joined interactions.
        rows: The labelled interactions, without sampled negatives.
        notify: Called with a line of text for each table.

    Returns:
        Configuration key of a table -> its "file", the number of "rows" of the log, and the number
        of these rows that "matched" a row of the table.

    Raises:
        UserError: No row has a match in a table.
    """
    facts: dict[str, dict[str, Any]] = {}
    for number, side in enumerate(join.sides):
        marker, total = quoted(matched(number)), rows.count
        query = f"SELECT count(*) FILTER ({marker}) AS n FROM {rows.name}"
        count = int(rows.engine.one(query)["n"])
        facts[side.name] = {"file": side.file.name, "rows": total, "matched": count}
        notify(f"{side.name}: {count} of {total} rows matched ({count / total:.1%})")
        if not count:
            raise _no_match(join, joined, side)
        key = side.on[0]
        is_entity = side.name in ("samples.users", "samples.items")
        low = LOW_ENTITIES if is_entity else LOW_JOINS
        if count < low * total:
            join.engine.warnings.append(
                f"{side.file}: only {count / total:.1%} of rows match a row of {side.name}"
            )
        if is_entity and count < total and (twins := _twins(join, side, rows, marker)):
            join.engine.warnings.append(
                f"{side.file}: {key} {shown(twins[1])} does not match {shown(twins[0])} of "
                f"{join.file}, which differs only in zeros in front, spaces, case or '.0'"
            )
    return facts


def _no_match(join: LabelJoin, joined: JoinedTable, side: SideTable) -> UserError:
    """Build the error for a table in which no row has a match, with an example key of each side."""

    def example(table: Any) -> dict[str, Any]:
        keys = table.select(*side.on)
        present = keys.filter(*(keys[column].notnull() for column in side.on))
        return join.engine.first(present.order_by(*side.on)) or dict.fromkeys(side.on)

    ours, theirs = example(joined.table), example(side.table)
    pairs = ((column, ours[column], theirs[column]) for column in side.on)
    examples = ", ".join(f"{column} = {shown(a)} against {shown(b)}" for column, a, b in pairs)
    problem = f"matches no row of {join.file}: for example {examples} here ({side.name})"
    return invalid_file(side.file, problem, _remedy(side.on, ours, theirs))


def _remedy(on: tuple[str, ...], ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Return the remedy for keys that are written differently in two tables.

    If the keys differ in leading zeros, the remedy is the SQL that adds or removes them.
    """
    for column in on:
        a, b = str(ours[column]), str(theirs[column])
        name = f"CAST({written(column)} AS VARCHAR)"
        if b.isdigit() and a.isdigit() and b.startswith("0") and len(a) < len(b):
            padded = derivation(column, f"lpad({name}, {len(b)}, '0')")
            return f"write the keys in one form, for example {padded}"
        if a.isdigit() and b.isdigit() and a.startswith("0") and len(b) < len(a):
            short = derivation(column, f"ltrim({name}, '0')")
            return f"write the keys in one form, for example {short}"
    return "write the keys in one form in both tables, or leave the table out"


def _twins(
    join: LabelJoin, side: SideTable, rows: SortedRows, marker: str
) -> tuple[str, str] | None:
    """Return a key without a match, and a key of the table that differs from it only in form."""
    key = side.on[0]
    query = f"SELECT DISTINCT {quoted(key)} AS k FROM {rows.name} WHERE NOT {marker} ORDER BY 1"
    missed = _texts(compact(rows.engine.fetch(query).column("k").combine_chunks()))
    known = _texts(join.engine.collect(side.table.select(key))[key])
    position = pc.index_in(_normal(missed), value_set=_normal(known))
    found = np.flatnonzero(position.is_valid())
    if not len(found):
        return None
    first = int(found[0])
    return missed[first].as_py(), known[position[first].as_py()].as_py()


def _texts(array: pa.Array) -> pa.Array:
    return pc.unique(plain(array).drop_null().cast(pa.string()))


def _normal(keys: pa.Array) -> pa.Array:
    """Convert keys to lower case, without leading zeros, outer spaces and '.0' at the end."""
    text = pc.utf8_lower(pc.utf8_trim_whitespace(keys))
    text = pc.replace_substring_regex(text, r"\.0+$", "")
    return pc.replace_substring_regex(text, r"^0+(.)", r"\1")
