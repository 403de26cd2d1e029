"""Combine the guesses about all tables into the contents of a first configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import duckdb

from hvdrec.config.data_sections import TableFormat
from hvdrec.config.schema import Side
from hvdrec.errors import choices, invalid_value
from hvdrec.samples.columns import reason
from hvdrec.samples.engine import Engine
from hvdrec.samples.sql import quoted, written
from hvdrec.start.features import FeatureGuess, Skipped, guess_feature, is_outcome
from hvdrec.start.feedback_guess import FeedbackGuess, feedback_label, guess_feedback
from hvdrec.start.look import Look
from hvdrec.start.naming import declared_format, new_names
from hvdrec.start.profile import ColumnProfile, TableProfile
from hvdrec.start.relations import find_links, find_sides
from hvdrec.start.roles import (
    Choice,
    Link,
    epoch_unit,
    guess_keys,
    guess_label,
    guess_log,
    guess_time,
)
from hvdrec.start.words import TITLE, says

Answer = Callable[[str, Choice, Sequence[str]], Choice]
"""Function of a field, the guess for it and the allowed values that returns the final choice."""


@dataclass(frozen=True)
class SideTable:
    """A side table, joined by the key of users or items."""

    side: Side
    table: TableProfile
    why: str


@dataclass(frozen=True)
class Draft:
    """The contents of a configuration.

    Attributes:
        log: The table of interactions.
        sides: The tables of users and items.
        feedback: The tables of feedback.
        formats: Formats of tables to declare.
        unused: Path of a table -> the reason why it is not used.
        user, item, time, label: The choices; `time` may be empty.
        title: Column of item names; "" if there is none.
        derive: Column -> SQL expression.
        features: The features to write.
        skipped: Columns that are not used.
        history: Name of the history; "" if there is none.
        negatives: Number of sampled negatives per positive row.
    """

    log: TableProfile
    sides: tuple[SideTable, ...]
    feedback: tuple[FeedbackGuess, ...]
    formats: tuple[TableFormat, ...]
    unused: Mapping[str, str]
    user: Choice
    item: Choice
    time: Choice
    label: Choice
    title: str
    derive: Mapping[str, str]
    features: tuple[FeatureGuess, ...]
    skipped: tuple[Skipped, ...]
    history: str
    negatives: int


def make_draft(look: Look, answer: Answer) -> Draft:
    """Guess a configuration for tables that were looked at.

    Args:
        look: The tables.
        answer: Confirms or replaces the guesses for user, item, time and label.

    Raises:
        UserError: There are no columns for the keys.
    """
    number = guess_log(look.tables)
    log = look.tables[number]
    others = [table for i, table in enumerate(look.tables) if i != number]
    links = find_links(look.engine, log, others)
    user, item = guess_keys(log, links, others)
    user = answer("user", user, log.names)
    item = answer("item", item, [name for name in log.names if name != user.value])
    for field, choice in (("samples.user", user), ("samples.item", item)):
        if choice.value not in log.names:
            problem = f"no column of {log.path} is the key; its columns are {choices(log.names)}"
            option = f"--{field.partition('.')[2]}"
            raise invalid_value(field, choice.value, problem, f"name it with {option} COLUMN")
    keys = {user.value, item.value}
    time = answer("time", guess_time(log, keys), ["", *(n for n in log.names if n not in keys)])
    taken = {*keys, time.value}
    names = new_names(log, others, links, user.value, item.value, time.value)
    left = [name for name in log.names if name not in taken]
    found = find_sides(look.engine, log, user.value, item.value, left)
    sides = {names[log.path].get(name, name): side for name, side in found.items()}
    renamed = {table.path: table.renamed(names[table.path]) for table in look.tables}
    to_new = names[log.path]
    user, item, time = (
        replace(choice, value=to_new.get(choice.value, choice.value))
        for choice in (user, item, time)
    )
    log = renamed[log.path]
    pairs = [(table, renamed[table.path]) for table in others]
    tables, unused = _side_tables(links, pairs, user.value, item.value, to_new)
    left_over = [renamed[path] for path in unused]
    feedback = guess_feedback(log, left_over, user.value, item.value, time.value)
    unused = {p: why for p, why in unused.items() if p not in {f.table for f in feedback}}
    guess = guess_label(log, {user.value, item.value, time.value})
    label = answer("label", feedback_label(feedback) if feedback else guess, ())
    _check_label(look.engine, log, to_new, label.value, feedback)
    formats = tuple(
        each for t in look.tables if (each := declared_format(t, renamed[t.path], names[t.path]))
    )
    negatives = 4 if label.value == "1" else 0
    found_features = _features(log, tables, (user, item, time, label), sides, negatives)
    history = f"{item.value}_history" if time.value else ""
    roles = (user, item, time, label)
    rest = (*roles, *found_features, history, negatives)
    return Draft(log, tables, tuple(feedback), formats, unused, *rest)


def _check_label(
    engine: Engine,
    log: TableProfile,
    names: Mapping[str, str],
    expression: str,
    feedback: Sequence[FeedbackGuess],
) -> None:
    """Raise UserError if the label is not an expression over the columns of the log."""
    pairs = ", ".join(f"{quoted(old)} AS {quoted(new)}" for old, new in names.items() if old != new)
    rename = f" RENAME ({pairs})" if pairs else ""
    joined = "".join(f", 0 AS {f.name}_count, 0.0 AS {f.name}_delay" for f in feedback)
    try:
        _ = engine.connection.sql(
            f"SELECT ({expression}\n) FROM (SELECT *{rename}{joined} FROM {log.view}) LIMIT 0"
        ).columns
    except duckdb.Error as error:
        remedy = f"write SQL over the columns {choices(log.names)}"
        raise invalid_value("samples.label", expression, reason(error), remedy) from None


def _side_tables(
    links: Sequence[Link],
    tables: Sequence[tuple[TableProfile, TableProfile]],
    user: str,
    item: str,
    to_new: Mapping[str, str],
) -> tuple[tuple[SideTable, ...], dict[str, str]]:
    """Return the tables of users and items, and path -> reason for the other tables.

    `tables` holds each table with its original and with its new names of columns.
    """
    found: list[SideTable] = []
    unused: dict[str, str] = {}
    for number, (original, table) in enumerate(tables):
        link = next((link for link in links if link.table == number), None)
        column = to_new.get(link.column, link.column) if link else ""
        side: Side = "user" if column == user else "item"
        if link is None or column not in (user, item):
            unused[table.path] = "no column holds the keys of users or items, one row per key"
        elif any(each.side == side for each in found):
            unused[table.path] = f"there is another table of {side}s; join it by [[samples.joins]]"
        else:
            where = original.names.index(link.key) + 1 if original.is_headerless else link.key
            found.append(SideTable(side, table, f"its column {where} holds the {side} keys"))
    return tuple(found), unused


def _features(
    log: TableProfile,
    tables: Sequence[SideTable],
    roles: tuple[Choice, Choice, Choice, Choice],
    sides: Mapping[str, Side],
    negatives: int,
) -> tuple[str, dict[str, str], tuple[FeatureGuess, ...], tuple[Skipped, ...]]:
    """Guess the features of all columns.

    Returns the column of titles, the derived columns, the features and the skipped columns.
    """
    user, item, time, label = roles
    count = 1 if log.rows < 20_000 else 2
    features = [
        FeatureGuess(user.value, "user", "categorical", "string", "the user key", min_count=count),
        FeatureGuess(item.value, "item", "categorical", "string", "the item key", min_count=count),
    ]
    skipped: list[Skipped] = []
    taken = {user.value.lower(), item.value.lower(), time.value.lower()}
    columns: list[tuple[ColumnProfile, Side, int, bool]] = [
        (c, each.side, each.table.rows, False) for each in tables for c in each.table.columns
    ]
    columns += [(c, sides.get(c.name, "scene"), log.rows, True) for c in log.columns]
    title = _title(tables)
    for column, side, rows, is_logged in columns:
        if column.name.lower() in taken:
            continue
        taken.add(column.name.lower())
        if column.name == title:
            skipped.append(Skipped(title, "used as samples.title"))
        elif is_logged and (_is_used(column.name, label.value) or is_outcome(column)):
            skipped.append(Skipped(column.name, "known only after the item was shown"))
        elif is_logged and negatives and side == "item":
            why = "a sampled negative needs item features from a table of items"
            skipped.append(Skipped(column.name, why))
        else:
            found = guess_feature(column, side, rows)
            (skipped if isinstance(found, Skipped) else features).append(found)  # type: ignore[arg-type]
    features += _scene_of_time(log, time, taken)
    derive = {feature.name: feature.derive for feature in features if feature.derive}
    order = {"user": 0, "item": 1, "scene": 2}
    features.sort(key=lambda feature: order[feature.side])
    return title, derive, tuple(features), tuple(skipped)


def _is_used(name: str, expression: str) -> bool:
    return bool(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", expression))


def _title(tables: Sequence[SideTable]) -> str:
    for each in tables:
        if each.side == "item":
            for column in each.table.columns:
                if column.kind == "string" and says(column.name, TITLE):
                    return column.name
            for column in each.table.columns:
                is_text = column.kind == "string" and 8 <= column.length <= 60
                if is_text and column.distinct > 0.9 * each.table.rows and column.nulls < 0.1:
                    return column.name
    return ""


def _scene_of_time(log: TableProfile, time: Choice, taken: set[str]) -> list[FeatureGuess]:
    """Return the hour and the weekday as features of the scene, if the time column has them."""
    if not time.value or time.value not in log.names:
        return []
    column, name = log[time.value], written(time.value)
    unit = epoch_unit(column)
    if column.kind == "timestamp":
        hour, day = f"extract(hour FROM {name})", f"extract(isodow FROM {name}) - 1"
    elif column.kind == "date":
        hour, day = "", f"extract(isodow FROM {name}) - 1"
    elif unit:
        factor = {"seconds": 1, "milliseconds": 1000, "microseconds": 1_000_000}[unit]
        seconds = name if factor == 1 else f"{name} // {factor}"
        hour, day = f"{seconds} // 3600 % 24", f"({seconds} // 86400 + 3) % 7"
    else:
        return []
    pairs = (("hour", hour, "hour of the day, in UTC"), ("weekday", day, "Monday is 0"))
    return [
        FeatureGuess(name, "scene", "categorical", "int", why, f"CAST({sql} AS BIGINT)")
        for name, sql, why in pairs
        if sql and name not in taken
    ]
