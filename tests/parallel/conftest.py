"""Fixtures with the encoded shards of a small data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parallel.launch import BIN, launch
from tests.small_data import write_small_data

HVDREC = str(BIN / "hvdrec")
TASKS = """
[[tasks]]
name = "click"
label = "clicked"

[[tasks]]
name = "late"
label = "CASE WHEN clicked = 1 THEN hour >= 12 END"
"""


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the TOML file of a small run whose features are encoded.

    tasks.toml beside it is the same run with two tasks; the shards hold their labels as well.
    """
    config = write_small_data(tmp_path_factory.mktemp("small"))
    tasks = config.with_name("tasks.toml")
    shape = '\ncross_layers = 1\nsharing = "mmoe"\nexperts = 2\n'
    tasks.write_text(config.read_text().replace("\ncross_layers = 1\n", shape) + TASKS)
    for command in ("samples", "prepare"):
        done = launch([HVDREC, command, str(tasks)], 1)
        assert done.returncode == 0, done.stderr
    return config


@pytest.fixture(scope="session")
def train(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that trains a run and returns its directory.

    Runs with equal options are trained once and must not be changed, unless `into` is given.
    """
    runs: dict[tuple[int, str, tuple[str, ...]], Path] = {}

    def run(ranks: int, launcher: str, *options: str, into: Path | None = None) -> Path:
        if into is None and (ranks, launcher, options) in runs:
            return runs[ranks, launcher, options]
        out = into or tmp_path_factory.mktemp("run") / "run"
        command = [HVDREC, "train", str(small), "--paths.run", str(out), *options]
        done = launch(command, ranks, launcher)
        assert done.returncode == 0, done.stdout + done.stderr
        if into is None:
            runs[ranks, launcher, options] = out
        return out

    return run
