"""Format the state of a training run for ``hvdrec top``."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from hvdrec.cli.text_table import table
from hvdrec.training.run_history import RunHistory, clock, metric_text, speed

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH, BAR_WIDTH = 48, 40
EPOCHS_SHOWN = 12
SILENT_SECONDS = 120.0
"""A run that has not finished may have stopped if its log is older than this."""


def run_state(history: RunHistory, age: float) -> str:
    """Return ``finished``, ``running``, ``waiting`` (no step yet) or ``silent``.

    Args:
        history: The events of the run.
        age: Seconds since the log was written last.
    """
    if history.end is not None:
        return "finished"
    if age > SILENT_SECONDS:
        return "silent"
    return "running" if history.steps else "waiting"


def run_facts(history: RunHistory, age: float) -> dict[str, Any]:
    """Return the state of a run as JSON values; for the arguments see `run_state`."""
    best, latest = history.best, history.steps[-1] if history.steps else {}
    return {
        "name": history.start.get("name"),
        "state": run_state(history, age),
        "step": history.step,
        "total_steps": history.total_steps,
        "epochs": history.start.get("epochs"),
        "world_size": history.start.get("world_size"),
        "seconds": history.seconds,
        "seconds_left": history.seconds_left,
        "loss": latest.get("loss"),
        "learning_rate": latest.get("learning_rate"),
        "rows_per_second": latest.get("rows_per_second"),
        "time_shares": latest.get("time_shares"),
        "metric": history.metric,
        "best": None if best is None else best[history.metric],
        "best_step": None if best is None else best["step"],
        "validations": [
            {"epoch": each["epoch"], "step": each["step"], "value": each.get(history.metric)}
            for each in history.validations
        ],
        "notes": history.notes,
    }


def render_run(history: RunHistory, age: float) -> str:
    """Format a run: its state, progress, speed, curves and validations."""
    start = history.start
    if not start:
        return "the run has not started to train yet"
    parts = [
        f"{start.get('name', 'run')}: {_state_text(history, age)}",
        _progress_bar(history),
        f"{start['rows']:,} rows, batches of {start['batch_size']:,}, ranks: "
        f"{start['world_size']} ({start['device']}), {start['parameters']:,} parameters",
    ]
    if history.steps:
        latest = history.steps[-1]
        parts.append("  ".join([f"lr {latest['learning_rate']:.1e}", *speed(history, latest)]))
        losses = [each["loss"] for each in history.steps if each["loss"] is not None]
        parts += ["", _curve("training loss", losses)]
    values = [each.get(history.metric) for each in history.validations]
    known = [value for value in values if value is not None]
    if known:
        parts += [_curve(f"validation {history.metric}", known), "", _validations(history)]
    return "\n".join([*parts, *([""] if history.notes else []), *history.notes])


def sparkline(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """Draw numbers as a line of blocks; more than `width` numbers are averaged in groups.

    >>> sparkline([0, 1, 2, 7])
    '▁▂▃█'
    """
    count = len(values)
    if count > width:
        edges = [count * i // width for i in range(width + 1)]
        values = [sum(values[i:j]) / (j - i) for i, j in pairwise(edges)]
    low, high = min(values), max(values)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in values)


def _state_text(history: RunHistory, age: float) -> str:
    state = run_state(history, age)
    if state == "finished":
        return f"finished after {clock(history.seconds)}"
    if state == "silent":
        return (
            f"nothing logged for {clock(age)}; it has stopped, or a long step or validation runs "
            "(hvdrec train --resume continues a run that has stopped)"
        )
    left = history.seconds_left
    if state == "waiting" or left is None:
        return "no step is logged yet"
    return f"running for {clock(history.seconds)}, about {clock(left)} left"


def _progress_bar(history: RunHistory) -> str:
    total = max(history.total_steps, history.step, 1)
    filled = BAR_WIDTH * history.step // total
    events = [*history.steps[-1:], *history.validations[-1:]]
    epoch = max((each.get("epoch", 0) for each in events), default=0)
    return (
        f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {history.step / total:.0%}  "
        f"epoch {epoch}/{history.start.get('epochs', '?')}  step {history.step}/{total}"
    )


def _curve(name: str, values: Sequence[float]) -> str:
    width = min(CURVE_WIDTH, max(10, shutil.get_terminal_size().columns - 40))
    return f"{name:<20} {values[0]:.4f} {sparkline(values, width)} {values[-1]:.4f}"


def _validations(history: RunHistory) -> str:
    """Format a table of the latest validations."""
    name, best = history.metric, history.best
    rows: list[list[object]] = []
    before = None
    for each in history.validations:
        value = each.get(name)
        change = "" if value is None or before is None else f"{value - before:+.4f}"
        mark = "best" if each is best else ""
        rows.append([each["epoch"], each["step"], metric_text(each, name), change, mark])
        before = value if value is not None else before
    return table(["epoch", "step", name, "change", ""], rows[-EPOCHS_SHOWN:])
