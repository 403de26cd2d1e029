"""Schemathesis on the OpenAPI document: what it allows is answered, what it does not is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.launch import Running

EXAMPLES = 60


@pytest.mark.parametrize("name", ["service", "int_service", "task_service"])
def test_every_check_of_schemathesis(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    running: Running = request.getfixturevalue(name)
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")),
            *("run", f"{running.url}/openapi.json"),
            *("--checks", "all", "--seed", "1", "--max-examples", str(EXAMPLES)),
            *("--generation-database", "none", "--request-timeout", "60"),
            # What a request did to the bundle, nothing, is no state to be tested.
            *("--phases", "examples,coverage,fuzzing"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 selected / 5 total" in done.stdout
    assert "No issues found" in done.stdout
