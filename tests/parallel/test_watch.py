"""A job ends as a whole, whatever happens to one of its ranks."""

from __future__ import annotations

import socket
import sys

import pytest

from tests.parallel.launch import PROGRAMS, launch

HERE = socket.gethostname()
STOPPED = "no sign of life for 2 s; it is stopped, or its host or network is down"
LAUNCHERS = pytest.mark.parametrize("launcher", ["horovodrun", "mpirun"])


def meet(trouble: str, launcher: str, ranks: int = 3) -> tuple[int, list[str], str]:
    """Let ranks meet; return the status, hvdrec's lines, and all that was said."""
    program = [sys.executable, str(PROGRAMS / "watched.py"), trouble]
    done = launch(["env", "HVDREC_SILENCE_SECONDS=2", *program], ranks, launcher)
    said = done.stdout + done.stderr
    lines = [line for line in said.splitlines() if "hvdrec: error: " in line]
    return done.returncode, [line[line.index("hvdrec: error: ") + 15 :] for line in lines], said


@LAUNCHERS
def test_a_job_that_ends_as_it_should_says_nothing(launcher: str) -> None:
    """Not even where a rank takes longer than silence may last: it is not silent."""
    status, lines, said = meet("slow", launcher)
    assert (status, lines, said.count("all met")) == (0, [], 3)
    assert "Traceback" not in said
    assert "Task was destroyed" not in said


@pytest.mark.parametrize(
    ("launcher", "trouble", "line"),
    [
        ("horovodrun", "fail", "RuntimeError: the sky has fallen"),
        ("mpirun", "mistake", "a shard is damaged"),
        ("horovodrun", "stopped", STOPPED),
        ("mpirun", "stopped", STOPPED),
    ],
)
def test_trouble_of_one_rank_is_told_once_and_ends_all(
    launcher: str, trouble: str, line: str
) -> None:
    status, lines, said = meet(trouble, launcher)
    assert status != 0
    assert lines == [f"rank 1 on {HERE}: {line}"], said
    assert "all met" not in said
    assert said.count('raise RuntimeError("the sky') == (trouble == "fail")


@LAUNCHERS
def test_a_rank_that_is_killed_is_missed(launcher: str) -> None:
    status, lines, said = meet("killed", launcher)
    assert status != 0
    # The launcher may have ended the others before one of them tells.
    told = f"rank 1 on {HERE}: has ended without a word; it was killed, or it crashed"
    assert lines in ([], [told])
    assert lines or "Process 1 exit with" in said or "process rank 1 with PID" in said
    assert "all met" not in said


def test_what_all_ranks_know_passes_the_watch() -> None:
    status, lines, said = meet("shared", "mpirun")
    assert status != 0
    assert lines == []
    assert f"heard rank 1 on {HERE}: a shard is damaged" in said


def test_a_wrong_time_of_silence_is_refused() -> None:
    program = [sys.executable, str(PROGRAMS / "watched.py"), "none"]
    done = launch(["env", "HVDREC_SILENCE_SECONDS=soon", *program], 1)
    assert done.returncode != 0
    assert "HVDREC_SILENCE_SECONDS = soon: must be 0 (never) or at least 1 second" in done.stderr
