"""Show a training run on the screen: a bar on a terminal, lines elsewhere, or JSON for programs."""

from __future__ import annotations

import sys
from typing import Any, Literal, Protocol

from tqdm.auto import tqdm

from hvdrec.parallel.progress import can_show_bar
from hvdrec.storage.json_text import json_text
from hvdrec.training.run_history import (
    Event,
    RunHistory,
    speed,
    start_line,
    step_line,
    validation_line,
)

LogFormat = Literal["text", "json"]
"""What the first rank shows on standard error: text for people, or the JSON lines of the log."""
MOST_SECONDS, SHARE = 30.0, 0.02
"""The pause between two lines about steps is SHARE of the elapsed time, but at most MOST_SECONDS.
So a run of hours does not print thousands of lines."""
BAR = "{desc} {percentage:3.0f}% |{bar}| {postfix}"


class Display(Protocol):
    """Shows the events of a run; `history` holds all events, including the one to show."""

    def show(self, event: Event, history: RunHistory) -> None:
        """Show an event that has just happened."""

    def start_epoch(self, epoch: int, epochs: int, rows: int, done: int) -> None:
        """Start an epoch, counted from 1; a resumed epoch has read `done` of its `rows` before."""

    def advance(self, rows: int) -> None:
        """Add `rows` to the number of rows that have been read in this epoch."""

    def close(self) -> None:
        """Remove the bar from the screen, if there is one."""


class Silent:
    """Shows nothing."""

    def show(self, event: Event, history: RunHistory) -> None:
        """Do nothing."""

    def start_epoch(self, epoch: int, epochs: int, rows: int, done: int) -> None:
        """Do nothing."""

    def advance(self, rows: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class JsonLines(Silent):
    """Prints each event as a JSON line."""

    def show(self, event: Event, history: RunHistory) -> None:
        """Print the event."""
        _print(json_text(event))


class TextLines(Silent):
    """Prints a line of text for each event that a person wants to see."""

    def __init__(self) -> None:
        self._next_step = 0.0

    def show(self, event: Event, history: RunHistory) -> None:
        """Print a line; a step gets none if the last line about a step is recent."""
        if event["event"] == "step":
            if history.seconds >= self._next_step:
                self._next_step = history.seconds + min(MOST_SECONDS, SHARE * history.seconds)
                _print(step_line(history))
        elif text := _text(event, history):
            _print(text)


class Bar:
    """Shows a bar of the epoch with the latest loss and speed; other events are lines above it."""

    def __init__(self) -> None:
        self._bar: Any = None

    def show(self, event: Event, history: RunHistory) -> None:
        """Show an event in the bar or above it."""
        if event["event"] == "step" and self._bar is not None:
            loss = "n/a" if event["loss"] is None else f"{event['loss']:.4f}"
            parts = [f"loss {loss}", f"lr {event['learning_rate']:.1e}", *speed(history, event)]
            self._bar.set_postfix_str("  ".join(parts), refresh=False)
        elif text := _text(event, history):
            tqdm.write(text, file=sys.stderr)

    def start_epoch(self, epoch: int, epochs: int, rows: int, done: int) -> None:
        """Start the bar of an epoch."""
        self.close()
        self._bar = tqdm(
            total=rows,
            initial=done,
            desc=f"epoch {epoch}/{epochs}",
            bar_format=BAR,
            leave=False,
            dynamic_ncols=True,
        )

    def advance(self, rows: int) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(min(rows, self._bar.total - self._bar.n))

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def make_display(log_format: LogFormat) -> Display:
    """Return the display for this process's standard error."""
    if log_format == "json":
        return JsonLines()
    return Bar() if can_show_bar() else TextLines()


def _text(event: Event, history: RunHistory) -> str:
    """Return the line of text for an event; "" if it has none."""
    if event["event"] == "start":
        return start_line(history)
    if event["event"] == "validation":
        return validation_line(history)
    return str(event["text"]) if event["event"] == "note" else ""


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
