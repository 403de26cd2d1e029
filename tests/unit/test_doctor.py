"""Tests of the checks of this machine."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hvdrec
from hvdrec.cli.reports import render_checks
from hvdrec.cluster import doctor
from hvdrec.cluster.doctor import Check, Report

NOTHING: dict[str, str | None] = {
    "numpy": "2.4.0",
    "torch": None,
    "horovod": None,
    "petastorm": None,
    "pyarrow": None,
}
EVERYTHING: dict[str, str | None] = {
    "numpy": "2.4.6",
    "torch": "2.13.0+cpu",
    "horovod": "0.28.1",
    "petastorm": "0.12.1",
    "pyarrow": "26.0.1",
}
OPEN_MPI_4 = "mpirun (Open MPI) 4.1.8"


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ((3, 10, 2), "problem"),
        ((3, 11, 0), "ok"),
        ((3, 12, 1), "ok"),
        ((3, 13, 0), "ok"),
        ((3, 14, 0), "warning"),
    ],
)
def test_python_versions(version: tuple[int, int, int], status: str) -> None:
    check = doctor.python_check(version)
    assert (check.status, check.value) == (status, ".".join(map(str, version)))
    assert bool(check.remedy) == (status != "ok")


def test_nothing_works_without_numpy() -> None:
    assert doctor.scoring_check("numpy", None) == Check(
        "numpy", "not installed", "problem", "pip install numpy"
    )
    assert doctor.scoring_check("numpy", "2.4.0") == Check("numpy", "2.4.0")


def test_a_slim_install_warns_about_the_training_packages() -> None:
    checks = doctor.training_checks(NOTHING)
    assert [check.name for check in checks] == ["torch", "horovod", "petastorm", "pyarrow"]
    for check in checks:
        assert (check.value, check.status) == ("not installed", "warning")
        assert check.remedy == "scoring does not need it; for training run scripts/install"


def test_an_incomplete_training_install_is_a_problem() -> None:
    checks = doctor.training_checks({**EVERYTHING, "horovod": None})
    assert checks == [
        Check("torch", "2.13.0+cpu"),
        Check("horovod", "not installed", "problem", "run scripts/install"),
        Check("petastorm", "0.12.1"),
        Check("pyarrow", "26.0.1"),
    ]


@pytest.mark.parametrize(
    ("mpi", "gloo", "statuses"),
    [
        (True, True, ["ok", "ok", "ok"]),
        (True, False, ["ok", "warning", "ok"]),
        (False, True, ["warning", "ok", "ok"]),
        (False, False, ["problem", "problem", "ok"]),
    ],
)
def test_horovod_needs_mpi_or_gloo(mpi: bool, gloo: bool, statuses: list[str]) -> None:
    checks = doctor.transport_checks(mpi, gloo, nccl=False)
    assert [check.status for check in checks] == statuses
    assert [check.value for check in checks] == [
        "built" if built else "not built" for built in (mpi, gloo, False)
    ]


@pytest.mark.parametrize(
    ("output", "status"),
    [
        (OPEN_MPI_4, "ok"),
        ("mpirun (Open MPI) 5.0.6", "problem"),
        ("mpirun (Open MPI) 10.0.1", "problem"),
        ("HYDRA build details:", "warning"),
        ("", "warning"),
    ],
)
def test_open_mpi_versions(output: str, status: str) -> None:
    check = doctor.mpirun_check("/opt/bin/mpirun", output, "0.28.1")
    assert check.status == status
    assert check.value.startswith("/opt/bin/mpirun: ")
    assert ("Open MPI 4.1" in check.remedy) == (status != "ok")


def test_a_missing_mpirun_matters_only_with_horovod() -> None:
    assert doctor.mpirun_check(None, "", "0.28.1").status == "warning"
    assert doctor.mpirun_check(None, "", None).status == "ok"


def test_root_needs_permission_for_mpirun() -> None:
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    assert doctor.root_check(False, {}) == []
    assert [check.status for check in doctor.root_check(True, allowed)] == ["ok"]
    (check,) = doctor.root_check(True, {"OMPI_ALLOW_RUN_AS_ROOT": "1"})
    assert check.status == "warning"
    assert check.remedy == (
        "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1, "
        "or call mpirun --allow-run-as-root"
    )


@pytest.mark.parametrize(
    ("on_path", "installed", "horovod", "status"),
    [
        ("/env/bin/horovodrun", "/env/bin/horovodrun", "0.28.1", "ok"),
        ("/usr/bin/horovodrun", "/env/bin/horovodrun", "0.28.1", "problem"),
        ("/usr/bin/horovodrun", None, "0.28.1", "ok"),
        (None, "/env/bin/horovodrun", "0.28.1", "warning"),
        (None, None, "0.28.1", "problem"),
        (None, None, None, "ok"),
    ],
)
def test_horovodrun_must_be_that_of_this_environment(
    on_path: str | None, installed: str | None, horovod: str | None, status: str
) -> None:
    check = doctor.horovodrun_check(on_path, installed, horovod)
    assert check.status == status
    assert bool(check.remedy) == (status != "ok")


def test_unused_gpus_are_reported() -> None:
    assert doctor.gpu_check([], False, False) == Check("GPUs", "none")
    assert doctor.gpu_check(["A", "B"], False, True) == Check("GPUs", "0: A, 1: B")
    without_nccl = doctor.gpu_check(["A"], False, False)
    assert (without_nccl.status, without_nccl.value) == ("warning", "0: A")
    assert without_nccl.remedy.endswith("run scripts/install --cuda")
    hidden = doctor.gpu_check([], True, False)
    assert (hidden.status, hidden.value) == (
        "warning",
        "present, but the installed torch does not use them",
    )


def test_little_memory_is_a_warning() -> None:
    assert doctor.memory_check(None) == Check("memory", "unknown")
    assert doctor.memory_check(16.04) == Check("memory", "16.0 GiB")
    small = doctor.memory_check(2.0)
    assert (small.value, small.status) == ("2.0 GiB", "warning")


def test_only_the_build_of_horovod_needs_a_compiler() -> None:
    assert doctor.compiler_check("/usr/bin/g++", "g++ 12", None) == Check(
        "C++ compiler", "/usr/bin/g++: g++ 12"
    )
    assert doctor.compiler_check(None, "", "0.28.1").status == "ok"
    missing = doctor.compiler_check(None, "", None)
    assert (missing.status, missing.value) == ("warning", "not found")


def test_a_report_as_text_and_as_json() -> None:
    report = Report(
        (
            Check("python", "3.11.2"),
            Check("mpirun", "not found", "warning", "do this"),
            Check("torch", "not installed", "problem", "do that"),
        )
    )
    assert render_checks(report.checks) == "\n".join(
        [
            "ok       python  3.11.2",
            "warning  mpirun  not found",
            "                 -> do this",
            "problem  torch   not installed",
            "                 -> do that",
            "",
            "1 problem, 1 warning",
        ]
    )
    assert report.exit_status == 1
    assert json.loads(json.dumps(report.as_dict())) == {
        "ok": False,
        "checks": [
            {"name": "python", "value": "3.11.2", "status": "ok", "remedy": ""},
            {"name": "mpirun", "value": "not found", "status": "warning", "remedy": "do this"},
            {
                "name": "torch",
                "value": "not installed",
                "status": "problem",
                "remedy": "do that",
            },
        ],
    }


def test_warnings_are_not_problems() -> None:
    report = Report((Check("a", "b", "warning", "c"), Check("d", "e", "warning", "f")))
    assert report.exit_status == 0
    assert report.as_dict()["ok"] is True
    assert render_checks(report.checks).endswith("\n\n0 problems, 2 warnings")


def test_this_machine_has_no_problem() -> None:
    checks = {check.name: check for check in doctor.diagnose().checks}
    for name in ("numpy", "onnxruntime", "torch", "horovod", "petastorm", "pyarrow"):
        assert checks[name] == Check(name, importlib.metadata.version(name))
    assert checks["horovod with MPI"].value == "built"
    assert checks["horovod with Gloo"].value == "built"
    assert int(checks["cores"].value) >= 1
    assert [check.name for check in checks.values() if check.status == "problem"] == []


def test_a_broken_horovod_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> tuple[bool, bool, bool]:
        raise ImportError("libmpi.so.40: cannot open\nshared object file")

    monkeypatch.setattr(doctor, "horovod_transports", broken)
    checks = {check.name: check for check in doctor.diagnose().checks}
    assert checks["horovod for torch"] == Check(
        "horovod for torch",
        "ImportError: libmpi.so.40: cannot open shared object file",
        "problem",
        "it was built for another torch or MPI: run scripts/install",
    )


SLIM = """
import importlib.metadata, sys

class Absent:
    names = ("torch", "horovod", "petastorm", "pyarrow", "pandas", "mpi4py")
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named '{name}'")

real = importlib.metadata.version
def version(name):
    if name in Absent.names:
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)

sys.meta_path.insert(0, Absent())
importlib.metadata.version = version
from hvdrec.cluster.doctor import diagnose
report = diagnose()
from hvdrec.cli.reports import render_checks
print(render_checks(report.checks))
sys.exit(report.exit_status)
"""


def test_the_slim_install_has_no_problem(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SLIM],
        cwd=tmp_path,
        env={"PATH": "/nowhere", "PYTHONPATH": str(Path(hvdrec.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for name in ("torch", "horovod", "petastorm", "pyarrow"):
        line = lines.index(f"warning {name} not installed")
        assert lines[line + 1] == "-> scoring does not need it; for training run scripts/install"
    assert f"ok onnxruntime {importlib.metadata.version('onnxruntime')}" in lines
    assert lines[-1].startswith("0 problems, ")
