"""A report for people: the model beside its baselines, one metric per row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hvdrec.cli.text import table

OF_TASKS = ("auc", "gauc", "log_loss", "calibration", "base_rate", "rows")
TITLES = {"ranking": "Ranking", "retrieval": "Retrieval over the whole catalogue"}


def render(report: Mapping[str, Any]) -> str:
    """Return the tables of a report.

    report: ``ranking`` and ``retrieval`` hold metrics by name, ``tasks`` holds those of each task;
    ``baselines`` holds the same by the baseline's name; ``notes`` are lines that follow.
    """
    baselines: Mapping[str, Any] = report.get("baselines") or {}
    parts = []
    for kind, title in TITLES.items():
        model = report.get(kind)
        if not model:
            continue
        named = {name: found[kind] for name, found in baselines.items() if kind in found}
        rows = [
            [
                metric,
                _shown(value),
                *(_shown(found.get(metric)) for found in named.values()),
            ]
            for metric, value in model.items()
        ]
        heading = f"{title}, {report['split']} split" if "split" in report else title
        parts.append(f"{heading}\n{table([kind, 'model', *named], rows)}")
        if kind == "ranking" and report.get("tasks"):
            parts.append(_tasks(report, baselines))
    if report.get("notes"):
        parts.append("\n".join(report["notes"]))
    return "\n\n".join(parts)


def _tasks(report: Mapping[str, Any], baselines: Mapping[str, Any]) -> str:
    """Return one row per task: its metrics, and the AUC of each baseline of its own label."""
    others = {name: found["tasks"] for name, found in baselines.items() if "tasks" in found}
    rows = [
        [
            task,
            *(_shown(metrics[name]) for name in OF_TASKS),
            *(_shown(found[task]["auc"]) for found in others.values()),
        ]
        for task, metrics in report["tasks"].items()
    ]
    heading = f"Tasks, {report['split']} split" if "split" in report else "Tasks"
    columns = ["task", *OF_TASKS, *(f"auc of {name}" for name in others)]
    return f"{heading}\n{table(columns, rows)}"


def jsonable(value: Any) -> Any:
    """Return a report with None in place of NaN and infinities, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _shown(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "n/a"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
