"""One small run, made once by the command line, for the tests of this folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.small_data import write_small_data

HVDREC = str(Path(sys.executable).parent / "hvdrec")
Result = subprocess.CompletedProcess[str]


def hvdrec(*arguments: object, cwd: Path | None = None) -> Result:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [HVDREC, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def succeed(*arguments: object) -> dict[str, Any]:
    """Run a verb with --json and return its object."""
    done = hvdrec(*arguments, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


@dataclass(frozen=True)
class SmallRun:
    config: Path
    work: Path
    samples: dict[str, Any]
    prepare: dict[str, Any]
    train: dict[str, Any]
    report: dict[str, Any]
    export: dict[str, Any]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    folder = tmp_path_factory.mktemp("small")
    config = write_small_data(folder)
    work = folder / "work"
    samples = succeed("samples", config)
    prepare = succeed("prepare", config)
    # A probe may choose other layers in a second run, which differ in the last digits.
    train = succeed("train", config, "--train.cpu-layers", "fused")
    report = succeed("evaluate", work / "run")
    export = succeed("export", work / "run")
    return SmallRun(config, work, samples, prepare, train, report, export)


@pytest.fixture
def small_config(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes small raw tables with replacements in the TOML."""

    def write(*replacements: tuple[str, str]) -> Path:
        file = write_small_data(tmp_path)
        text = file.read_text()
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        file.write_text(text)
        return file

    return write
