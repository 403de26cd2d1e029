"""The part of scripts/gpu_check that takes the installed Horovod, or builds one beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from parts import HOROVOD, ROOT, Outcome, environment_of, run_command, serves

BUILD_HOROVOD = ROOT / "scripts" / "build_horovod"
PROBE = """
import horovod.torch as hvd
print(hvd.mpi_built(), hvd.gloo_built(), hvd.nccl_built() > 0, hvd.cuda_built())
"""


@dataclass(frozen=True)
class Source:
    """Where Horovod comes from: a built wheel, or its source distribution, or the network."""

    wheel: Path | None = None
    sdist: Path | None = None


def provide_horovod(
    out: Path,
    device: str,
    limit: float,
    source: Source,
    several_gpus: bool,
    say: Callable[[str], None],
) -> Outcome:
    """Take the installed Horovod if it serves the device, or unpack one into ``out/horovod``.

    The environment itself does not change.
    """
    target, log = out / HOROVOD, out / f"{HOROVOD}.log"
    environment = environment_of(os.environ, target, is_launched=False)
    started = time.monotonic()
    found = None if source.wheel else probe(environment)
    if found is not None and serves(found, device, several_gpus=several_gpus):
        return Outcome(HOROVOD, "passed", time.monotonic() - started, figures=dict(found))
    wheel = source.wheel
    if wheel is None:
        wheels = out / "wheels"
        shutil.rmtree(wheels, ignore_errors=True)
        command = [sys.executable, str(BUILD_HOROVOD), "wheel", "--to", str(wheels)]
        command += ["--sdist", str(source.sdist)] if source.sdist else []
        if device == "cuda":
            command.append("--cuda" if several_gpus else "--cuda-host")
            environment.setdefault("HOROVOD_BUILD_CUDA_CC_LIST", compute_capability())
        environment.setdefault("HVDREC_CACHE", str(out / "cache"))
        say(f"  building; to follow it: tail -f {log}")
        built = run_command(HOROVOD, command, limit, log, environment, has_figures=False)
        if built.status != "passed":
            return built
        wheel = next(wheels.glob("horovod-*.whl"))
    shutil.rmtree(target, ignore_errors=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    install += ["--target", str(target), str(wheel)]
    done = subprocess.run(install, check=False, capture_output=True, text=True)
    found = probe(environment_of(os.environ, target, is_launched=False))
    seconds = time.monotonic() - started
    if found is None or not serves(found, device, several_gpus=several_gpus):
        lines = done.stderr.strip().splitlines() or [f"does not serve {device}: {found}"]
        problem = f"{wheel}: {lines[-1]}"
        return Outcome(HOROVOD, "failed", seconds, problem)
    return Outcome(HOROVOD, "passed", seconds, figures={**found, "built": not source.wheel})


def probe(environment: Mapping[str, str]) -> dict[str, bool] | None:
    """Return what the Horovod of an environment can do, or None if it cannot be imported."""
    command = [sys.executable, "-W", "ignore", "-c", PROBE]
    done = subprocess.run(
        command, env=dict(environment), capture_output=True, text=True, check=False
    )
    words = done.stdout.split()
    if done.returncode != 0 or len(words) < 4:
        return None
    values = (word == "True" for word in words[-4:])
    return dict(zip(("mpi", "gloo", "nccl", "gpu"), values, strict=True))


def compute_capability() -> str:
    """Return the compute capability of the first GPU, such as ``90``."""
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    return f"{major}{minor}"
