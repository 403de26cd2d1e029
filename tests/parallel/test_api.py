"""A user's script that trains with the Python API, started by horovodrun."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.parallel.launch import PROGRAMS, launch, run_program


def _lines(text: str) -> list[dict[str, object]]:
    """Return the JSON objects of an output; launchers may put a prefix before each line."""
    return [json.loads(line[line.index("{") :]) for line in text.splitlines() if "{" in line]


def test_a_script_of_ten_lines_trains_on_two_ranks(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = run_program("my_train.py", [str(small), str(run)], 2)
    first, second = _lines(done.stdout)
    assert first == second
    train, report = first["train"], first["report"]
    assert isinstance(train, dict) and isinstance(report, dict)
    assert (train["world_size"], train["epochs"], train["run"]) == (2, 1, str(run))
    assert report["ranking"]["auc"] == pytest.approx(train["validation"]["auc"], abs=1e-12)
    assert (run / "best").is_file()


def test_a_mistake_in_a_script_ends_all_ranks(small: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("taken")
    command = [sys.executable, str(PROGRAMS / "my_train.py"), str(small), str(tmp_path / "run")]
    done = launch(command, 2)
    assert done.returncode != 0
    assert "already holds a run" in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
