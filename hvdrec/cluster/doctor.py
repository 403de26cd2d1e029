"""What this machine can do, what is wrong with it, and how to mend it."""

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
TRAINING_PACKAGES = ("torch", "horovod", "petastorm", "pyarrow")
LEAST_MEMORY = 4.0
"""GiB below which training on the configurations that come with hvdrec may run out."""
NVIDIA_DEVICE = Path("/dev/nvidiactl")
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; ``remedy`` is empty where the status is ok."""

    name: str
    value: str
    status: Status = "ok"
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """All that was looked at."""

    checks: tuple[Check, ...]

    @property
    def exit_status(self) -> int:
        """0 where there is no problem (warnings are none), else 1."""
        return int(any(check.status == "problem" for check in self.checks))

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON: ``{"ok": bool, "checks": [{name, value, ...}]}``."""
        return {"ok": self.exit_status == 0, "checks": [asdict(check) for check in self.checks]}

    def render(self) -> str:
        """Return the report for people: a line per check, its remedy on the line below."""
        width = max((len(check.name) for check in self.checks), default=0)
        lines = []
        for check in self.checks:
            lines.append(f"{check.status:<8} {check.name:<{width}}  {check.value}".rstrip())
            if check.remedy:
                lines.append(f"{'':<8} {'':<{width}}  -> {check.remedy}")
        counts = [
            f"{count} {status}{'' if count == 1 else 's'}"
            for status in ("problem", "warning")
            for count in [sum(check.status == status for check in self.checks)]
        ]
        return "\n".join([*lines, "", ", ".join(counts)])


def diagnose() -> Report:
    """Look at this machine and return what was found; nothing is changed and nothing raised."""
    versions = {name: _version(name) for name in ("numpy", "onnxruntime", *TRAINING_PACKAGES)}
    horovod_checks, has_nccl = _horovod(versions["horovod"])
    mpirun, horovodrun = shutil.which("mpirun"), shutil.which("horovodrun")
    return Report(
        (
            python_check(sys.version_info[:3]),
            Check("hvdrec", __version__),
            scoring_check("numpy", versions["numpy"]),
            scoring_check("onnxruntime", versions["onnxruntime"]),
            *training_checks(versions),
            *petastorm_checks(versions),
            *horovod_checks,
            mpirun_check(mpirun, _output(mpirun, "--version"), versions["horovod"]),
            *_as_root(mpirun),
            horovodrun_check(horovodrun, _beside_python("horovodrun"), versions["horovod"]),
            gpu_check(*_gpus(versions["torch"]), has_nccl),
            Check("cores", str(len(os.sched_getaffinity(0)))),
            memory_check(_memory_gib()),
            compiler_check(*_compiler(), versions["horovod"]),
        )
    )


def python_check(version: Sequence[int]) -> Check:
    """Check the version of Python; the pinned training packages are made for 3.11."""
    text = ".".join(map(str, version))
    if tuple(version[:2]) < (3, 11):
        return Check("python", text, "problem", "use Python 3.11")
    if tuple(version[:2]) > (3, 11):
        remedy = "scoring works; for training make the environment with Python 3.11"
        return Check("python", text, "warning", remedy)
    return Check("python", text)


def scoring_check(name: str, version: str | None) -> Check:
    """Check a package that nothing works without."""
    if version is None:
        return Check(name, "not installed", "problem", f"pip install {name}")
    return Check(name, version)


def training_checks(versions: Mapping[str, str | None]) -> list[Check]:
    """Check the packages of training: all there, none there (the slim install), or incomplete."""
    slim = all(versions[name] is None for name in TRAINING_PACKAGES)
    checks = []
    for name in TRAINING_PACKAGES:
        version = versions[name]
        if version is not None:
            checks.append(Check(name, version))
        elif slim:
            remedy = f"scoring does not need it; for training {INSTALL}"
            checks.append(Check(name, "not installed", "warning", remedy))
        else:
            checks.append(Check(name, "not installed", "problem", INSTALL))
    return checks


def petastorm_checks(versions: Mapping[str, str | None]) -> list[Check]:
    """Check petastorm against pyarrow and numpy: it fails with pyarrow 15 and with numpy 2."""
    petastorm = versions["petastorm"]
    checks = []
    for other, limit in (("pyarrow", 15), ("numpy", 2)):
        version = versions[other]
        if petastorm is None or version is None:
            continue
        name, value = f"petastorm with {other}", f"{petastorm} with {version}"
        if _major(version) >= limit:
            remedy = f"petastorm cannot read with {other} {limit} or later: {INSTALL}"
            checks.append(Check(name, value, "problem", remedy))
        else:
            checks.append(Check(name, value))
    return checks


def transport_checks(mpi: bool, gloo: bool, nccl: bool) -> list[Check]:
    """Check what Horovod was built with: one of MPI and Gloo it needs, NCCL is for GPUs."""
    neither = not mpi and not gloo
    checks = []
    for name, built, launcher in (("MPI", mpi, "mpirun"), ("Gloo", gloo, "horovodrun --gloo")):
        label, value = f"horovod with {name}", "built" if built else "not built"
        if built:
            checks.append(Check(label, value))
        else:
            remedy = f"{launcher} will not work; build Horovod again: {INSTALL}"
            checks.append(Check(label, value, "problem" if neither else "warning", remedy))
    checks.append(Check("horovod with NCCL", "built" if nccl else "not built"))
    return checks


def mpirun_check(path: str | None, output: str, horovod: str | None) -> Check:
    """Check which MPI ``mpirun --version`` names; Open MPI 5 breaks ``horovodrun --mpi``."""
    if path is None:
        if horovod is None:
            return Check("mpirun", "not found (only training needs it)")
        return Check("mpirun", "not found on PATH", "warning", _activate())
    first = output.strip().splitlines()[0] if output.strip() else "says no version"
    value = f"{path}: {first}"
    found = re.search(r"\(Open MPI\) (\d+)\.", first)
    if found and int(found[1]) >= 5:
        remedy = "horovodrun --mpi fails with Open MPI 5: put Open MPI 4.1 first on PATH"
        return Check("mpirun", value, "problem", f"{remedy} ({_activate()})")
    if not found:
        remedy = "tried with Open MPI 4.1 only: put that first on PATH"
        return Check("mpirun", value, "warning", f"{remedy} ({_activate()})")
    return Check("mpirun", value)


def root_check(is_root: bool, environment: Mapping[str, str]) -> list[Check]:
    """Check that mpirun, where it is called directly, may run as root; nothing for other users."""
    names = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
    if not is_root:
        return []
    if all(environment.get(name) == "1" for name in names):
        return [Check("mpirun as root", "allowed")]
    remedy = f"export {names[0]}=1 {names[1]}=1, or call mpirun --allow-run-as-root"
    return [Check("mpirun as root", "refused by Open MPI", "warning", remedy)]


def horovodrun_check(on_path: str | None, beside: str | None, horovod: str | None) -> Check:
    """Check that the launcher is there; ``beside`` is the one in the environment of this Python."""
    if on_path is not None:
        if beside is not None and Path(on_path).resolve() != Path(beside).resolve():
            return Check(
                "horovodrun", f"{on_path} is of another environment", "problem", _activate()
            )
        return Check("horovodrun", on_path)
    if beside is not None:
        return Check("horovodrun", f"{beside}, not on PATH", "warning", _activate())
    if horovod is None:
        return Check("horovodrun", "not found (only training needs it)")
    return Check("horovodrun", "not found", "problem", INSTALL)


def gpu_check(names: Sequence[str], is_hidden: bool, has_nccl: bool) -> Check:
    """Check that GPUs are used: ``is_hidden`` where the machine has some that torch cannot use."""
    if names:
        value = ", ".join(f"{index}: {name}" for index, name in enumerate(names))
        if has_nccl:
            return Check("GPUs", value)
        remedy = "Horovod has no NCCL, so ranks exchange through main memory: "
        return Check("GPUs", value, "warning", f"{remedy}{INSTALL} --cuda")
    if is_hidden:
        remedy = f"install the CUDA build of torch, then {INSTALL} --cuda"
        return Check("GPUs", "there, but not used by the installed torch", "warning", remedy)
    return Check("GPUs", "none")


def memory_check(gib: float | None) -> Check:
    """Check the memory that this process may use, in GiB; None where the system does not tell."""
    if gib is None:
        return Check("memory", "unknown")
    if gib < LEAST_MEMORY:
        remedy = f"less than {LEAST_MEMORY:g} GiB: use fewer ranks and smaller batches"
        return Check("memory", f"{gib:.1f} GiB", "warning", remedy)
    return Check("memory", f"{gib:.1f} GiB")


def compiler_check(path: str | None, output: str, horovod: str | None) -> Check:
    """Check the C++ compiler, which is needed only to build Horovod."""
    if path is not None:
        first = output.strip().splitlines()[0] if output.strip() else "says no version"
        return Check("C++ compiler", f"{path}: {first}")
    if horovod is not None:
        return Check("C++ compiler", "not found (Horovod is built already)")
    remedy = "only to build Horovod for training: apt-get install g++, or set CXX"
    return Check("C++ compiler", "not found", "warning", remedy)


def _horovod(version: str | None) -> tuple[list[Check], bool]:
    if version is None:
        return [], False
    try:
        from hvdrec.cluster.build import horovod_build

        build = horovod_build()
    except Exception as error:  # whatever a broken extension raises is what is to be told
        remedy = f"it was built for another torch or MPI: {INSTALL}"
        return [Check("horovod for torch", _one_line(error), "problem", remedy)], False
    return transport_checks(build.mpi, build.gloo, build.nccl), build.nccl


def _gpus(torch_version: str | None) -> tuple[list[str], bool]:
    has_device = NVIDIA_DEVICE.exists()
    if torch_version is None:
        return [], False
    try:
        import torch

        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except Exception:  # a broken torch is reported with Horovod, which needs it
        return [], has_device
    return names, has_device and not names


def _as_root(mpirun: str | None) -> list[Check]:
    return root_check(os.geteuid() == 0, os.environ) if mpirun else []


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _major(version: str) -> int:
    return int(version.split(".", maxsplit=1)[0])


def _output(program: str | None, argument: str) -> str:
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, argument], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return _one_line(error)
    return done.stdout or done.stderr


def _compiler() -> tuple[str | None, str]:
    path = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")
    return path, _output(path, "--version")


def _beside_python(name: str) -> str | None:
    return shutil.which(name, path=str(Path(sys.executable).parent))


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
