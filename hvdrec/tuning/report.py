"""What people see of a search."""

from __future__ import annotations

from hvdrec.cli.text import table
from hvdrec.tuning.search import Search, Trial
from hvdrec.tuning.space import as_overrides, as_toml

SHOWN = 10
"""Trials in the table."""


def told(search: Search, trial: Trial) -> str:
    """Return one line on a trial that has ended."""
    best = search.best
    against = "" if best is None else f"; best {best.value:.5f} of trial {best.number}"
    found = "" if trial.value is None else f" {search.metric} {trial.value:.5f}"
    reason = f" ({trial.reason})" if trial.reason else ""
    what = as_overrides(trial.values)
    return f"trial {trial.number} {trial.state}{found}{reason}: {what}{against}"


def render(search: Search, place: str) -> str:
    """Return the best trials in a table, and the best one's values ready to be pasted.

    place: where all trials are written.
    """
    fields = list(dict.fromkeys(name for trial in search.trials for name in trial.values))
    short = _short(fields)
    rows = [
        [
            str(trial.number),
            "" if trial.value is None else f"{trial.value:.5f}",
            *(_shown(trial.values[name]) for name in fields),
            f"{trial.seconds:.0f}",
            trial.state,
        ]
        for trial in search.ranked()[:SHOWN]
    ]
    heading = f"{len(search.trials)} trials by validation {search.metric}"
    if len(search.trials) > SHOWN:
        heading += f", the best {SHOWN}"
    headers = ["trial", search.metric, *(short[name] for name in fields), "seconds", "state"]
    parts = [f"{heading}\n{table(headers, rows)}"]
    best = search.best
    if best is None:
        parts.append("no trial came to its end")
    elif best.number == 0:
        parts.append("nothing was better than the configuration as it stands (trial 0)")
    else:
        parts.append(f"The best, on the command line:\n{as_overrides(best.values)}")
        parts.append(f"and in the configuration:\n{as_toml(best.values)}")
    parts.append(f"wrote {place}")
    return "\n\n".join(parts)


def _short(fields: list[str]) -> dict[str, str]:
    """Return the fields' last names where these tell them apart."""
    names = [field.rpartition(".")[2] for field in fields]
    return {
        field: name if names.count(name) == 1 else field
        for field, name in zip(fields, names, strict=True)
    }


def _shown(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)
