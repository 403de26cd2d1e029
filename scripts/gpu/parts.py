"""The parts of scripts/gpu_check: what they check, their time limits, and how one is run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BIN = Path(sys.executable).parent
GRACE_SECONDS = 3.0

Status = Literal["passed", "failed", "skipped"]
Launcher = Literal["", "gloo", "mpi"]


@dataclass(frozen=True)
class Part:
    """A part of the check, which runs in processes of its own.

    Attributes:
        name: Name in the table and for ``--only``.
        checks: What it checks, in a few words.
        limit: Seconds after which it counts as failed.
        program: Its name in programs.py.
        launcher: How two ranks are started; "" for one process.
        needs_horovod: Whether Horovod must be importable.
    """

    name: str
    checks: str
    limit: float
    program: str = ""
    launcher: Launcher = ""

    @property
    def needs_horovod(self) -> bool:
        """True for parts on two ranks; one process needs no Horovod."""
        return bool(self.launcher)


HOROVOD = "horovod"
PARTS = (
    Part("gradients", "gradients, losses and tables equal the CPU's", 90, "gradients"),
    Part("losses", "losses in fp32 and bf16 against the CPU", 60, "losses"),
    Part("resume", "resumed run is bit for bit the same", 60, "resume"),
    Part("loader", "pinned batches arrive unchanged", 60, "loader"),
    Part("train-fp32", "work (a), one rank", 90, "train-fp32"),
    Part("train-bf16", "work (a), one rank, bf16", 90, "train-bf16"),
    Part(HOROVOD, "Horovod is installed, or builds", 300),
    Part("exchange-gloo", "collectives, and a soak of alltoall", 60, "exchange", "gloo"),
    Part("exchange-mpi", "collectives, and a soak of alltoall", 60, "exchange", "mpi"),
    Part("ranks-gloo", "two ranks give one rank's gradients", 90, "two-ranks", "gloo"),
    Part("ranks-mpi", "two ranks give one rank's gradients", 90, "two-ranks", "mpi"),
    Part("train-2-ranks", "work (a), two ranks, sharded tables", 90, "train-fp32", "mpi"),
)
"""In the order of running: first what needs no Horovod, so that a failing build costs nothing."""


@dataclass(frozen=True)
class Outcome:
    """The result of a part."""

    name: str
    status: Status
    seconds: float = 0.0
    detail: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def limit_of(part: Part, left: float, scale: float = 1.0) -> float:
    """Return the seconds that a part may take, of the seconds that are left in total."""
    return min(part.limit * scale, left)


def serves(horovod: Mapping[str, bool], device: str, *, several_gpus: bool) -> bool:
    """Return whether a build of Horovod can exchange the tensors of two ranks on a device.

    NCCL refuses two ranks on one GPU. A build without it sends tensors through host memory.
    """
    if device == "cpu":
        return horovod["mpi"] and horovod["gloo"]
    return horovod["gpu"] and (several_gpus or not horovod["nccl"])


def launch_words(launcher: Launcher, ranks: int = 2) -> list[str]:
    """Return the command that starts ranks on this machine; empty for one process."""
    count = ["-np", str(ranks)]
    if launcher == "gloo":
        runner = [sys.executable, "-m", "horovod.runner.launch"]
        return [*runner, *count, "--gloo", "--network-interfaces", "lo"]
    if launcher == "mpi":
        mpirun = BIN / "mpirun"
        words = [str(mpirun) if mpirun.is_file() else "mpirun", "--oversubscribe"]
        return [*words, "--allow-run-as-root", "--bind-to", "none", *count]
    return []


def command_of(part: Part, device: str, folder: Path, seconds: float) -> list[str]:
    """Return the command line of a part that programs.py holds."""
    words = [*launch_words(part.launcher), sys.executable, str(HERE / "programs.py"), part.program]
    words += ["--device", device, "--folder", str(folder), "--seconds", str(seconds)]
    return words + ["--launched"] * bool(part.launcher)


def environment_of(
    environment: Mapping[str, str], horovod: Path, *, is_launched: bool
) -> dict[str, str]:
    """Return the environment of a part; `horovod` is a directory to import Horovod from."""
    paths = [*([str(horovod)] if horovod.is_dir() else []), str(ROOT), str(HERE)]
    more = {"OMP_NUM_THREADS": "1"} if is_launched else {}
    if horovod.is_dir():
        # A Horovod beside the environment does not find the environment's MPI by itself.
        libraries = [str(BIN.parent / "lib"), environment.get("LD_LIBRARY_PATH", "")]
        more["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    return {
        **environment,
        **more,
        "PATH": f"{BIN}{os.pathsep}{environment.get('PATH', '')}",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        # A fixed workspace makes cuBLAS deterministic; TF32 would hide small errors.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NVIDIA_TF32_OVERRIDE": "0",
        # On one machine mpirun does not use ssh, but refuses to run without an agent.
        "OMPI_MCA_plm_rsh_agent": "ssh : rsh : false",
    }


def run_command(
    name: str,
    command: Sequence[str],
    limit: float,
    log: Path,
    environment: Mapping[str, str],
    *,
    has_figures: bool = True,
) -> Outcome:
    """Run a command with a time limit and its output in a file; return the outcome of the part.

    The figures are the last JSON object of the output, unless it has none.
    """
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_session(process)
    seconds = time.monotonic() - started
    text = log.read_text(errors="replace")
    if code is None:
        return Outcome(name, "failed", seconds, f"no end after {limit:.0f} s, its time limit")
    figures = last_figures(text) if has_figures else {}
    if code != 0:
        return Outcome(name, "failed", seconds, reason(text) or f"exit code {code}")
    if figures is None:
        return Outcome(name, "failed", seconds, "printed no figures")
    return Outcome(name, "passed", seconds, figures=figures)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End a process and all processes that it started and left running."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
            if number == signal.SIGTERM:
                time.sleep(0.1)  # for its children


def last_figures(text: str) -> dict[str, Any] | None:
    """Return the last JSON object of an output; horovodrun writes the rank before a line."""
    for line in reversed(text.splitlines()):
        start = line.find("{")
        if start >= 0:
            with suppress(ValueError):
                found = json.loads(line[start:])
                if isinstance(found, dict):
                    return found
    return None


NOISE = ("Process name:", "Exit code:", "mpirun", "USDT:", "warn", "Traceback", "----", "====")


def reason(text: str) -> str:
    """Return the line of an output that says why a program failed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and "CalledProcess" not in line]
    plain = [line for line in lines if not any(word in line for word in NOISE)]
    return (errors or plain or [""])[-1]
