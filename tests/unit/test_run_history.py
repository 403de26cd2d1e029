"""The state of a run, read from its log, and the lines and views that show it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hvdrec.cli.run_view import render_run, run_facts, run_state, sparkline
from hvdrec.errors import UserError
from hvdrec.training.display import JsonLines, TextLines
from hvdrec.training.log import TrainingLog
from hvdrec.training.run_history import RunHistory, clock, read_history, validation_line

START: dict[str, Any] = {
    "event": "start",
    "seconds": 0.0,
    "name": "films",
    "epochs": 2,
    "total_steps": 40,
    "world_size": 2,
    "device": "cpu",
    "batch_size": 512,
    "rows": 10_000,
    "parameters": 1234,
    "metric": "auc",
    "step": 0,
}
SHARES = {"reading": 0.1, "exchanging": 0.25, "computing": 0.65}


def step(number: int, seconds: float, loss: float | None = 0.5) -> dict[str, Any]:
    return {
        "event": "step",
        "seconds": seconds,
        "step": number,
        "epoch": 1 + (number > 20),
        "loss": loss,
        "learning_rate": 1e-3,
        "rows_per_second": 5120,
        "time_shares": SHARES,
    }


def validation(number: int, seconds: float, **metrics: float | None) -> dict[str, Any]:
    event = {"event": "validation", "seconds": seconds, "step": number, "epoch": number // 20}
    return event | metrics


def history(*events: dict[str, Any], start: dict[str, Any] = START) -> RunHistory:
    result = RunHistory()
    for event in (start, *events):
        result.add(event)
    return result


def test_time_left_is_the_time_per_step_so_far_times_the_steps_left() -> None:
    state = history(step(10, 30.0))
    assert state.seconds_left == 90.0
    resumed = history(step(30, 5.0), start=START | {"step": 20})
    assert resumed.seconds_left == 5.0
    assert history().seconds_left is None
    assert (
        history(step(40, 60.0), {"event": "end", "seconds": 61.0, "step": 40}).seconds_left is None
    )


def test_a_validation_line_names_the_change_and_the_best() -> None:
    first = history(validation(20, 9.0, auc=0.7))
    assert "auc 0.7000, the best so far" in validation_line(first)
    worse = history(validation(20, 9.0, auc=0.7), validation(40, 19.0, auc=0.65))
    assert "auc 0.6500 (-0.0500), best 0.7000 at step 20" in validation_line(worse)
    undefined = history(validation(20, 9.0, auc=None))
    assert undefined.best is None and "auc n/a" in validation_line(undefined)


def test_the_best_log_loss_is_the_smallest() -> None:
    start = START | {"metric": "log_loss"}
    events = [validation(20, 1.0, log_loss=0.4), validation(40, 2.0, log_loss=0.6)]
    best = history(*events, start=start).best
    assert best is not None and best["step"] == 20


def test_a_resumed_run_forgets_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    events = [START, step(10, 5.0), validation(20, 9.0, auc=0.7), step(30, 14.0)]
    again = [START | {"step": 20}, step(25, 2.0)]
    lines = [json.dumps(event) for event in events + again]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"event": "st')
    state = read_history(tmp_path)
    assert [each["step"] for each in state.steps] == [10, 25]
    assert len(state.validations) == 1 and state.step == 25


def test_a_directory_without_a_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="WORK/run") as error:
        read_history(tmp_path)
    assert error.value.field == str(tmp_path / "log.jsonl")


def test_people_read_text_and_programs_read_the_lines_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for display in (TextLines(), JsonLines()):
        (tmp_path / "log.jsonl").unlink(missing_ok=True)
        with TrainingLog(tmp_path, is_first=True, display=display) as log:
            for event in (START, step(10, 5.0, float("nan")), validation(20, 9.0, auc=0.75)):
                facts = {key: value for key, value in event.items() if key != "seconds"}
                log.write(facts.pop("event"), **facts)
            log.note("auc is not defined")
        shown = capsys.readouterr().err
        if isinstance(display, JsonLines):
            assert shown == (tmp_path / "log.jsonl").read_text()
            assert json.loads(shown.splitlines()[1])["loss"] is None
        else:
            assert "{" not in shown
            lines = shown.splitlines()
            assert lines[0].startswith(
                "films: 2 epochs of 10,000 rows in batches of 512 on 2 ranks"
            )
            assert lines[1].startswith("epoch 1/2  step 10/40  loss n/a  lr 1.0e-03  5,120 rows/s")
            assert "reading 10%, exchanging 25%, computing 65%" in lines[1]
            assert lines[3] == "auc is not defined"


def test_other_ranks_write_and_show_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with TrainingLog(tmp_path, is_first=False, display=TextLines()) as log:
        log.note("hello")
    assert capsys.readouterr().err == "" and not list(tmp_path.iterdir())


def test_long_runs_print_fewer_lines(capsys: pytest.CaptureFixture[str]) -> None:
    display, state = TextLines(), history(start=START | {"total_steps": 10_000})
    for number in range(1, 2001):
        state.add(step(number, number / 2))
        display.show(state.steps[-1], state)
    printed = capsys.readouterr().err.splitlines()
    assert 100 < len(printed) < 300


def test_the_view_shows_progress_curves_and_the_best_validation() -> None:
    state = history(step(10, 5.0, 0.9), validation(20, 9.0, auc=0.7), step(30, 14.0, 0.4))
    text = render_run(state, age=1.0)
    assert "films: running for 0:00:14, about 0:00:05 left" in text
    assert "75%  epoch 2/2  step 30/40" in text
    assert "training loss        0.9000 █▁ 0.4000" in text
    facts = run_facts(state, age=1.0)
    assert (facts["state"], facts["best"], facts["best_step"]) == ("running", 0.7, 20)
    assert facts["time_shares"] == SHARES


def test_the_state_follows_the_events_and_the_age_of_the_log() -> None:
    assert run_state(history(), age=1.0) == "waiting"
    assert run_state(history(step(10, 5.0)), age=1000.0) == "silent"
    assert run_state(history({"event": "end", "seconds": 6.0}), age=1000.0) == "finished"


def test_a_sparkline_averages_groups_of_values() -> None:
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([0, 0, 7, 7], width=2) == "▁█"


def test_durations_are_rounded_to_seconds() -> None:
    assert (clock(59.6), clock(3725.4)) == ("0:01:00", "1:02:05")
