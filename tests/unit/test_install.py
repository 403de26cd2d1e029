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

from hvdrec.cluster import doctor

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


def pins(file: str = "constraints.txt") -> dict[str, Version]:
    lines = (ROOT / file).read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_the_slim_install_needs_only_numpy_and_onnxruntime() -> None:
    requirements = [Requirement(line) for line in project()["dependencies"]]
    assert [requirement.name for requirement in requirements] == ["numpy", "onnxruntime"]
    assert requirements[0].specifier.contains("1.26.4")
    assert requirements[0].specifier.contains("2.4.6")


def requirements() -> list[Requirement]:
    groups = [project()["dependencies"], *project()["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-lowest.txt"])
def test_every_requirement_has_a_pin_that_satisfies_it(file: str) -> None:
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert requirement.specifier.contains(pins(file)[name]), requirement


def test_the_lowest_pins_are_the_lower_bounds() -> None:
    lowest = pins("constraints-lowest.txt")
    for requirement in requirements():
        bounds = [Version(s.version) for s in requirement.specifier if s.operator in (">=", "==")]
        assert bounds, f"{requirement} has no lower bound"
        assert lowest[canonicalize_name(requirement.name)] == max(bounds), requirement


def test_every_upper_bound_has_a_reason() -> None:
    for line in (ROOT / "pyproject.toml").read_text().splitlines():
        if re.match(r'\s+"[\w.\[\]-]+[^"]*(<|==)', line):
            assert "#" in line, line


def test_the_dependencies_page_names_every_direct_dependency() -> None:
    rows = re.findall(r"^\| `([\w.-]+)`", (ROOT / "docs/dependencies.md").read_text(), re.MULTILINE)
    names = {canonicalize_name(requirement.name) for requirement in requirements()}
    assert {canonicalize_name(row) for row in rows} == names


def test_the_tested_pythons_are_declared() -> None:
    script = (ROOT / "scripts" / "install").read_text()
    (versions,) = re.findall(r"^pythons=\((.+?)\)", script, re.MULTILINE)
    prefix = "Programming Language :: Python :: "
    declared = {line.removeprefix(prefix) for line in project()["classifiers"]}
    assert declared >= set(versions.split())
    assert project()["requires-python"] == f">={versions.split()[0]}"
    assert versions.split() == [f"{major}.{minor}" for major, minor in doctor.PYTHONS]


def test_install_builds_the_declared_horovod() -> None:
    script = (ROOT / "scripts" / "build_horovod").read_text()
    (version,) = re.findall(r'^VERSION = "(.+)"$', script, re.MULTILINE)
    assert Version(version) == pins()["horovod"]
    assert f"horovod=={version}" in project()["optional-dependencies"]["train"]


def test_help_of_install_names_every_option(tmp_path: Path) -> None:
    code, out, err = install(tmp_path, "--help")
    assert (code, err) == (0, "")
    options = ("--extras", "--slim", "--cuda", "--wheel", "--lowest")
    for word in (*options, "PYTHON", "HVDREC_VENV", "HVDREC_CACHE"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["--fast"],
            "unknown argument '--fast'; known: [--extras LIST, --slim, --cuda, --wheel PATH, "
            "--lowest, --help]",
        ),
        (["--extras"], "--extras needs a list, e.g. --extras train,dev"),
        (["--wheel"], "--wheel needs the path of a wheel of Horovod"),
        (
            ["--extras", "train dev"],
            "--extras 'train dev': must be names separated by commas, e.g. train,dev",
        ),
        (
            ["--extras=train,gpu"],
            "unknown extra 'gpu'; known: [delta, dev, docs, fbgemm, iceberg, index, mlflow, redis, "
            "s3, serve, spark, tensorboard, train]",
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
        "scripts/install: PYTHON=/bin/false: not a Python 3.11, 3.12 or 3.13",
        "  remedy: unset PYTHON, or set it to the path of a Python 3.11, 3.12 or 3.13",
    ]


def test_install_reports_a_missing_compiler_before_it_downloads_anything(tmp_path: Path) -> None:
    code, out, err = install(tmp_path, CXX="no-such-compiler")
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        "scripts/install: no C++ compiler (no-such-compiler), which builds Horovod",
        "  remedy: apt-get install g++",
        "  remedy: or set CXX to the path of a compiler",
    ]


def test_install_refuses_another_wheel_before_it_downloads_anything(tmp_path: Path) -> None:
    wheel = tmp_path / "horovod-0.28.1-cp39-cp39-linux_x86_64.whl"
    wheel.write_bytes(b"")
    code, out, err = install(tmp_path, "--wheel", str(wheel))
    assert (code, out) == (1, "")
    problem, remedy = err.splitlines()
    assert problem.startswith(f"scripts/install: {wheel} was built for Python cp39; this Python is")
    assert "remedy" in remedy
    assert not any((tmp_path / "venv").iterdir())


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
        "spark serving two-hosts slow hosts\n"
    )


@pytest.mark.parametrize("name", ["scripts/install", "scripts/test", ".ci/run"])
def test_scripts_are_executable(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
