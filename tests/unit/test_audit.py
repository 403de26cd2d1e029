"""Tests of scripts/audit, with a program that stands in for pip-audit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

AUDIT = Path(__file__).parents[2] / "scripts" / "audit"
CLEAN = {"name": "numpy", "version": "2.4.6", "vulns": []}
SKIPPED = {"name": "torch", "skip_reason": "Dependency not found on PyPI: torch (2.13.0)"}


def advisory(identifier: str, *aliases: str) -> dict[str, Any]:
    return {"id": identifier, "aliases": list(aliases), "fix_versions": ["9.9"]}


def audit(tmp_path: Path, output: str) -> tuple[int, str]:
    """Run the script with a pip-audit that prints `output` and exits with status 0."""
    program = tmp_path / "pip-audit"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    program.chmod(0o755)
    file = tmp_path / "constraints.txt"
    file.write_text("numpy==2.4.6\n")
    command = [sys.executable, str(AUDIT), "--pip-audit", str(program), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("packages", "status", "words"),
    [
        ([CLEAN], 0, ["1 clean"]),
        ([CLEAN, SKIPPED], 2, ["torch", "not all versions were checked"]),
        ([], 2, ["not all versions were checked"]),
        (
            [
                {"name": "jinja2", "version": "3.1", "vulns": [advisory("PYSEC-1", "CVE-1")]},
                SKIPPED,
            ],
            1,
            ["jinja2 3.1: CVE-1, PYSEC-1; fixed in: 9.9"],
        ),
        (
            [{"name": "horovod", "version": "0", "vulns": [advisory("GHSA-1", "CVE-2024-10190")]}],
            0,
            ["accepted", "private networks"],
        ),
    ],
)
def test_only_a_full_check_is_clean(
    tmp_path: Path, packages: list[dict[str, Any]], status: int, words: list[str]
) -> None:
    code, output = audit(tmp_path, json.dumps({"dependencies": packages, "fixes": []}))
    assert code == status
    for word in words:
        assert word in output


def test_a_failed_pip_audit_is_not_clean(tmp_path: Path) -> None:
    code, output = audit(tmp_path, "connection refused")
    assert code == 2
    assert "pip-audit failed" in output


def test_a_missing_pip_audit_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(AUDIT), "--pip-audit", str(tmp_path / "none"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install pip-audit" in done.stdout
