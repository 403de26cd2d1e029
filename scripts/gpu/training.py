"""Train the benchmarks' work (a) on a device: speed, use of the GPU, and where the time goes."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from shares import covered, gpu_figures, shares_of_time
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from ours import endless, trained
from work import config_a, table_sizes, write_work_a

from hvdrec.config import Config
from hvdrec.embeddings import sharded
from hvdrec.parallel import gradients, ranks
from hvdrec.training.machine import no_gc_pauses
from hvdrec.training.state import TrainState
from hvdrec.training.step import take_step

SEAL = "complete"
ROWS = {"cuda": 1_000_000, "cpu": 10_000}
"""Rows of each of the eight tables."""
WARMUP, PROFILED, TOP = 20, 10, 8
SAMPLE_MS = 100


def work_a(folder: Path, device: torch.device) -> Config:
    """Return the configuration of work (a); write its data on the first call."""
    data = folder / "work_a"
    if not (data / SEAL).is_file():
        shutil.rmtree(data, ignore_errors=True)
        write_work_a(data, ROWS[device.type])
        (data / SEAL).touch()
    config = config_a(data)
    return replace(config, train=replace(config.train, device=device.type))


def measure(folder: Path, device: torch.device, precision: str, seconds: float) -> dict[str, Any]:
    """Train work (a) for some seconds, and a few more steps under the profiler.

    Args:
        folder: Directory of the data.
        device: Device to train on.
        precision: ``fp32`` or ``bf16``.
        seconds: How long to measure.

    Returns:
        Samples per second of all ranks, and this rank's shares of time.
    """
    world = ranks.current()
    if world.is_first:
        work_a(folder, device)
    ranks.barrier()
    config = work_a(folder, device)
    placement = "sharded" if world.size > 1 else "auto"
    config = replace(
        config,
        train=replace(config.train, precision=precision),
        parallel=replace(config.parallel, placement=placement),
    )
    sizes = table_sizes(folder / "work_a")
    threads = max(1, torch.get_num_threads() // world.size)
    state, loader = trained(config, sizes, threads, world, device)
    state.model.train()
    with contextlib.closing(endless(state, loader)) as batches, no_gc_pauses():
        take_steps(state, batches, 0, WARMUP)
        began = time.perf_counter()
        take_steps(state, batches, WARMUP, WARMUP)
        count = max(PROFILED, round(seconds / (time.perf_counter() - began) * WARMUP))
        count = ranks.broadcast_object(count)  # ranks must agree on the number of steps
        waited = loader.waited_seconds
        with waits() as exchanged, gpu_use(device) as samples:
            began = time.perf_counter()
            rows, loss = take_steps(state, batches, 2 * WARMUP, count)
            wall = time.perf_counter() - began
        waited = loader.waited_seconds - waited
        busy, operations = profiled(state, batches, 2 * WARMUP + count)
    speeds = ranks.gather_objects(rows / wall)
    shares = shares_of_time(wall, waited, sum(exchanged), busy if device.type == "cuda" else None)
    return {
        "samples_per_second": sum(speeds),
        "ranks": world.size,
        "precision": precision,
        "steps": count,
        "milliseconds_per_step": 1000 * wall / count,
        "loss": loss,
        "shares_of_time": shares,
        "nvidia_smi": gpu_figures(samples),
        "operations": operations,
    }


def take_steps(
    state: TrainState, batches: Iterator[Any], number: int, count: int
) -> tuple[int, float]:
    """Take some steps; return the number of rows and the last loss, which waits for the device."""
    rows = 0
    for offset in range(count):
        step = next(batches)
        loss = take_step(state, step, number + offset, 0.0).total
        rows += step.batch.rows
    return rows, float(loss)


@contextlib.contextmanager
def waits() -> Iterator[list[float]]:
    """Yield a list that gets the seconds of each wait for a collective in the ``with`` body."""
    found: list[float] = []
    original = ranks.wait

    def timed(handle: int) -> Any:
        began = time.perf_counter()
        try:
            return original(handle)
        finally:
            found.append(time.perf_counter() - began)

    modules: Sequence[Any] = (ranks, sharded, gradients)
    for module in modules:
        module.wait = timed
    try:
        yield found
    finally:
        for module in modules:
            module.wait = original


@contextlib.contextmanager
def gpu_use(device: torch.device) -> Iterator[list[str]]:
    """Yield a list that gets nvidia-smi's lines of utilization and memory of the ``with`` body."""
    lines: list[str] = []
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        yield lines
        return
    command = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", f"-lms={SAMPLE_MS}"]
    command += ["--format=csv,noheader,nounits", f"--id={device.index or 0}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield lines
    finally:
        process.terminate()
        lines.extend((process.communicate()[0] or "").splitlines())


def profiled(
    state: TrainState, batches: Iterator[Any], number: int
) -> tuple[float, dict[str, float]]:
    """Profile a few steps: the share of time with a running kernel, and the longest operations.

    Returns:
        The share of the wall time, and milliseconds per step by name of the operation (on a GPU:
        of the kernel).
    """
    is_cuda = state.tables.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_cuda
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        take_steps(state, batches, number, PROFILED)
        wall = time.perf_counter() - began
    spent: dict[str, float] = {}
    if is_cuda:
        kernels = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
        for event in kernels:
            name = event.name[:60]
            spent[name] = spent.get(name, 0.0) + event.time_range.elapsed_us() / 1000 / PROFILED
        busy = covered([(e.time_range.start, e.time_range.end) for e in kernels]) / 1e6 / wall
    else:
        for each in profiler.key_averages():
            spent[each.key] = each.self_cpu_time_total / 1000 / PROFILED
        busy = 1.0
    longest = sorted(spent.items(), key=lambda item: -item[1])[:TOP]
    return busy, {name: round(value, 3) for name, value in longest}
