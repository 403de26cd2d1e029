"""Tests of scripts/gpu_check on the CPU: its parts, and what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def check(*options: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(ROOT / "scripts" / "gpu" / "check.py"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(program, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_all_parts_pass_on_the_cpu(tmp_path: Path) -> None:
    done = check("--device", "cpu", "--out", str(tmp_path), "--seconds", "1", "--patience", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"]
    parts = {part["name"]: part for part in report["parts"]}
    assert {part["status"] for part in parts.values()} == {"passed"}
    assert parts["ranks-gloo"]["figures"]["settings"] > 20
    assert parts["exchange-mpi"]["figures"]["rounds"] >= 20
    shares = parts["train-2-ranks"]["figures"]["shares_of_time"]
    assert sum(shares.values()) == pytest.approx(1.0)
    assert "train-bf16" in done.stdout


def test_without_a_gpu_the_remedy_is_named(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    program = [sys.executable, str(ROOT / "scripts" / "gpu" / "check.py"), "--out", str(tmp_path)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--device cpu" in done.stderr
    assert "Traceback" not in done.stderr
