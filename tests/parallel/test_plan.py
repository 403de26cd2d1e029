"""Tests of the planner against jobs of several ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.conftest import HVDREC
from tests.parallel.launch import launch
from tests.parallel.test_training import log

Train = Callable[..., Path]


def plan(small: Path, ranks: int, *options: str, calibrate_on: int = 1) -> dict[str, Any]:
    command = [HVDREC, "plan", str(small), "--ranks", str(ranks), "--json", *options]
    done = launch(command, calibrate_on)
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if "{" in line)
    result: dict[str, Any] = json.loads(line[line.index("{") :])
    return result


@pytest.mark.parametrize(
    ("ranks", "launcher", "placement"),
    [
        (2, "horovodrun", "sharded"),
        (2, "horovodrun", "replicated"),
        pytest.param(4, "mpirun", "sharded", marks=pytest.mark.slow),
    ],
)
def test_bytes_match_the_plan(
    train: Train, small: Path, ranks: int, launcher: str, placement: str
) -> None:
    options = ("--parallel.placement", placement, "--train.batch-size", "480")
    lines = log(train(ranks, launcher, *options), "step")
    steps = lines[-1]["step"]
    assert steps == 20  # 4800 rows twice: no step is cut short
    sent = plan(small, ranks, *options)
    tables = sum(v for n, v in sent["bytes_sent_per_step"].items() if "-" in n and "(" in n)
    assert lines[-1]["table_bytes_sent"] / steps == pytest.approx(tables, rel=0.02)


def test_calibration_measures_messages_and_is_saved(small: Path, tmp_path: Path) -> None:
    features = small.parent / "work/features"
    options = ("--paths.work", str(tmp_path), "--paths.features", str(features))
    rough = plan(small, 2, *options)
    assert not rough["constants"]["is_measured"]
    calibrated = plan(small, 2, "--calibrate", *options, calibrate_on=2)
    measured = calibrated["constants"]
    assert measured["is_measured"]
    # It is 0 if messages travel while the ranks compute.
    assert 0 <= measured["message_seconds"] < 1
    assert measured["message_seconds"] != rough["constants"]["message_seconds"]
    assert 1e-12 <= measured["byte_seconds"] < 1e-6
    assert 1e-5 < calibrated["seconds_per_step"]["compute"] < 1
    assert plan(small, 2, *options)["constants"] == measured


def test_missing_shards_and_invalid_options_are_one_line_errors(
    small: Path, tmp_path: Path
) -> None:
    for options, text in (
        (("--paths.features", str(tmp_path)), "is missing; run hvdrec prepare"),
        (("--bandwidth", "fast"), "bandwidth = 'fast': must be a number above 0 with one of"),
        (("--ranks", "-2"), "ranks = -2: must not be negative"),
    ):
        done = launch([HVDREC, "plan", str(small), *options], 1)
        assert done.returncode == 2
        assert text in done.stderr
        assert len(done.stderr.splitlines()) == 1
