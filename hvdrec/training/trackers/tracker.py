"""The interface of a tracker, and the numbers that all trackers record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from hvdrec.training.run_history import Event

Array = NDArray[Any]


@dataclass(frozen=True)
class Trained:
    """The model at the end of training.

    Attributes:
        step: Number of steps.
        weights: Name of a dense weight -> its values.
        item_vectors: Vectors of the items [items, width]; None without towers, or if there are more
            items than a projector can show.
        item_titles: Title or key of each item.
    """

    step: int
    weights: Mapping[str, Array]
    item_vectors: Array | None
    item_titles: Sequence[str]


class Tracker(Protocol):
    """Records a run in another program; only the first rank has trackers."""

    def log(self, event: Event) -> None:
        """Record an event of the training log; events of unknown kinds are ignored."""

    def finish(self, trained: Trained) -> None:
        """Record the model at the end of training."""

    def close(self, *, failed: bool) -> None:
        """Write pending data and end; `failed` is True if training ended with an error."""


def scalars(event: Event) -> dict[str, float]:
    """Return the numbers in an event ``step`` or ``validation`` by name; empty for other events.

    Names are like ``train/loss`` and ``validation/auc``. Values that are None are left out.

    >>> scalars({"event": "step", "step": 3, "loss": 0.5, "time_shares": {"reading": 0.25}})
    {'train/loss': 0.5, 'train/time_shares/reading': 0.25}
    """
    prefixes = {"step": "train", "validation": "validation"}
    if event.get("event") not in prefixes:
        return {}
    skipped = ("event", "step", "epoch", "seconds", "better", "worse_than")
    facts = {name: value for name, value in event.items() if name not in skipped}
    return _numbers(facts, prefixes[event["event"]])


def parameters(config: Mapping[str, Any], prefix: str = "") -> dict[str, str | float | bool]:
    """Return the fields of a configuration by dotted name; lists are converted to text."""
    found: dict[str, str | float | bool] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= parameters(value, f"{prefix}{name}.")
        else:
            is_plain = isinstance(value, str | int | float)
            found[f"{prefix}{name}"] = value if is_plain else str(value)
    return found


def _numbers(facts: Mapping[str, Any], prefix: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}/{name}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}/{name}"] = float(value)
    return found
