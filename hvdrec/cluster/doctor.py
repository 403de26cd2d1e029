"""Check this machine: installed packages, Horovod's build, launchers, GPUs, memory, compiler."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hvdrec import __version__

Status = Literal["ok", "warning", "problem"]

INSTALL = "run scripts/install"
PYTHONS = ((3, 11), (3, 12), (3, 13))
"""Versions of Python with which hvdrec was tested."""
TRAINING_PACKAGES = ("torch", "horovod", "petastorm", "pyarrow")
MIN_MEMORY_GIB = 4.0
"""With less memory, training with hvdrec's own recipes may run out of memory."""
NVIDIA_DEVICE = Path("/dev/nvidiactl")
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Check:
    """The result of one check; `remedy` is empty if the status is ok."""

    name: str
    value: str
    status: Status = "ok"
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """The results of all checks."""

    checks: tuple[Check, ...]

    @property
    def exit_status(self) -> int:
        """1 if there is a problem, else 0; warnings are not problems."""
        return int(any(check.status == "problem" for check in self.checks))

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON: ``{"ok": bool, "checks": [{name, value, ...}]}``."""
        return {"ok": self.exit_status == 0, "checks": [asdict(check) for check in self.checks]}


def diagnose() -> Report:
    """Check this machine. Changes nothing and raises no error."""
    versions = {name: _version(name) for name in ("numpy", "onnxruntime", *TRAINING_PACKAGES)}
    horovod = versions["horovod"]
    horovod_checks, has_nccl = _horovod(horovod)
    mpirun = shutil.which("mpirun")
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")
    horovodrun = shutil.which("horovodrun", path=str(Path(sys.executable).parent))
    return Report(
        (
            python_check(sys.version_info[:3]),
            Check("hvdrec", __version__),
            scoring_check("numpy", versions["numpy"]),
            scoring_check("onnxruntime", versions["onnxruntime"]),
            *training_checks(versions),
            *horovod_checks,
            mpirun_check(mpirun, _first_line(mpirun), horovod),
            *(root_check(os.geteuid() == 0, os.environ) if mpirun else []),
            horovodrun_check(shutil.which("horovodrun"), horovodrun, horovod),
            gpu_check(*_gpus(versions["torch"]), has_nccl),
            Check("cores", str(len(os.sched_getaffinity(0)))),
            memory_check(_memory_gib()),
            compiler_check(compiler, _first_line(compiler), horovod),
        )
    )


def python_check(version: Sequence[int]) -> Check:
    """Check the version of Python: it should be one with which hvdrec was tested."""
    text = ".".join(map(str, version))
    known = ", ".join(f"{major}.{minor}" for major, minor in PYTHONS)
    if tuple(version[:2]) < PYTHONS[0]:
        return Check("python", text, "problem", f"use one of Python {known}")
    if tuple(version[:2]) not in PYTHONS:
        return Check("python", text, "warning", f"tested with {known}; use one of them")
    return Check("python", text)


def scoring_check(name: str, version: str | None) -> Check:
    """Check a package that scoring needs."""
    if version is None:
        return Check(name, "not installed", "problem", f"pip install {name}")
    return Check(name, version)


def training_checks(versions: Mapping[str, str | None]) -> list[Check]:
    """Check the packages that training needs; an installation only for scoring has none of them."""
    missing: tuple[Status, str] = ("problem", INSTALL)
    if all(versions[name] is None for name in TRAINING_PACKAGES):
        missing = ("warning", f"scoring does not need it; for training {INSTALL}")
    return [
        Check(name, version) if version else Check(name, "not installed", *missing)
        for name in TRAINING_PACKAGES
        for version in [versions[name]]
    ]


def transport_checks(mpi: bool, gloo: bool, nccl: bool) -> list[Check]:
    """Check the transports that Horovod was built with: MPI or Gloo; NCCL is only for GPUs."""
    status: Status = "warning" if mpi or gloo else "problem"
    checks = []
    for name, is_built, launcher in (("MPI", mpi, "mpirun"), ("Gloo", gloo, "horovodrun --gloo")):
        label, remedy = f"horovod with {name}", f"{launcher} will not work; build Horovod again: "
        if is_built:
            checks.append(Check(label, "built"))
        else:
            checks.append(Check(label, "not built", status, remedy + INSTALL))
    return [*checks, Check("horovod with NCCL", "built" if nccl else "not built")]


def mpirun_check(path: str | None, version: str, horovod: str | None) -> Check:
    """Check mpirun, given the first line of ``mpirun --version``; Open MPI 5 does not work."""
    if path is None:
        if horovod is None:
            return Check("mpirun", "not found (only training needs it)")
        return Check("mpirun", "not found on PATH", "warning", _activate())
    value = f"{path}: {version}"
    open_mpi = re.search(r"\(Open MPI\) (\d+)\.", version)
    if open_mpi is None:
        remedy = f"only Open MPI 4.1 is tested: put it first on PATH ({_activate()})"
        return Check("mpirun", value, "warning", remedy)
    if int(open_mpi[1]) >= 5:
        remedy = "horovodrun --mpi fails with Open MPI 5: put Open MPI 4.1 first on PATH"
        return Check("mpirun", value, "problem", f"{remedy} ({_activate()})")
    return Check("mpirun", value)


def root_check(is_root: bool, environment: Mapping[str, str]) -> list[Check]:
    """If this user is root, check that mpirun accepts root without an option."""
    names = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
    if not is_root:
        return []
    if all(environment.get(name) == "1" for name in names):
        return [Check("mpirun as root", "allowed")]
    remedy = f"export {names[0]}=1 {names[1]}=1, or call mpirun --allow-run-as-root"
    return [Check("mpirun as root", "refused by Open MPI", "warning", remedy)]


def horovodrun_check(on_path: str | None, installed: str | None, horovod: str | None) -> Check:
    """Check that the first horovodrun on PATH is the one installed beside this Python."""
    name = "horovodrun"
    if on_path is None and installed is not None:
        return Check(name, f"{installed}, not on PATH", "warning", _activate())
    if on_path is None and horovod is None:
        return Check(name, "not found (only training needs it)")
    if on_path is None:
        return Check(name, "not found", "problem", INSTALL)
    if installed is not None and Path(on_path).resolve() != Path(installed).resolve():
        return Check(name, f"{on_path} is from another environment", "problem", _activate())
    return Check(name, on_path)


def gpu_check(names: Sequence[str], is_unused: bool, has_nccl: bool) -> Check:
    """Check that torch and Horovod can use the GPUs; `is_unused` if torch sees none of them."""
    if names:
        value = ", ".join(f"{index}: {name}" for index, name in enumerate(names))
        if has_nccl:
            return Check("GPUs", value)
        remedy = "Horovod has no NCCL, so ranks exchange data through main memory: "
        return Check("GPUs", value, "warning", f"{remedy}{INSTALL} --cuda")
    if is_unused:
        remedy = f"install the CUDA build of torch, then {INSTALL} --cuda"
        return Check(
            "GPUs", "present, but the installed torch does not use them", "warning", remedy
        )
    return Check("GPUs", "none")


def memory_check(gib: float | None) -> Check:
    """Check the memory that this process may use, in GiB (None if unknown)."""
    if gib is None:
        return Check("memory", "unknown")
    if gib < MIN_MEMORY_GIB:
        remedy = f"less than {MIN_MEMORY_GIB:g} GiB: use fewer ranks and smaller batches"
        return Check("memory", f"{gib:.1f} GiB", "warning", remedy)
    return Check("memory", f"{gib:.1f} GiB")


def compiler_check(path: str | None, version: str, horovod: str | None) -> Check:
    """Check the C++ compiler, which is only needed to build Horovod."""
    if path is not None:
        return Check("C++ compiler", f"{path}: {version}")
    if horovod is not None:
        return Check("C++ compiler", "not found (Horovod is already built)")
    remedy = "only needed to build Horovod for training: apt-get install g++, or set CXX"
    return Check("C++ compiler", "not found", "warning", remedy)


def horovod_transports() -> tuple[bool, bool, bool]:
    """Return three booleans: whether Horovod was built with MPI, Gloo and NCCL.

    Raises:
        ImportError: Horovod was not built for the installed torch.
        OSError: A library to which Horovod is linked is missing.
    """
    import horovod.torch as hvd

    return bool(hvd.mpi_built()), bool(hvd.gloo_built()), bool(hvd.nccl_built())


def _horovod(version: str | None) -> tuple[list[Check], bool]:
    if version is None:
        return [], False
    try:
        mpi, gloo, nccl = horovod_transports()
    except Exception as error:  # a broken extension may raise anything
        remedy = f"it was built for another torch or MPI: {INSTALL}"
        return [Check("horovod for torch", _one_line(error), "problem", remedy)], False
    return transport_checks(mpi, gloo, nccl), nccl


def _gpus(torch_version: str | None) -> tuple[list[str], bool]:
    """Return the names of the GPUs that torch sees; True if there are GPUs but torch sees none."""
    has_device = NVIDIA_DEVICE.exists()
    if torch_version is None:
        return [], False
    try:
        import torch

        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except Exception:  # Horovod's check reports a broken torch
        return [], has_device
    return names, has_device and not names


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(program: str | None) -> str:
    """Return the first line that ``program --version`` prints."""
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return _one_line(error)
    output = (done.stdout or done.stderr).strip()
    return output.splitlines()[0] if output else "prints no version"


def _activate() -> str:
    return f"source {Path(sys.prefix) / 'bin' / 'activate'}"


def _memory_gib() -> float | None:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None
    with contextlib.suppress(OSError, ValueError):  # no control group, or no limit: "max"
        size = min(size, int(CONTAINER_LIMIT.read_text()))
    return size / 2**30


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
