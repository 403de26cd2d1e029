"""The result of an evaluation, as a typed value and as strict JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

Split = Literal["validation", "test"]
"""A split on which a model is measured."""
Metrics = Mapping[str, Any]
"""Metrics by name; NaN where a metric is not defined."""


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of a model on a split, beside its baselines.

    Attributes:
        run: Directory of the run.
        checkpoint: Name of the checkpoint.
        split: The split that was measured.
        ranking: Ranking metrics; None if the model has no ranker.
        tasks: Ranking metrics of each task; None without tasks.
        retrieval: Metrics over the whole catalogue; None if the towers were not trained to
            retrieve.
        baselines: ``ranking``, ``tasks`` and ``retrieval`` of each baseline; None if the baselines
            were left out.
        notes: Remarks on the baselines, such as the settings that were chosen.
    """

    run: str
    checkpoint: str
    split: Split
    ranking: Metrics | None = None
    tasks: Mapping[str, Metrics] | None = None
    retrieval: Metrics | None = None
    baselines: Mapping[str, Mapping[str, Any]] | None = None
    notes: Sequence[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values; NaN becomes None."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: jsonable(value) for key, value in plain.items() if value is not None}


def jsonable(value: Any) -> Any:
    """Return a report with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
