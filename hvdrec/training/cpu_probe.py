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

MAX_ROUNDS, MIN_ROUNDS, MAX_SECONDS = 15, 3, 3.0
MARGIN, MIN_GAIN_MS = 0.9, 1.0
"""A choice replaces the vendor's default only if it takes less than this share of its time, in the
median and in the best round, and saves this many milliseconds in the best round. Noise, and gains
that nobody notices, must not change a run's last digits."""


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
        The choice, and the median milliseconds of each candidate if a probe ran.
    """
    if train.cpu_layers != "auto":
        return train.cpu_layers, {}
    if device.type != "cpu":
        return "plain", {}
    default = vendor_cpu_layers(bf16=train.precision == "bf16")
    if stored is not None:
        recorded = stored["config"]["train"].get("cpu_layers", "auto")
        return (default if recorded == "auto" else recorded), {}
    milliseconds: dict[str, list[float]] = {}
    if ranks.current().is_first:
        milliseconds = probe_cpu_layers(model, rows, bf16=train.precision == "bf16")
    milliseconds = ranks.broadcast_object(milliseconds)
    medians = {name: round(median(times), 3) for name, times in milliseconds.items()}
    return fastest(milliseconds, default), medians


def fastest(milliseconds: Mapping[str, Sequence[float]], default: CpuLayers) -> CpuLayers:
    """Return the fastest choice, or the default unless another one is clearly faster."""
    choice, best = default, MARGIN
    for name, times in milliseconds.items():
        of_default = milliseconds[default]
        share = max(median(times) / median(of_default), min(times) / min(of_default))
        if share < best and min(of_default) - min(times) >= MIN_GAIN_MS:
            choice, best = name, share  # type: ignore[assignment]
    return choice


def probe_cpu_layers(model: Recommender, rows: int, *, bf16: bool) -> dict[str, list[float]]:
    """Time a forward and backward pass through all MLPs of a model with each choice, in turns.

    The random number generators are as before afterwards.

    Returns:
        Milliseconds of each round, without the first one; empty if the model has no hidden layer.
    """
    mlps = [m for m in model.modules() if isinstance(m, Mlp) and len(m)]
    choices: tuple[CpuLayers, ...] = ("plain", "fused") if bf16 else ("plain", "fused", "onednn")
    if not mlps:
        return {}
    milliseconds: dict[str, list[float]] = {choice: [] for choice in choices}
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        inputs = [torch.randn(rows, mlp.input_width, requires_grad=True) for mlp in mlps]
        for number in range(1 + MAX_ROUNDS):
            for choice in choices:
                use_cpu_layers(model, choice)
                begin = time.perf_counter()
                for mlp, vectors in zip(mlps, inputs, strict=True):
                    out = mlp(vectors)
                    torch.autograd.grad(out, [vectors, *mlp.parameters()], torch.ones_like(out))
                if number > 0:  # the first round allocates memory
                    milliseconds[choice].append(1e3 * (time.perf_counter() - begin))
            if number >= MIN_ROUNDS and time.perf_counter() - started > MAX_SECONDS:
                break
    return milliseconds
