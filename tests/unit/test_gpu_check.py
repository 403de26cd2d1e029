"""Tests of scripts/gpu_check: its parts, time limits, tables, and shares of time."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "gpu"
sys.path.insert(0, str(SCRIPTS))
import parts  # noqa: E402
import report  # noqa: E402
import shares  # noqa: E402
from parts import Outcome  # noqa: E402

TRAINED = {
    "samples_per_second": 123456.0,
    "shares_of_time": {"reading": 0.1, "exchange": 0.0, "compute": 0.6, "host": 0.3},
    "nvidia_smi": {"busy_share": 0.55, "memory_mb": 2048.0},
    "operations": {"gemm": 1.5},
}


def run(tmp_path: Path, code: str, limit: float = 30) -> Outcome:
    command = [sys.executable, "-c", code]
    return parts.run_command("part", command, limit, tmp_path / "log", os.environ)


def test_a_part_passes_with_the_last_json_object_it_printed(tmp_path: Path) -> None:
    outcome = run(tmp_path, "print('{\"a\": 1}'); print('[0]<stdout>: {\"a\": 2}'); print('end')")
    assert (outcome.status, outcome.figures) == ("passed", {"a": 2})


def test_a_part_fails_with_the_line_that_names_the_error(tmp_path: Path) -> None:
    outcome = run(tmp_path, "assert False, 'losses differ'")
    assert outcome.status == "failed"
    assert outcome.detail == "AssertionError: losses differ"
    assert run(tmp_path, "print('no figures')").status == "failed"
    assert run(tmp_path, "print('{}'); exit(3)").status == "failed"


def test_a_part_that_takes_too_long_fails_and_leaves_no_process(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))\n"
        "time.sleep(60)"
    )
    outcome = run(tmp_path, code, limit=1.5)
    assert outcome.status == "failed"
    assert "time limit" in outcome.detail
    child = int(pid.read_text())
    end = time.monotonic() + 5
    while is_running(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    """Return whether a process exists and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_limits_end_with_the_time_of_the_whole_check() -> None:
    part = parts.Part("name", "", limit=60)
    assert parts.limit_of(part, left=600) == 60
    assert parts.limit_of(part, left=25) == 25
    assert parts.limit_of(part, left=600, scale=3) == 180


def test_what_needs_no_horovod_runs_before_it_is_built() -> None:
    names = [part.name for part in parts.PARTS]
    assert len(set(names)) == len(names)
    before = names.index(parts.HOROVOD)
    assert all(
        part.needs_horovod == (i > before) for i, part in enumerate(parts.PARTS) if i != before
    )


def test_a_horovod_beside_the_environment_comes_first(tmp_path: Path) -> None:
    environment = {"PATH": "/bin", "LD_LIBRARY_PATH": "/opt/lib"}
    own = parts.environment_of(environment, tmp_path / "none", is_launched=False)
    assert own["LD_LIBRARY_PATH"] == "/opt/lib"
    assert "OMP_NUM_THREADS" not in own
    built = parts.environment_of(environment, tmp_path, is_launched=True)
    assert built["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path)
    assert built["LD_LIBRARY_PATH"].split(os.pathsep) == [str(parts.BIN.parent / "lib"), "/opt/lib"]
    assert built["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("built", "device", "several", "expected"),
    [
        (("mpi", "gloo"), "cpu", False, True),
        (("gloo",), "cpu", False, False),
        (("mpi", "gloo"), "cuda", False, False),
        (("mpi", "gloo", "gpu"), "cuda", False, True),
        (("mpi", "gloo", "gpu", "nccl"), "cuda", False, False),
        (("mpi", "gloo", "gpu", "nccl"), "cuda", True, True),
    ],
)
def test_two_ranks_on_one_gpu_need_a_build_without_nccl(
    built: tuple[str, ...], device: str, several: bool, expected: bool
) -> None:
    horovod = {name: name in built for name in ("mpi", "gloo", "gpu", "nccl")}
    assert parts.serves(horovod, device, several_gpus=several) is expected


def test_the_table_has_a_line_for_each_part_and_failures_set_the_exit_code() -> None:
    outcomes = [
        Outcome("losses", "passed", 3.2, figures={"largest_difference": 1e-12, "steps": 30}),
        Outcome("train-fp32", "passed", 20, figures=TRAINED),
        Outcome("horovod", "failed", 300.4, "no end after 300 s"),
        Outcome("ranks-mpi", "skipped", detail="needs Horovod"),
    ]
    lines = report.table(outcomes).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [[o.name, o.status] for o in outcomes]
    assert "largest difference 1e-12, steps 30" in lines[1]
    assert lines[3].endswith("300  no end after 300 s")
    assert report.exit_code(outcomes) == 1
    assert report.exit_code([outcomes[0], outcomes[3]]) == 0
    text = report.training(outcomes)
    assert "train-fp32: 123,456 samples/s" in text
    assert "compute 60%, host 30%" in text
    assert "GPU busy 55%" in text


def test_shares_of_time_add_up_to_one() -> None:
    gpu = shares.shares_of_time(10.0, 1.0, 2.0, busy=0.5)
    assert gpu == pytest.approx({"reading": 0.1, "exchange": 0.2, "compute": 0.5, "host": 0.2})
    cpu = shares.shares_of_time(10.0, 1.0, 2.0, busy=None)
    assert cpu == pytest.approx({"reading": 0.1, "exchange": 0.2, "compute": 0.7})
    # Kernels run while the step waits: the shares still add up to one.
    assert sum(shares.shares_of_time(10.0, 4.0, 2.0, busy=0.9).values()) == pytest.approx(1.0)


def test_busy_time_counts_overlapping_kernels_once() -> None:
    assert shares.covered([(0, 4), (1, 2), (3, 6), (10, 11)]) == 7
    assert shares.covered([]) == 0


def test_lines_of_nvidia_smi_that_are_cut_off_are_left_out() -> None:
    figures = shares.gpu_figures(["50, 1000", "100, 3000", "[N/A], 1", "7"])
    assert figures == {"busy_share": 0.75, "memory_mb": 3000, "samples": 2}
    assert shares.gpu_figures([]) == {}
