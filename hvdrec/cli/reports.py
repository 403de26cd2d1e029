"""Format the results of commands as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hvdrec.cli.text_table import table

if TYPE_CHECKING:
    from hvdrec.cluster.doctor import Check
    from hvdrec.planner.plan import PlanResult
    from hvdrec.tuning.search import TuneResult

TRIALS_SHOWN = 10
TASK_METRICS = ("auc", "gauc", "log_loss", "calibration", "base_rate", "rows")
TITLES = {
    "ranking": "Ranking",
    "retrieval": "Retrieval over the whole catalogue",
    "events": "Retrieval event by event, as it is served",
}
NESTED = ("by_history", "sampled")
"""Parts of the metrics by event that have tables of their own."""


def render_evaluation(report: Mapping[str, Any]) -> str:
    """Format an evaluation as a table: a row for each metric, columns for model and baselines.

    Args:
        report: ``ranking`` and ``retrieval`` map metrics to values, ``tasks`` has the metrics of
            each task, ``baselines`` has all this for each baseline, ``notes`` are lines of text.
    """
    baselines: Mapping[str, Any] = report.get("baselines") or {}
    suffix = f", {report['split']} split" if "split" in report else ""
    parts = []
    for stage, title in TITLES.items():
        if not report.get(stage):
            continue
        columns = {"model": report[stage]}
        columns |= {name: metrics[stage] for name, metrics in baselines.items() if stage in metrics}
        rows = [
            [metric, *(_format_metric(metrics.get(metric)) for metrics in columns.values())]
            for metric in report[stage]
            if metric not in NESTED
        ]
        parts.append(f"{title}{suffix}\n{table([stage, *columns], rows)}")
        if stage == "events":
            parts += _render_event_groups(columns)
        if stage == "ranking" and report.get("tasks"):
            parts.append(f"Tasks{suffix}\n{_render_tasks(report['tasks'], baselines)}")
    if report.get("notes"):
        parts.append("\n".join(report["notes"]))
    return "\n\n".join(parts)


def _render_event_groups(columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Format the metrics by length of the history, and the metrics with sampled negatives."""
    model = columns["model"]
    first = next(iter(model))
    others = (first, first.replace("hit_rate", "ndcg"))
    rows = [
        [
            name,
            bucket["events"],
            metric,
            *(_format_metric(each["by_history"][name][metric]) for each in columns.values()),
        ]
        for name, bucket in model["by_history"].items()
        for metric in others
        if bucket["events"]
    ]
    parts = [
        "Events by the number of items that the user took before\n"
        + table(["items before", "events", "metric", *columns], rows)
    ]
    if "sampled" in model:
        negatives = model["sampled"]["negatives"]
        rows = [
            [metric, *(_format_metric(each["sampled"][metric]) for each in columns.values())]
            for metric in model["sampled"]
            if metric != "negatives"
        ]
        heading = f"Events with {negatives} sampled items instead of the catalogue (biased)"
        parts.append(f"{heading}\n{table(['sampled', *columns], rows)}")
    return parts


def _render_tasks(tasks: Mapping[str, Any], baselines: Mapping[str, Any]) -> str:
    """Format a table of tasks (labels): the metrics of each, and the AUC of each baseline."""
    others = {name: metrics["tasks"] for name, metrics in baselines.items() if "tasks" in metrics}
    rows = [
        [
            task,
            *(_format_metric(metrics[name]) for name in TASK_METRICS),
            *(_format_metric(other[task]["auc"]) for other in others.values()),
        ]
        for task, metrics in tasks.items()
    ]
    return table(["task", *TASK_METRICS, *(f"auc of {name}" for name in others)], rows)


def _format_metric(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "n/a"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def render_search(search: TuneResult) -> str:
    """Format the best trials of a search, and the values of the best one as options and TOML."""
    from hvdrec.tuning.search import ranked
    from hvdrec.tuning.space import as_overrides, as_toml

    fields = list(dict.fromkeys(name for trial in search.trials for name in trial.values))
    short = _short_names(fields)
    rows = [
        [
            str(trial.number),
            "" if trial.value is None else f"{trial.value:.5f}",
            *(_format_value(trial.values[name]) for name in fields),
            f"{trial.seconds:.0f}",
            trial.state,
        ]
        for trial in ranked(search.trials, search.metric)[:TRIALS_SHOWN]
    ]
    heading = f"{len(search.trials)} trials by validation {search.metric}"
    if len(search.trials) > TRIALS_SHOWN:
        heading += f", the best {TRIALS_SHOWN}"
    headers = ["trial", search.metric, *(short[name] for name in fields), "seconds", "state"]
    parts = [f"{heading}\n{table(headers, rows)}"]
    best = search.best
    if best is None:
        parts.append("no trial is complete")
    elif best.number == 0:
        parts.append("no trial was better than the configuration as it is (trial 0)")
    else:
        parts.append(f"The best trial, as options:\n{as_overrides(best.values)}")
        parts.append(f"and as TOML:\n{as_toml(best.values)}")
    parts.append(f"wrote {search.path}")
    return "\n\n".join(parts)


def _short_names(fields: list[str]) -> dict[str, str]:
    """Return the last part of each field's name, or the whole name if another ends in that part."""
    names = [field.rpartition(".")[2] for field in fields]
    return {
        field: name if names.count(name) == 1 else field
        for field, name in zip(fields, names, strict=True)
    }


def _format_value(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def render_plan(result: PlanResult) -> str:
    """Format the predicted cost of a step for each embedding table and each kind of message."""
    cluster, sent, seconds = result.cluster, result.bytes_sent_per_step, result.seconds_per_step
    tables = table(
        ["table", "rows", "width", "placement", "MB per rank", "rows per step"],
        [
            [t.table, t.rows, t.width, t.placement, f"{t.memory / 1e6:.2f}", f"{t.distinct:.0f}"]
            for t in result.tables
        ],
    )
    names = [name for name in dict.fromkeys([*seconds, *sent]) if name != "total"]
    parts = table(
        ["part of a step", "KB sent", "ms"],
        [
            [
                name,
                f"{sent[name] / 1e3:.1f}" if name in sent else "",
                f"{1e3 * seconds[name]:.2f}" if name in seconds else "hidden",
            ]
            for name in names
        ],
    )
    rows = -(-result.batch_size // cluster.ranks)
    largest = max((name for name in names if name in seconds), key=lambda name: seconds[name])
    lines = [
        f"{cluster.ranks} ranks, batch {result.batch_size} ({rows} rows a rank)",
        f"memory: {result.memory_per_rank / 1e9:.3f} GB on each rank for weights and optimizer",
        f"a step: {sent['total'] / 1e6:.3f} MB sent by each rank, "
        f"{1e3 * seconds['total']:.1f} ms, most of it {largest}; "
        f"{result.rows_per_second:.0f} rows/s",
    ]
    if not result.fits:
        smallest = result.smallest_ranks
        remedy = f"{smallest} ranks would fit" if smallest else "no number of ranks would fit"
        lines.append(f"does not fit into {cluster.memory / 1e9:g} GB a rank; {remedy}")
    if not result.constants.is_measured:
        lines.append("times are rough guesses; measure this machine with --calibrate")
    return "\n\n".join([tables, parts, "\n".join(lines)])


def render_checks(checks: Sequence[Check]) -> str:
    """Format the checks of a machine with their remedies, and count the problems."""
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<8} {check.name:<{width}}  {check.value}".rstrip())
        if check.remedy:
            lines.append(f"{'':<8} {'':<{width}}  -> {check.remedy}")
    counts = [
        f"{count} {status}{'' if count == 1 else 's'}"
        for status in ("problem", "warning")
        for count in [sum(check.status == status for check in checks)]
    ]
    return "\n".join([*lines, "", ", ".join(counts)])
