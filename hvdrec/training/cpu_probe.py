"""Choose how a CPU computes the model's layers: by hand, as recorded, or by a short probe."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch

from hvdrec.config.sections import Train
from hvdrec.models.cpu_layers import CpuLayers, use_cpu_layers, vendor_cpu_layers
from hvdrec.models.layers import Mlp
from hvdrec.models.recommender import Recommender
from hvdrec.parallel import ranks

MAX_ROUNDS, MIN_ROUNDS, MAX_SECONDS = 15, 5, 3.0
MARGIN, MIN_GAIN_MS = 0.9, 3.0
"""A choice replaces the vendor's default only if it takes less than this share of its wall time and
of its CPU time, and saves this many milliseconds of CPU time. Noise, and gains that nobody notices,
must not change a run's last digits."""

Timings = Mapping[str, Sequence[float]]
"""Choice -> [median wall time, least CPU time of all threads] of a pass, in milliseconds. CPU time
hardly depends on other programs, which a median of few passes does."""


def choose_cpu_layers(
    model: Recommender,
    train: Train,
    rows: int,
    device: torch.device,
    stored: Mapping[str, Any] | None,
) -> tuple[CpuLayers, dict[str, float]]:
    """Choose the CPU layers of a run; every rank must call this together and gets the same answer.

    Args:
        model: The model in training mode, on the CPU.
        train: The ``[train]`` section.
        rows: Rows of a forward pass.
        device: Where the run computes.
        stored: Metadata of the checkpoint that the run resumes from; None for a new run. A
            checkpoint that records no choice is of a version that followed the CPU's vendor.

    Returns:
        The choice, and the wall time of each candidate in milliseconds if a probe ran.
    """
    if train.cpu_layers != "auto":
        return train.cpu_layers, {}
    if device.type != "cpu":
        return "plain", {}
    default = vendor_cpu_layers(bf16=train.precision == "bf16")
    if stored is not None:
        recorded = stored["config"]["train"].get("cpu_layers", "auto")
        return (default if recorded == "auto" else recorded), {}
    timings: dict[str, list[float]] = {}
    if ranks.current().is_first:
        timings = probe_cpu_layers(model, rows, bf16=train.precision == "bf16")
    timings = ranks.broadcast_object(timings)
    return fastest(timings, default), {choice: wall for choice, (wall, _) in timings.items()}


def fastest(timings: Timings, default: CpuLayers) -> CpuLayers:
    """Return the fastest choice, or the default unless another one is clearly faster."""
    choice, best = default, MARGIN
    for name, (wall, cpu) in timings.items():
        default_wall, default_cpu = timings[default]
        share = max(wall / default_wall, cpu / default_cpu)
        if share < best and default_cpu - cpu >= MIN_GAIN_MS:
            choice, best = name, share  # type: ignore[assignment]
    return choice


def probe_cpu_layers(model: Recommender, rows: int, *, bf16: bool) -> dict[str, list[float]]:
    """Time a forward and backward pass through all MLPs of a model with each choice, in turns.

    The random number generators are as before afterwards.

    Returns:
        See `Timings`; empty if the model has no hidden layer.
    """
    mlps = [m for m in model.modules() if isinstance(m, Mlp) and len(m)]
    choices: tuple[CpuLayers, ...] = ("plain", "fused") if bf16 else ("plain", "fused", "onednn")
    if not mlps:
        return {}
    wall: dict[str, list[float]] = {choice: [] for choice in choices}
    cpu: dict[str, list[float]] = {choice: [] for choice in choices}
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        inputs = [torch.randn(rows, mlp.input_width, requires_grad=True) for mlp in mlps]
        for number in range(1 + MAX_ROUNDS):
            for choice in choices:
                use_cpu_layers(model, choice)
                wall_start, cpu_start = time.perf_counter(), time.process_time()
                for mlp, vectors in zip(mlps, inputs, strict=True):
                    out = mlp(vectors)
                    torch.autograd.grad(out, [vectors, *mlp.parameters()], torch.ones_like(out))
                if number > 0:  # the first round allocates memory
                    wall[choice].append(1e3 * (time.perf_counter() - wall_start))
                    cpu[choice].append(1e3 * (time.process_time() - cpu_start))
            if number >= MIN_ROUNDS and time.perf_counter() - started > MAX_SECONDS:
                break
    return {c: [round(median(wall[c]), 3), round(min(cpu[c]), 3)] for c in choices}
