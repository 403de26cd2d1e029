"""Guess which tables hold feedback of the log's exposures, such as clicks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hvdrec.start.profile import TableProfile
from hvdrec.start.roles import Choice, epoch_unit, guess_time
from hvdrec.start.words import ACTIONS, words

WINDOW = "1d"
REQUESTS = frozenset(("request", "impression", "exposure", "req"))
UNITS = {"milliseconds": "ms", "microseconds": "us"}


@dataclass(frozen=True)
class FeedbackGuess:
    """A table of feedback, joined to the exposures.

    Attributes:
        name: Name of the action.
        table: Path of the table.
        on: Columns that must be equal in both tables.
        time: Column of its time.
        unit: "ms" or "us" if the times are numbers in this unit since 1970; else "".
    """

    name: str
    table: str
    on: tuple[str, ...]
    time: str
    unit: str


def guess_feedback(
    log: TableProfile, tables: Sequence[TableProfile], user: str, item: str, time: str
) -> list[FeedbackGuess]:
    """Return the tables that look like feedback on the rows of the log.

    Such a table has the item column of the log, its request column (or, if they share none, its
    user column), and a time of its own. If the log has no time, no table is feedback.
    """
    found: list[FeedbackGuess] = []
    for table in tables:
        requests = [n for n in log.names if n in table.names and REQUESTS & {*words(n)}]
        on = tuple(dict.fromkeys([*(requests[:1] or [user]), item]))
        choice = guess_time(table, on)
        if not time or not choice.value or not set(on) <= set(table.names):
            continue
        unit = UNITS.get(epoch_unit(table[choice.value]), "")
        names = [each.name for each in found]
        found.append(FeedbackGuess(_action(table.path, names), table.path, on, choice.value, unit))
    return found


def feedback_label(found: Sequence[FeedbackGuess]) -> Choice:
    """Return a label that is 1 if the action that says most about the user's interest occurred."""
    best = max(found, key=lambda each: ACTIONS.get(each.name, 0))
    why = f"{best.table} holds a {best.name} within a day of the exposure"
    return Choice(f"{best.name}_count > 0", why, False)


def _action(path: str, taken: Sequence[str]) -> str:
    """Return the name of the action in a file's name: ``logs/clicks.csv`` gives click."""
    found = words(path.rsplit("/", 1)[-1].split(".", maxsplit=1)[0])
    name = next((w for w in found if w in ACTIONS), re.sub(r"\W", "_", "_".join(found)))
    name = name if name.isidentifier() else "feedback"
    return name if name not in taken else f"{name}_{len(taken) + 1}"
