"""Schemathesis: the service answers what its OpenAPI document allows and refuses the rest."""

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
    result = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")),
            *("run", f"{running.url}/openapi.json"),
            *("--checks", "all", "--seed", "1", "--max-examples", str(EXAMPLES)),
            *("--generation-database", "none", "--request-timeout", "60"),
            # Requests do not change the bundle, so there is no state to test.
            *("--phases", "examples,coverage,fuzzing"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "5 selected / 5 total" in result.stdout
    assert "No issues found" in result.stdout
