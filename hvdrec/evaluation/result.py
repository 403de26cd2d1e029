"""The result of an evaluation, as a dataclass and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import to_json

Split = Literal["validation", "test"]
"""Name of a split on which a model is measured."""
Metrics = Mapping[str, Any]
"""Name of a metric -> its value; NaN if it is not defined."""


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of a model and of baselines on a split.

    Attributes:
        run: Directory of the run.
        checkpoint: Name of the checkpoint.
        split: The split that was measured.
        ranking: Ranking metrics; None if the model has no ranker.
        tasks: Ranking metrics of each task; None without tasks.
        retrieval: Metrics over the whole catalogue; None if the towers were not trained to
            retrieve.
        events: Metrics of retrieval event by event, as it is served; see
            `evaluation.event_metrics.event_report`. None if they were left out.
        baselines: ``ranking``, ``tasks``, ``retrieval`` and ``events`` of each baseline; None if
            the baselines were left out.
        notes: Lines of text: what is left out, why a metric is not defined, and which settings of
            the baselines were chosen.
        worse_than: An entry for each simple baseline that is better than the model, with
            ``baseline``, ``metric``, ``task``, the ``value`` of the baseline and the value of the
            ``model``.
    """

    run: str
    checkpoint: str
    split: Split
    ranking: Metrics | None = None
    tasks: Mapping[str, Metrics] | None = None
    retrieval: Metrics | None = None
    events: Metrics | None = None
    baselines: Mapping[str, Mapping[str, Any]] | None = None
    notes: Sequence[str] | None = None
    worse_than: Sequence[Mapping[str, Any]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values; NaN becomes None."""
        return as_json(self)


def as_json(result: Any) -> dict[str, Any]:
    """Convert a dataclass to plain JSON values: NaN becomes None, None fields are omitted."""
    plain: dict[str, Any] = json.loads(to_json(result, inf_nan_mode="null"))
    return {key: value for key, value in plain.items() if value is not None}
