"""Run a program on several ranks, as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"

LAUNCHERS = {
    "horovodrun": [str(BIN / "horovodrun"), "--gloo", "--network-interfaces", "lo"],
    "horovodrun-mpi": [str(BIN / "horovodrun"), "--mpi", "--mpi-args=--oversubscribe"],
    "mpirun": [str(BIN / "mpirun"), "--oversubscribe", "--allow-run-as-root", "--bind-to", "none"],
}


def launch(
    command: Sequence[str], ranks: int, launcher: str = "horovodrun", timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run a command of the virtual environment on some ranks; one rank needs no launcher."""
    prefix = [] if ranks == 1 else [*LAUNCHERS[launcher], "-np", str(ranks)]
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*prefix, *command],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_program(
    name: str, arguments: Sequence[str], ranks: int, launcher: str = "horovodrun"
) -> subprocess.CompletedProcess[str]:
    """Run a test program and fail with its output if it fails."""
    done = launch([sys.executable, str(PROGRAMS / name), *arguments], ranks, launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    return done
