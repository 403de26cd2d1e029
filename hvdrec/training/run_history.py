"""What a training run has done so far, read from the events of its ``log.jsonl``.

While training runs, `TrainingLog` adds the events to a history and prints lines for people from it.
``hvdrec top`` reads the history of a run from the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvdrec.errors import invalid_file

LOG_FILE = "log.jsonl"
Event = Mapping[str, Any]
"""One line of the log: ``event`` is its kind, such as ``step``, and the other keys are its facts.

Events of the kinds ``step`` and ``validation`` have the number of the ``step``. Events of all kinds
except ``note`` have the number of ``seconds`` since the start of the process."""
LOSSES = ("log_loss",)
"""Validation metrics of which a smaller value is better."""


@dataclass
class RunHistory:
    """The events of a run, in the order in which they are added.

    Attributes:
        start: The latest event ``start``; a resumed run has several.
        steps: The events ``step``.
        validations: The events ``validation``.
        notes: The texts of the events ``note``.
        end: The event ``end``, once the run is complete.
        seconds: Seconds from the start of the latest process to its latest event.
    """

    start: Event = field(default_factory=dict)
    steps: list[Event] = field(default_factory=list)
    validations: list[Event] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    end: Event | None = None
    seconds: float = 0.0

    def add(self, event: Event) -> None:
        """Add the next event; the ``start`` of a resumption drops steps after its checkpoint."""
        kind = event.get("event")
        self.seconds = float(event.get("seconds", self.seconds))
        if kind == "start":
            self.start, self.end = event, None
            step = event.get("step", 0)
            self.steps = [each for each in self.steps if each["step"] <= step]
            self.validations = [each for each in self.validations if each["step"] <= step]
        elif kind == "step":
            self.steps.append(event)
        elif kind == "validation":
            self.validations.append(event)
        elif kind == "note":
            self.notes.append(str(event["text"]))
        elif kind == "end":
            self.end = event

    @property
    def metric(self) -> str:
        """Name of the validation metric that decides which checkpoint is the best."""
        return str(self.start.get("metric", "none"))

    @property
    def step(self) -> int:
        """Number of the latest step."""
        ends = [event["step"] for event in (self.start, self.end) if event and "step" in event]
        seen = [events[-1]["step"] for events in (self.steps, self.validations) if events]
        return int(max([*ends, *seen], default=0))

    @property
    def total_steps(self) -> int:
        """Number of steps of all epochs; 0 if the log does not say it."""
        return int(self.start.get("total_steps", 0))

    @property
    def best(self) -> Event | None:
        """The validation with the best metric; None if there is none."""
        measured = [each for each in self.validations if each.get(self.metric) is not None]
        sign = -1 if self.metric in LOSSES else 1
        return max(measured, key=lambda each: sign * each[self.metric], default=None)

    @property
    def seconds_left(self) -> float | None:
        """Estimate of the seconds until the last epoch ends; None if it is not known.

        The estimate assumes that each remaining step, with its share of the validations, takes as
        long as a step of this process so far. Early stopping may end the run earlier.
        """
        done = self.step - int(self.start.get("step", 0))
        if self.end is not None or done <= 0 or not self.total_steps:
            return None
        return max(0.0, self.seconds / done * (self.total_steps - self.step))


def read_history(run: Path) -> RunHistory:
    """Read the log of a run; lines that are incomplete, as after a crash, are ignored.

    Raises:
        UserError: The directory has no log.
    """
    file = run / LOG_FILE
    try:
        text = file.read_text()
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        remedy = "give the directory of a run (WORK/run), which hvdrec train writes"
        raise invalid_file(file, problem, remedy) from None
    history = RunHistory()
    for line in text.split("\n"):
        with suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict):
                history.add(event)
    return history


def start_line(history: RunHistory) -> str:
    """Describe the run that starts: its data, ranks, epochs and size."""
    start = history.start
    step = f", from step {start['step']:,} on" if start["step"] else ""
    epochs = _count(start["epochs"], "epoch")
    return (
        f"{start['name']}: {epochs} of {start['rows']:,} rows in batches of "
        f"{start['batch_size']:,} on {_count(start['world_size'], 'rank')} ({start['device']}), "
        f"{start['parameters']:,} parameters{step}"
    )


def step_line(history: RunHistory) -> str:
    """Describe the latest logged step."""
    event = history.steps[-1]
    parts = [position(history, event), f"loss {event['loss']:.4f}" if event["loss"] else "loss n/a"]
    if history.validations:
        parts.append(f"{history.metric} {metric_text(history.validations[-1], history.metric)}")
    parts += [f"lr {event['learning_rate']:.1e}", *speed(history, event)]
    return "  ".join(parts)


def position(history: RunHistory, event: Event) -> str:
    """Return ``epoch 1/3  step  50/423`` for an event."""
    total = str(history.total_steps)
    step = str(event["step"]).rjust(len(total))
    return f"epoch {event['epoch']}/{history.start['epochs']}  step {step}/{total}"


def speed(history: RunHistory, event: Event) -> list[str]:
    """Return texts with the rows per second, where the time goes, and the time left."""
    parts = [f"{event['rows_per_second']:,} rows/s"]
    if "time_shares" in event:
        parts.append(
            ", ".join(f"{name} {share:.0%}" for name, share in event["time_shares"].items())
        )
    left = history.seconds_left
    return parts if left is None else [*parts, f"{clock(left)} left"]


def validation_line(history: RunHistory) -> str:
    """Describe the latest validation: the metric, its latest change, and its best value so far."""
    event, name = history.validations[-1], history.metric
    value = event.get(name)
    before = [each[name] for each in history.validations[:-1] if each.get(name) is not None]
    text = f"{position(history, event)}  validation {name} {metric_text(event, name)}"
    if value is not None and before:
        text += f" ({value - before[-1]:+.4f})"
    best = history.best
    if best is None:
        return text
    if best is event:
        return f"{text}, the best so far"
    return f"{text}, best {metric_text(best, name)} at step {best['step']}"


def metric_text(event: Event, name: str) -> str:
    """Format a metric of a validation with four decimals; n/a if it is not defined."""
    value = event.get(name)
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.4f}"


def clock(seconds: float) -> str:
    """Format a duration as ``hours:minutes:seconds``.

    >>> clock(3725.4)
    '1:02:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
