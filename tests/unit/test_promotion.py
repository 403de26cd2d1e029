"""The decisions of the gate, and the layout of published versions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from hvdrec.config import Promote
from hvdrec.errors import UserError
from hvdrec.evaluation.ranking_metrics import auc
from hvdrec.promotion.gate import (
    Difference,
    Measured,
    compare,
    coverage_checks,
    freshness_check,
    noise,
    rows_check,
    score_drift,
)
from hvdrec.promotion.versions import Published
from tests.bundles import write_bundle


@dataclass(frozen=True)
class Rows:
    label: np.ndarray
    weight: np.ndarray


GOOD = {"rows": 1000.0, "auc": 0.8, "log_loss": 0.5, "calibration": 1.0}


def measured(
    catalogue: float = 1.0, slices: dict[str, float] | None = None, **changed: float
) -> Measured:
    return Measured({**GOOD, **changed}, slices or {}, catalogue)


def failed(new: Measured, old: Measured | None, drift: float = 0.0, **options: object) -> list[str]:
    margins = Promote(**options)  # type: ignore[arg-type]
    checks = compare(new, old, Difference(drift), margins, has_ranker=True)
    return [check.name for check in checks if not check.is_passed]


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (measured(), []),
        (measured(auc=0.799), []),
        (measured(auc=0.7), ["auc"]),
        (measured(auc=math.nan), ["least auc", "auc"]),
        (measured(log_loss=0.504), []),
        (measured(log_loss=0.51), ["log_loss"]),
        (measured(log_loss=math.nan), ["log_loss"]),
        (measured(calibration=1.2), ["calibration"]),
        (measured(calibration=0.8), ["calibration"]),
        (measured(catalogue=0.9), ["catalogue"]),
        (measured(auc=0.4), ["least auc", "auc"]),
        (measured(slices={"shop=1": 0.7}), ["auc of shop=1"]),
        (measured(slices={"shop=2": 0.1}), []),  # the old model was not measured there
    ],
)
def test_a_loss_beyond_its_margin_fails(new: Measured, expected: list[str]) -> None:
    assert failed(new, measured(slices={"shop=1": 0.8})) == expected


def test_without_a_serving_model_only_the_least_auc_count() -> None:
    assert failed(measured(log_loss=9.0, calibration=5.0), None, math.nan) == []
    assert failed(measured(auc=0.55), None, math.nan, min_auc=0.6) == ["least auc"]
    assert failed(measured(), measured(), 0.6) == ["drift"]


def test_few_rows_fail() -> None:
    assert not rows_check(199, Promote()).is_passed
    assert rows_check(200, Promote()).is_passed


def test_margins_can_be_configured() -> None:
    worse = measured(auc=0.7, log_loss=0.7)
    assert failed(worse, measured(), auc=0.2, log_loss=0.3) == []


def test_coverage_compares_each_feature_with_its_record() -> None:
    before = {"a": {"known": 1.0, "varies": True}, "b": {"known": 0.5, "varies": True}}
    now = {
        "a": {"known": 0.9, "varies": True},
        "b": {"known": 0.5, "varies": False},
        "new": {"known": 0.0, "varies": False},
    }
    checks = coverage_checks(now, before, 0.05)
    assert [(check.name, check.is_passed) for check in checks] == [
        ("coverage of a", False),
        ("coverage of b", False),
    ]
    assert "one value" in checks[1].reason


@pytest.mark.parametrize(
    ("newest", "served", "age", "limit", "passes"),
    [
        (100.0, 100.0, 5.0, 0.0, True),
        (99.0, 100.0, 5.0, 0.0, False),
        (None, 100.0, 0.0, 0.0, True),
        (100.0, None, 5.0, 4.0, False),
        (100.0, None, 3.0, 4.0, True),
        (None, None, 0.0, 4.0, False),
    ],
)
def test_freshness(
    newest: float | None, served: float | None, age: float, limit: float, passes: bool
) -> None:
    assert freshness_check(newest, served, age, limit).is_passed is passes


def test_score_drift_by_hand() -> None:
    old = np.array([0.1, 0.3])  # its standard deviation is 0.1
    assert score_drift(old, old) == 0.0
    assert score_drift(np.array([0.4, 0.2]), old) == pytest.approx(1.0)
    assert score_drift(np.array([0.5, 0.5]), np.array([0.2, 0.2])) == math.inf


def test_noise_is_that_of_repeated_samples() -> None:
    """The bootstrap agrees with the spread of the difference over independent samples."""
    random = np.random.default_rng(0)

    def sample() -> tuple[np.ndarray, np.ndarray, Rows]:
        label = (random.random(400) < 0.5).astype(np.float32)
        shared = label + random.normal(size=400)
        new, old = (1 / (1 + np.exp(-shared - 0.5 * random.normal(size=400))) for _ in range(2))
        return new, old, Rows(label, np.ones(400, np.float32))

    areas = [
        auc(new, r.label, r.weight) - auc(old, r.label, r.weight)
        for new, old, r in (sample() for _ in range(200))
    ]
    errors = [noise(*sample(), seed=seed)["auc"] for seed in range(5)]
    assert np.mean(errors) == pytest.approx(np.std(areas), rel=0.3)


def test_a_loss_within_two_standard_errors_of_its_margin_is_noise() -> None:
    new, old = measured(auc=0.78, log_loss=0.53), measured()
    errors = {"auc": 0.01, "log_loss": 0.015}
    assert failed(new, old) == ["auc", "log_loss"]
    checks = compare(new, old, Difference(0.0, errors), Promote(), has_ranker=True)
    assert all(check.is_passed for check in checks)


@pytest.fixture
def published(tmp_path: Path) -> Published:
    versions = Published(tmp_path / "published")
    with versions.locked():
        for number in range(4):
            name = versions.publish(write_bundle(tmp_path / f"b{number}"))
            versions.note("promoted", version=name, metrics={"auc": math.nan})
    return versions


def test_names_are_not_used_twice_and_old_versions_are_pruned(published: Published) -> None:
    assert published.names() == ["0001", "0002", "0003", "0004"]
    assert published.roll_back("0002") == ("0004", "0002")
    assert published.prune(1) == ["0003"]  # the current one and the one before it stay
    assert published.names() == ["0001", "0002", "0004"]
    assert published.current() == "0002"
    published.roll_back("0001")
    assert published.prune(1) == ["0002"]
    assert published.next_name() == "0005"
    with pytest.raises(UserError) as caught:
        published.roll_back()
    assert caught.value.field == str(published.folder)


def test_a_damaged_version_does_not_serve(published: Published) -> None:
    (published.path("0002") / "manifest.json").write_text("{}")
    with pytest.raises(UserError):
        published.roll_back("0002")
    assert published.current() == "0004"


def test_a_broken_link_is_named_and_can_be_repaired(published: Published) -> None:
    published.link.unlink()
    published.link.symlink_to("versions/0009")
    with pytest.raises(UserError) as caught:
        published.current()
    assert caught.value.field == str(published.link)
    assert "0009" in str(caught.value)
    published.roll_back("0003")
    assert published.current() == "0003"


def test_an_incomplete_last_line_of_the_history_is_left_out(published: Published) -> None:
    with (published.folder / "promotions.jsonl").open("a") as file:
        file.write('{"event": "prom')
    assert len(published.history()) == 4
    assert published.record("0003")["metrics"] == {"auc": None}
