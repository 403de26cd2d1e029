"""Decide whether a new model may serve: pure functions that compare measured values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hvdrec.config.sections import Promote
from hvdrec.evaluation.ranking_metrics import auc, log_loss

Array = NDArray[Any]
DRAWS = 40
"""Number of draws of the bootstrap."""
ERRORS = 2.0
"""A new model is refused if AUC or log loss is worse by more than its margin plus this number of
standard errors."""


class Labelled(Protocol):
    """n labelled rows, each with a weight."""

    @property
    def label(self) -> Array:
        """Label of each row [n]."""

    @property
    def weight(self) -> Array:
        """Weight of each row [n]."""


@dataclass(frozen=True)
class Check:
    """The result of one comparison.

    Attributes:
        name: Name of the compared value.
        new: Value of the new model; NaN if it is not defined.
        old: Value of the model that serves; NaN if there is none.
        margin: Largest allowed loss.
        loss: Amount by which the new model is worse; negative if it is better.
        reason: The reason for which the new model may not serve; empty if this check is passed.
    """

    name: str
    new: float
    old: float
    margin: float
    loss: float
    reason: str = ""

    @property
    def is_passed(self) -> bool:
        """True if the new model is no worse than the margin allows."""
        return not self.reason


@dataclass(frozen=True)
class Measured:
    """The results of measuring one model on the fresh rows.

    Attributes:
        metrics: The ranking metrics.
        slices: ``COLUMN=VALUE`` -> AUC over the rows with this value.
        catalogue: Share of the rows whose item is in the catalogue of the bundle.
    """

    metrics: Mapping[str, float]
    slices: Mapping[str, float]
    catalogue: float


@dataclass(frozen=True)
class Difference:
    """Differences between the scores of two models on the same rows.

    Attributes:
        drift: Result of `score_drift`.
        noise: Result of `noise`.
    """

    drift: float = 0.0
    noise: Mapping[str, float] = field(default_factory=dict)


def rows_check(rows: int, options: Promote) -> Check:
    """Check that there are enough fresh rows to compare models on."""
    few = f"{rows} fresh rows are too few, promote.min_rows = {options.min_rows}"
    reason = few if rows < options.min_rows else ""
    return Check("rows", rows, math.nan, options.min_rows, options.min_rows - rows, reason)


def compare(
    new: Measured,
    old: Measured | None,
    difference: Difference,
    options: Promote,
    *,
    has_ranker: bool,
) -> list[Check]:
    """Compare a new model with the one that serves, on the same rows.

    Args:
        new: The new model.
        old: The model that serves; None if there is none.
        difference: Differences between the scores of both models.
        options: The ``[promote]`` section, with the margins.
        has_ranker: False for a retrieval model, whose scores are not probabilities.
    """
    checks = []
    area = new.metrics["auc"]
    if not area >= options.min_auc:
        reason = f"AUC {area:.4f} is below promote.min_auc = {options.min_auc}"
        margin = options.min_auc
        checks.append(Check("least auc", area, math.nan, margin, margin - area, reason))
    if old is None:
        return checks
    was, now = old.metrics, new.metrics
    errors = {name: ERRORS * difference.noise.get(name, 0.0) for name in ("auc", "log_loss")}
    checks.append(_lower("auc", now["auc"], was["auc"], options.auc, error=errors["auc"]))
    if has_ranker:
        losses = now["log_loss"], was["log_loss"]
        checks.append(_higher("log_loss", *losses, options.log_loss, errors["log_loss"]))
        ratios = now["calibration"], was["calibration"]
        checks.append(_calibration(*ratios, options.calibration))
    checks.append(_lower("catalogue", new.catalogue, old.catalogue, options.coverage))
    drift = difference.drift
    far = drift > options.drift
    reason = f"scores have drifted by {drift:.3f}, promote.drift = {options.drift}" if far else ""
    checks.append(Check("drift", drift, 0.0, options.drift, drift, reason))
    for name in sorted(new.slices.keys() & old.slices.keys()):
        pair = new.slices[name], old.slices[name]
        checks.append(_lower(f"auc of {name}", *pair, options.slice_auc, "slice_auc"))
    return checks


def coverage_checks(
    now: Mapping[str, Mapping[str, Any]], before: Mapping[str, Mapping[str, Any]], margin: float
) -> list[Check]:
    """Compare the coverage of each feature with its coverage at the serving model's promotion.

    Args:
        now: Feature -> its coverage in the fresh rows, as `fresh_rows.coverage` returns it.
        before: The same, as recorded when the serving model was promoted.
        margin: Largest allowed loss of ``known``.
    """
    checks = []
    for name in (name for name in now if name in before):
        new, old = float(now[name]["known"]), float(before[name]["known"])
        check = _lower(f"coverage of {name}", new, old, margin, "coverage")
        if check.is_passed and before[name]["varies"] and not now[name]["varies"]:
            reason = f"feature '{name}' has one value in all fresh rows; it had several before"
            check = Check(check.name, new, old, margin, old - new, reason)
        checks.append(check)
    return checks


def freshness_check(newest: float | None, served: float | None, age: float, limit: float) -> Check:
    """Check that the newest row is not too old, and not older than that of the serving model.

    Args:
        newest: Time of the newest fresh row, in seconds since 1970; None without times.
        served: Time of the newest fresh row at the promotion of the serving model; None if unknown.
        age: Age of the newest row, in hours.
        limit: ``promote.max_age_hours``; 0 for any age.
    """
    reason = ""
    if newest is not None and served is not None and newest < served:
        hours = (served - newest) / 3600
        reason = f"the newest row is {hours:.1f} hours older than that of the model that serves"
    elif newest is not None and limit and age > limit:
        reason = f"the newest row is {age:.1f} hours old, promote.max_age_hours = {limit}"
    elif newest is None and limit:
        reason = f"promote.max_age_hours = {limit}, but the samples have no times (samples.time)"
    now, before = (math.nan if each is None else each for each in (newest, served))
    return Check("newest row", now, before, limit, before - now, reason)


def score_drift(new: Array, old: Array) -> float:
    """Return the distance between the distributions of two models' scores for the same n rows.

    It is the Wasserstein-1 distance, in standard deviations of the old scores: 0 if the
    distributions are equal, and 1 if all scores move up by one standard deviation.
    """
    distance = float(np.abs(np.sort(new) - np.sort(old)).mean())
    deviation = float(old.std())
    return distance / deviation if deviation else (math.inf if distance else 0.0)


def noise(new: Array, old: Array, rows: Labelled, seed: int = 0) -> dict[str, float]:
    """Return the standard errors of the differences in AUC and log loss between two models.

    The errors are estimated by a bootstrap over the rows. Both models are measured on the same
    draws.

    Args:
        new: Scores of the new model [n].
        old: Scores of the model that serves [n].
        rows: The rows.
        seed: Seed of the draws.
    """
    random = np.random.default_rng(seed)
    differences: dict[str, list[float]] = {"auc": [], "log_loss": []}
    weight = rows.weight.astype(np.float64)
    for _ in range(DRAWS):
        drawn = random.integers(0, len(weight), len(weight))
        facts = rows.label[drawn], weight[drawn]
        for name, metric in (("auc", auc), ("log_loss", log_loss)):
            differences[name].append(metric(new[drawn], *facts) - metric(old[drawn], *facts))
    return {name: float(np.nanstd(each)) for name, each in differences.items()}


def _lower(
    name: str, new: float, old: float, margin: float, option: str = "", error: float = 0.0
) -> Check:
    """Check a value that should not fall. If the old value is undefined, any new value passes."""
    loss = old - new
    worse = not math.isnan(old) and not loss <= margin + error
    option = option or ("coverage" if name == "catalogue" else name)
    reason = f"{name} falls from {old:.4f} to {new:.4f}, promote.{option} = {margin}"
    return Check(name, new, old, margin, loss, reason if worse else "")


def _higher(name: str, new: float, old: float, margin: float, error: float) -> Check:
    """Check a value that should not rise."""
    loss = new - old
    worse = not math.isnan(old) and not loss <= margin + error
    reason = f"{name} rises from {old:.4f} to {new:.4f}, promote.{name} = {margin}"
    return Check(name, new, old, margin, loss, reason if worse else "")


def _calibration(new: float, old: float, margin: float) -> Check:
    """Check that the ratio of predicted to real positives is not further from 1 than before."""
    loss = _distance(new) - _distance(old)
    worse = not math.isnan(old) and not loss <= margin
    reason = f"calibration goes from {old:.4f} to {new:.4f}, promote.calibration = {margin}"
    return Check("calibration", new, old, margin, loss, reason if worse else "")


def _distance(ratio: float) -> float:
    return abs(math.log(ratio)) if ratio > 0 else math.inf
