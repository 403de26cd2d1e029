"""The parts of a run's report: curves, slices, intervals, lists, charts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_auc_score

from hvdrec.reporting.bootstrap import difference, intervals, user_weights
from hvdrec.reporting.curves import make_curves
from hvdrec.reporting.effects import permutation_importance, scene_effect
from hvdrec.reporting.lists import list_facts
from hvdrec.reporting.page import number, page, table
from hvdrec.reporting.slices import OTHERS, slices_of_ranges, slices_of_values
from hvdrec.reporting.svg import NOTHING, bar_chart, line_chart

Array = NDArray[Any]


def rows(count: int = 400, seed: int = 0) -> tuple[Array, Array, Array]:
    random = np.random.default_rng(seed)
    score = np.round(random.random(count), 2)
    return score, (random.random(count) < score).astype(np.float32), np.ones(count, np.float32)


def test_the_area_under_the_roc_points_is_the_auc() -> None:
    score, label, weight = rows()
    curves = make_curves(score, label, weight, threshold=0.5, beta=1)
    x, y = np.array(curves.roc).T
    assert np.trapezoid(y, x) == pytest.approx(roc_auc_score(label, score), abs=1e-3)
    precision, recall, _ = precision_recall_curve(label, score)
    expected = {
        (round(float(r), 5), round(float(p), 5)) for r, p in zip(recall, precision, strict=True)
    }
    assert {
        (round(float(r), 5), round(float(p), 5)) for r, p in curves.precision_recall
    } <= expected


def test_calibration_and_lift_worked_out_by_hand() -> None:
    score = np.repeat([0.1, 0.9], 10)
    label = np.array([0.0] * 9 + [1.0] + [1.0] * 8 + [0.0] * 2)
    curves = make_curves(score, label, np.ones(20), threshold=0.5, beta=1)
    mean, share = np.array(curves.calibration).T
    assert mean.tolist() == pytest.approx([0.1] * 5 + [0.9] * 5)
    assert share.mean() == pytest.approx(9 / 20)
    tenths = [y for _, y in curves.lift]
    assert np.mean(tenths) == pytest.approx(1.0) and tenths[0] == pytest.approx(0 / 0.45)
    assert curves.at_threshold[:2] == (pytest.approx(8 / 9), pytest.approx(0.8))


@pytest.mark.parametrize("label", [np.zeros(5), np.ones(5), np.empty(0)])
def test_curves_of_a_single_class_are_empty_not_wrong(label: Array) -> None:
    score = np.linspace(0, 1, len(label))
    curves = make_curves(score, label, np.ones(len(label)), threshold=0.5, beta=1)
    assert curves.roc == []
    assert line_chart({"model": curves.roc}, x="x", y="y") == NOTHING


def test_slices_have_the_metrics_of_their_rows() -> None:
    score, label, weight = rows()
    values = np.arange(400) % 3
    found = slices_of_values(values, score, label, weight)
    assert [each.name for each in found] == ["0", "1", "2"]
    for number_, each in enumerate(found):
        own = values == number_
        assert each.rows == own.sum()
        assert each.auc == pytest.approx(roc_auc_score(label[own], score[own]))
        assert each.base_rate == pytest.approx(label[own].mean())


def test_rare_values_are_one_slice_and_every_row_is_in_one() -> None:
    score, label, weight = rows()
    found = slices_of_values(np.arange(400) % 100, score, label, weight)
    assert found[-1].name == OTHERS and sum(each.rows for each in found) == 400
    ranges = slices_of_ranges(np.arange(400), score, label, weight, bins=4, apart={0: "none"})
    assert next(each.rows for each in ranges) == 1
    assert next(each.name for each in ranges) == "none"
    assert sum(each.rows for each in ranges) == 400


def test_an_interval_holds_the_mean_about_as_often_as_it_says() -> None:
    random, inside = np.random.default_rng(0), 0
    weights = user_weights(50, samples=300)
    for _ in range(60):
        own = random.normal(size=50)  # rows of a user are alike
        values = np.repeat(own, 4) + 0.1 * random.normal(size=200)
        found = intervals(values[:, None], np.repeat(np.arange(50), 4), weights)[0]
        inside += found.low <= 0 <= found.high
    assert 51 <= inside <= 60


def test_differences_are_significant_only_if_they_are_there() -> None:
    random = np.random.default_rng(0)
    user, noise = np.repeat(np.arange(100), 3), np.random.default_rng(1).normal(size=300)
    base = random.normal(size=300)
    weights = user_weights(100)
    assert difference(base + 0.5 + noise * 0.1, base, user, weights).is_significant
    same = difference(base, base, user, weights)
    assert (same.value, same.p_value, same.is_significant) == (0.0, 1.0, False)


def test_facts_about_lists_worked_out_by_hand() -> None:
    vectors = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [3.0, 3.0]])
    lists = np.array([[0, 1], [0, 2], [0, -1]])
    facts = list_facts(lists, np.array([4, 2, 0, 8]), 8, vectors)
    assert facts.coverage == 0.75
    assert facts.popularity == pytest.approx((4 * 3 + 2 + 0) / 8 / 5)
    assert facts.novelty == pytest.approx((1 * 3 + 2 + 3) / 5)
    assert facts.diversity == pytest.approx((1 + 0) / 2)
    assert facts.concentration == pytest.approx((-3 * 0 - 1 * 1 + 1 * 1 + 3 * 3) / (4 * 5))


def test_a_feature_that_decides_is_important_and_one_that_does_not_is_not() -> None:
    random = np.random.default_rng(0)
    arrays = {"used": random.integers(0, 9, 500), "unused": random.integers(0, 9, 500)}
    label = (arrays["used"] > 4).astype(np.float32)

    def predict(columns: Mapping[str, Array]) -> Array:
        return columns["used"] / 9

    losses = permutation_importance(predict, arrays, label, np.ones(500))
    assert list(losses) == ["used", "unused"]
    assert losses["used"] > 0.3 and losses["unused"] == 0
    effect = scene_effect(predict, arrays, "used")
    assert effect[3].tolist() == [3 / 9] * 500
    assert permutation_importance(predict, arrays, np.ones(500), np.ones(500)) == {}


def test_charts_are_well_formed_and_escape_names() -> None:
    points = [(float(x), math.sin(x)) for x in range(40)]
    drawn = line_chart({"<a>": points, "b": points}, x="x & y", y="<y>", mark=(1.0, 0.5))
    svg, _, legend = drawn.partition("</svg>")
    assert ElementTree.fromstring(svg + "</svg>").tag == "svg"
    assert "&lt;a&gt;" in legend
    bars = ElementTree.fromstring(bar_chart({"<x>": 2.0, "y": -1.0, "z": math.nan}, y="v"))
    assert len([each for each in bars if each.tag == "rect"]) == 2


def test_cells_are_formatted_and_escaped() -> None:
    assert [number(v) for v in (None, math.nan, 0.12345, 12345, "a")] == [
        "n/a", "n/a", "0.1235", "12,345", "a"
    ]  # fmt: skip
    assert "&lt;b&gt;" in table(["<b>", "n"], [["<i>", 1]])
    html = page("t<", "s", [("one", "<p>1</p>"), ("empty", "")])
    assert "<h1>t&lt;</h1>" in html and "empty" not in html
