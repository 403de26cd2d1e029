"""Sections of a report about the scores: summary, curves, slices, scene, features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.evaluation.held_out import ScoredRows, earlier_splits, read_interactions
from hvdrec.reporting.curves import make_curves
from hvdrec.reporting.effects import permutation_importance, scene_effect
from hvdrec.reporting.page import columns, table, text
from hvdrec.reporting.run_data import RunData
from hvdrec.reporting.slices import Slice, slices_of_ranges, slices_of_values
from hvdrec.reporting.svg import bar_chart, line_chart

Array = NDArray[Any]
SLICE_HEADERS = ("", "rows", "positives", "mean score", "auc", "log loss")
USERS_SHOWN = 3
VALUES_SHOWN = 24


def summary(data: RunData) -> str:
    """Show the metrics of the model beside the baselines, as ``hvdrec evaluate`` does."""
    parts = []
    baselines = data.result.get("baselines", {})
    for stage, title in (("ranking", "Ranking"), ("retrieval", "Retrieval, one query per user")):
        if stage not in data.result:
            continue
        shown = {"model": data.result[stage]}
        shown |= {name: each[stage] for name, each in baselines.items() if stage in each}
        rows = [
            [metric, *(each.get(metric) for each in shown.values())]
            for metric in data.result[stage]
        ]
        parts.append(f"<h3>{title}</h3>{table([stage, *shown], rows)}")
    tasks = data.result.get("tasks", {})
    if tasks:
        names = ("auc", "gauc", "log_loss", "calibration", "base_rate", "rows")
        rows = [[task, *(each[name] for name in names)] for task, each in tasks.items()]
        parts.append(f"<h3>Tasks</h3>{table(['task', *names], rows)}")
    notes = (text(note, "soft") for note in data.result.get("notes", []))
    return "".join(parts) + "".join(notes)


def curves(data: RunData) -> str:
    """Draw ROC, precision and recall, calibration, and lift."""
    rows, options = data.rows, data.config.evaluate
    if rows is None:
        return ""
    found = make_curves(
        rows.score, rows.label, rows.weight, threshold=options.threshold, beta=options.beta
    )
    recall, precision, f_beta = found.at_threshold
    roc = line_chart(
        {"model": found.roc}, x="false positive rate", y="true positive rate", diagonal=True,
        unit=True,
    )  # fmt: skip
    pr = line_chart(
        {"model": found.precision_recall},
        x="recall",
        y="precision",
        mark=(recall, precision),
        unit=True,
    )
    at = (
        f"At the threshold {options.threshold:g} (circle): precision {precision:.4f}, recall "
        f"{recall:.4f}, F{options.beta:g} {f_beta:.4f}, E {1 - f_beta:.4f}."
    )
    calibration = line_chart(
        {"ten bins of equal weight": found.calibration},
        x="mean score",
        y="share of positives",
        diagonal=True,
        unit=True,
    )
    lift = bar_chart({f"{int(x)}. tenth": y for x, y in found.lift}, y="lift")
    lift_text = (
        "Share of positives in each tenth of the rows, best scores first, divided by the base rate."
    )
    return columns(
        ("ROC", roc),
        ("Precision and recall", pr + text(at, "soft")),
        ("Calibration", calibration),
        ("Lift", lift + text(lift_text, "soft")),
    )


def slices(data: RunData) -> str:
    """Show the metrics by scene value, item popularity and age, and user activity."""
    if data.rows is None or not len(data.rows.score):
        return ""
    parts = [(title, _slice_table(found)) for title, found in _slices(data, data.rows)]
    return text(
        "In a slice that is calibrated, the mean score equals the share of positives. The AUC is "
        "n/a if all labels of a slice are equal.",
        "soft",
    ) + columns(*parts, wide=True)


def scene(data: RunData) -> str:
    """Show the change of scores with each scene field, for all rows and for some users."""
    fields = [feature.name for feature in data.config.schema.side("scene")]
    if data.rows is None or not fields or not len(data.rows.score):
        return ""
    arrays, number = data.effect_rows()
    user = data.rows.user[number]
    chosen = np.unique(user)[:: max(1, len(np.unique(user)) // USERS_SHOWN)][:USERS_SHOWN]
    parts = []
    for name in fields:
        if arrays[name].dtype.kind != "i" or arrays[name].ndim > 1:
            continue
        names = _value_names(data, name, arrays[name], number)
        effect = scene_effect(data.predict, arrays, name)
        if len(effect) < 2:
            continue
        frequent = list(effect)[:VALUES_SHOWN]  # codes are numbered by frequency
        shown = {code: effect[code] for code in sorted(frequent, key=lambda c: _order(names[c]))}
        mean = np.mean([scores.mean() for scores in shown.values()])
        bars = {names[code]: float(scores.mean() - mean) for code, scores in shown.items()}
        rows = [
            [names[code], *(float(scores[user == each].mean()) for each in chosen)]
            for code, scores in shown.items()
        ]
        headers = [name, *(f"user {data.user_key(each)}" for each in chosen)]
        parts.append((f"{name}: change of the mean score", bar_chart(bars, y=f"effect of {name}")))
        parts.append((f"{name}: mean score of three users", table(headers, rows)))
    if not parts:
        return ""
    return text(
        "All rows are scored with each value of the field in turn; everything else stays as it is.",
        "soft",
    ) + columns(*parts)


def features(data: RunData) -> str:
    """Show the loss of AUC when a feature is shuffled among the rows."""
    if data.rows is None or not len(data.rows.score):
        return ""
    arrays, number = data.effect_rows()
    rows = data.rows
    losses = permutation_importance(data.predict, arrays, rows.label[number], rows.weight[number])
    if not losses:
        return text("Not defined: all labels are equal.", "none")
    explained = (
        f"Loss of AUC on {len(number):,} rows if the values of one feature are shuffled among "
        "them. A feature that others can replace has a small value."
    )
    return text(explained, "soft") + bar_chart(losses, y="loss of AUC")


def _slices(data: RunData, rows: ScoredRows) -> Iterator[tuple[str, list[Slice]]]:
    scored = (rows.score, rows.label, rows.weight)
    for feature in data.config.schema.side("scene"):
        values = data.raw_column(feature.name)
        if values is not None:
            yield f"scene: {feature.name}", slices_of_values(values, *scored)
    before = read_interactions(data.config.paths.of("features"), earlier_splits(data.split))
    by_user = np.bincount(before.user, minlength=int(rows.user.max()) + 1)[rows.user]
    new = {0.0: "new users (no earlier row)"}
    yield "user activity: earlier rows", slices_of_ranges(by_user, *scored, bins=5, apart=new)
    counted = data.config.schema.own_name("train_count")
    count = data.items()[counted].to_numpy()[rows.item]
    never = {0.0: "never taken in training"}
    yield "item popularity: positive training rows", slices_of_ranges(count, *scored, apart=never)
    age = data.item_ages()
    if age is not None:
        first = {0.0: "first day in the log"}
        yield "item age: days since its first row", slices_of_ranges(age, *scored, apart=first)


def _order(name: str) -> tuple[float, str]:
    """Return a key that sorts numbers by value and other names after them."""
    try:
        return float(name), name
    except ValueError:
        return np.inf, name


def _slice_table(found: list[Slice]) -> str:
    return table(SLICE_HEADERS, [astuple(each) for each in found])


def _value_names(data: RunData, name: str, codes: Array, number: Array) -> dict[int, str]:
    """Return the raw value of each code, or ``code N`` if the samples do not have the column."""
    raw = data.raw_column(name)
    names = {int(code): f"code {code}" for code in np.unique(codes)}
    if raw is not None:
        names |= {int(code): str(value) for code, value in zip(codes, raw[number], strict=True)}
    return names
