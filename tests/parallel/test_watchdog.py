"""Tests that a job ends as a whole, whatever happens to one of its ranks."""

from __future__ import annotations

import socket
import sys

import pytest

from tests.parallel.launch import PROGRAMS, launch

HOST = socket.gethostname()
STOPPED = "no sign of life for 2 s; it is stopped, or its host or network is down"
LAUNCHERS = pytest.mark.parametrize("launcher", ["horovodrun", "mpirun"])


def run(trouble: str, launcher: str, ranks: int = 3) -> tuple[int, list[str], str]:
    """Run barriers on several ranks; return the exit status, hvdrec's errors and all output."""
    program = [sys.executable, str(PROGRAMS / "watched.py"), trouble]
    done = launch(["env", "HVDREC_SILENCE_SECONDS=2", *program], ranks, launcher)
    output = done.stdout + done.stderr
    lines = [line for line in output.splitlines() if "hvdrec: error: " in line]
    return done.returncode, [line[line.index("hvdrec: error: ") + 15 :] for line in lines], output


@LAUNCHERS
def test_a_job_that_ends_normally_prints_no_error(launcher: str) -> None:
    """A rank that is busy for longer than the silence limit still gives signs of life."""
    status, lines, output = run("slow", launcher)
    assert (status, lines, output.count("all passed")) == (0, [], 3)
    assert "Traceback" not in output
    assert "Task was destroyed" not in output


@pytest.mark.parametrize(
    ("launcher", "trouble", "line"),
    [
        ("horovodrun", "fail", "RuntimeError: the sky has fallen"),
        ("mpirun", "mistake", "a shard is damaged"),
        ("horovodrun", "stopped", STOPPED),
        ("mpirun", "stopped", STOPPED),
    ],
)
def test_trouble_of_one_rank_is_reported_once_and_ends_all(
    launcher: str, trouble: str, line: str
) -> None:
    status, lines, output = run(trouble, launcher)
    assert status != 0
    assert lines == [f"rank 1 on {HOST}: {line}"], output
    assert "all passed" not in output
    assert output.count('raise RuntimeError("the sky') == (trouble == "fail")


@LAUNCHERS
def test_a_killed_rank_is_noticed(launcher: str) -> None:
    status, lines, output = run("killed", launcher)
    assert status != 0
    # The launcher may end the other ranks before one of them reports.
    line = f"rank 1 on {HOST}: ended without an error message; it was killed or it crashed"
    assert lines in ([], [line])
    assert lines or "Process 1 exit with" in output or "process rank 1 with PID" in output
    assert "all passed" not in output


def test_an_error_that_all_ranks_share_passes_the_watchdog() -> None:
    status, lines, output = run("shared", "mpirun")
    assert status != 0
    assert lines == []
    assert f"raised rank 1 on {HOST}: a shard is damaged" in output


def test_an_invalid_silence_limit_is_refused() -> None:
    program = [sys.executable, str(PROGRAMS / "watched.py"), "none"]
    done = launch(["env", "HVDREC_SILENCE_SECONDS=soon", *program], 1)
    assert done.returncode != 0
    assert "HVDREC_SILENCE_SECONDS = 'soon': must be 0 (never) or at least 1 second" in done.stderr
