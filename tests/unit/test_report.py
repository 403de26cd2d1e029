"""Results as text and JSON, and the text table behind them."""

from __future__ import annotations

import json
import math
from typing import Any

from hvdrec.cli.reports import render_evaluation
from hvdrec.cli.text_table import MAX_CELL_WIDTH, table
from hvdrec.evaluation.result import EvaluationResult

REPORT: dict[str, Any] = {
    "run": "runs/movielens-1m/run",
    "split": "test",
    "ranking": {"auc": 0.89512, "gauc": math.nan, "rows": 83643},
    "retrieval": {"recall@10": 0.17, "users": 6034},
    "baselines": {
        "popularity": {
            "ranking": {"auc": 0.7, "gauc": 0.6, "rows": 83643},
            "retrieval": {"recall@10": 0.078, "users": 6034},
        },
        "user_item_mean": {"ranking": {"auc": 0.5, "gauc": None, "rows": 83643}},
    },
}


def test_evaluation_table_has_model_and_baselines_side_by_side() -> None:
    assert render_evaluation(REPORT) == (
        "Ranking, test split\n"
        "ranking   model  popularity  user_item_mean\n"
        "-------  ------  ----------  --------------\n"
        "auc      0.8951      0.7000          0.5000\n"
        "gauc        n/a      0.6000             n/a\n"
        "rows      83643       83643           83643\n"
        "\n"
        "Retrieval over the whole catalogue, test split\n"
        "retrieval   model  popularity\n"
        "---------  ------  ----------\n"
        "recall@10  0.1700      0.0780\n"
        "users        6034        6034"
    )


def test_notes_follow_the_tables() -> None:
    notes = ["ease: l2 = 300 for ranking", "second"]
    text = render_evaluation({"ranking": {"auc": 0.5}, "notes": notes})
    assert text.endswith("auc      0.5000\n\nease: l2 = 300 for ranking\nsecond")


def test_evaluation_table_has_a_row_for_each_task() -> None:
    metrics = {"gauc": 0.7, "log_loss": 0.5, "calibration": 1.0, "base_rate": math.nan, "rows": 9}
    report = {
        "split": "test",
        "ranking": {"auc": 0.9},
        "tasks": {"like": {"auc": 0.9, **metrics}, "love": {"auc": 0.8, **metrics}},
        "baselines": {
            "item_mean": {
                "ranking": {"auc": 0.6},
                "tasks": {"like": {"auc": 0.6}, "love": {"auc": 0.75}},
            },
            "other": {"retrieval": {}},
        },
    }
    assert render_evaluation(report).split("\n\n")[1] == (
        "Tasks, test split\n"
        "task     auc    gauc  log_loss  calibration  base_rate  rows  auc of item_mean\n"
        "----  ------  ------  --------  -----------  ---------  ----  ----------------\n"
        "like  0.9000  0.7000    0.5000       1.0000        n/a     9            0.6000\n"
        "love  0.8000  0.7000    0.5000       1.0000        n/a     9            0.7500"
    )


def test_evaluation_table_omits_metrics_that_were_not_measured() -> None:
    text = render_evaluation({"ranking": {"auc": 0.5}})
    assert text == "Ranking\nranking   model\n-------  ------\nauc      0.5000"


def test_an_evaluation_as_json_has_null_for_nan_and_no_absent_parts() -> None:
    baselines = {"ease": {"ranking": {"auc": 0.1 + 0.2, "log_loss": math.inf}}}
    result = EvaluationResult(
        "run", "step-1", "test", {"auc": 0.89512, "gauc": math.nan, "rows": 3}, baselines=baselines
    )
    plain = result.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain == {
        "run": "run",
        "checkpoint": "step-1",
        "split": "test",
        "ranking": {"auc": 0.89512, "gauc": None, "rows": 3},
        "baselines": {"ease": {"ranking": {"auc": 0.1 + 0.2, "log_loss": None}}},
    }


def test_table_aligns_numbers_right_and_words_left() -> None:
    rows = [["a", 5, "0.2500"], ["bcd", 1200, "n/a"], ["e", -1, ""]]
    assert table(["item", "n", "share"], rows) == (
        "item     n   share\n----  ----  ------\na        5  0.2500\nbcd   1200     n/a\ne       -1"
    )


def test_table_without_rows_is_its_headers() -> None:
    assert table(["split", "rows"], []) == "split  rows\n-----  ----"


def test_wide_characters_keep_columns_straight() -> None:
    rows = [["千と千尋", "0.5000"], ["Ame\u0301lie", "0.2500"]]
    lines = table(["title", "score"], rows).splitlines()
    assert lines[0] == "title      score"
    assert lines[2] == "千と千尋  0.5000"
    assert lines[3] == "Ame\u0301lie    0.2500"


def test_long_titles_are_cut_to_the_width_of_a_cell() -> None:
    for word in ("abcdefghi ", "千と千尋の神隠し "):
        line = table(["title", "n"], [[word * 20, 1]]).splitlines()[2]
        title = line[: line.index("…")]
        columns = sum(2 if ord(c) > 0x2E80 else 1 for c in title)
        assert MAX_CELL_WIDTH - 2 <= columns + 1 <= MAX_CELL_WIDTH
        assert (word * 20).startswith(title)


def test_the_last_column_is_not_cut() -> None:
    long = "word " * 40
    assert table(["a", "b"], [["x", long]]).splitlines()[2] == f"x  {long}".rstrip()


def test_control_characters_cannot_break_a_table() -> None:
    text = table(["title", "n"], [["two\nlines\x1b[31m", 1], [None, 2]])
    assert text.splitlines()[2:] == ["two lines [31m  1", "                2"]
