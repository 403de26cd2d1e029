from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def install(tmp_path: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "install"), *arguments],
        env={
            **os.environ,
            "HVDREC_VENV": str(tmp_path / "venv"),
            "HVDREC_CACHE": str(tmp_path / "cache"),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_the_slim_install_needs_only_numpy_and_onnxruntime() -> None:
    requirements = [Requirement(line) for line in project()["dependencies"]]
    assert [requirement.name for requirement in requirements] == ["numpy", "onnxruntime"]
    assert requirements[0].specifier.contains("1.26.4")
    assert requirements[0].specifier.contains("2.4.6")


def test_every_requirement_has_a_pin_that_satisfies_it() -> None:
    groups = [project()["dependencies"], *project()["optional-dependencies"].values()]
    for requirement in (Requirement(line) for group in groups for line in group):
        name = canonicalize_name(requirement.name)
        assert requirement.specifier.contains(pins()[name]), requirement


def test_install_builds_the_declared_horovod() -> None:
    script = (ROOT / "scripts" / "install").read_text()
    (version,) = re.findall(r"^horovod_version=(.+)$", script, re.MULTILINE)
    assert Version(version) == pins()["horovod"]
    assert f"horovod=={version}" in project()["optional-dependencies"]["train"]


def test_help_of_install_names_every_option(tmp_path: Path) -> None:
    code, out, err = install(tmp_path, "--help")
    assert (code, err) == (0, "")
    for word in ("--extras", "--slim", "--cuda", "PYTHON", "HVDREC_VENV", "HVDREC_CACHE"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["--fast"],
            "unknown argument '--fast'; known: [--extras LIST, --slim, --cuda, --help]",
        ),
        (["--extras"], "--extras needs a list, e.g. --extras train,dev"),
        (
            ["--extras", "train dev"],
            "--extras 'train dev': must be names separated by commas, e.g. train,dev",
        ),
        (
            ["--extras=train,gpu"],
            "unknown extra 'gpu'; known: [dev, docs, fbgemm, index, redis, s3, "
            "serve, spark, train]",
        ),
    ],
)
def test_install_with_wrong_arguments_writes_nothing(
    tmp_path: Path, arguments: list[str], text: str
) -> None:
    code, out, err = install(tmp_path, *arguments)
    assert (code, out, err) == (2, "", f"scripts/install: {text}\n")
    assert list(tmp_path.iterdir()) == []


def test_install_refuses_a_python_that_does_not_run(tmp_path: Path) -> None:
    code, _, err = install(tmp_path, PYTHON="/bin/false")
    assert code == 1
    assert err.splitlines() == [
        "scripts/install: PYTHON=/bin/false: not a Python 3.11",
        "  remedy: unset PYTHON, or set it to the path of a Python 3.11",
    ]


def test_install_reports_a_missing_compiler_before_it_downloads_anything(tmp_path: Path) -> None:
    code, out, err = install(tmp_path, CXX="no-such-compiler")
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        "scripts/install: no C++ compiler (no-such-compiler), which builds Horovod",
        "  remedy: apt-get install g++",
        "  remedy: or set CXX to the path of a compiler",
    ]


def test_install_refuses_a_compiler_without_cpp17(tmp_path: Path) -> None:
    compiler = tmp_path / "old-compiler"
    compiler.write_text("#!/bin/sh\necho unrecognized option -std=c++17 >&2\nexit 1\n")
    compiler.chmod(0o755)
    code, _, err = install(tmp_path, CXX=str(compiler))
    assert code == 1
    assert err.splitlines() == [
        f"scripts/install: {compiler} does not compile C++17: unrecognized option -std=c++17",
        "  remedy: install g++ 9 or later, and set CXX to its path",
    ]


def test_install_does_not_touch_a_directory_that_is_not_an_environment(tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "thesis.txt").write_text("mine")
    code, _, err = install(tmp_path, "--slim")
    assert code == 1
    assert err.splitlines() == [
        f"scripts/install: {tmp_path / 'venv'}: not empty, and not a virtual environment",
        "  remedy: set HVDREC_VENV to an empty directory",
    ]
    assert (tmp_path / "venv" / "thesis.txt").read_text() == "mine"


def test_the_test_script_refuses_an_unknown_step() -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "test"), "units"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "scripts/test: unknown step 'units'; known: lint unit slim build docs parallel integration "
        "serving two-hosts hosts\n"
    )


@pytest.mark.parametrize("name", ["scripts/install", "scripts/test", ".ci/run"])
def test_scripts_are_executable(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
