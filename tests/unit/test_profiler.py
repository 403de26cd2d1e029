"""Recording of steps with torch's profiler, and Horovod's timeline."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from hvdrec.errors import UserError
from hvdrec.parallel.environment import record_timeline
from hvdrec.parallel.ranks import World
from hvdrec.training.profiler import RECORDED_STEPS, record_steps

CPU = torch.device("cpu")


def train(steps: int, directory: Path | None) -> None:
    with record_steps(directory, World(), CPU) as after_step:
        for _ in range(steps):
            torch.ones(3).sum()
            after_step()


def test_a_profile_holds_the_recorded_steps_and_a_summary(tmp_path: Path) -> None:
    train(40, tmp_path / "profile")
    trace = json.loads((tmp_path / "profile/trace-rank-00000.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    steps = {name for name in names if name.startswith("ProfilerStep#")}
    assert len(steps) == RECORDED_STEPS
    assert "aten::sum" in (tmp_path / "profile/summary.txt").read_text()


def test_too_short_a_training_says_that_nothing_is_recorded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(3, tmp_path)
    assert "only 3 steps" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_horovod_reads_the_timeline_file_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOROVOD_TIMELINE", "")
    record_timeline(tmp_path / "timeline.json")
    assert os.environ["HOROVOD_TIMELINE"] == str(tmp_path / "timeline.json")
    missing = tmp_path / "missing/timeline.json"
    with pytest.raises(UserError) as error:
        record_timeline(missing)
    assert (error.value.field, error.value.value) == ("--horovod-timeline", str(missing))
