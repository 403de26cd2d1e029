"""Settings that follow the data and the machine where the configuration leaves them open."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from hvdrec.config.sections import Train
from hvdrec.models.cpu_layers import CpuLayers, vendor_cpu_layers
from hvdrec.training.machine import has_bf16

STEPS_PER_EPOCH = 50
SMALLEST_BATCH, LARGEST_BATCH = 64, 8192
LONGEST_WARMUP, WARMUP_SHARE = 100, 0.1
PATIENCE, PATIENCE_SHARE = 2, 0.2


def with_defaults(
    train: Train, rows: int, device: torch.device, recorded: Mapping[str, Any] | None
) -> Train:
    """Fill in what is left open: batch size, warm-up, patience, precision and CPU layers.

    A resumed run keeps what it recorded. The choice depends on nothing but the arguments and the
    type of CPU or GPU, so equal runs on equal machines are equal.

    Args:
        train: The ``[train]`` section.
        rows: Rows of the training split.
        device: Where the run computes.
        recorded: ``[train]`` of the checkpoint that the run resumes from; None for a new run.
    """
    recorded = recorded or {}
    precision: Literal["fp32", "bf16"]
    if train.precision != "auto":
        precision = train.precision
    elif recorded.get("precision", "auto") != "auto":
        precision = recorded["precision"]
    else:
        precision = "bf16" if has_bf16(device, fast=True) else "fp32"
    batch_size = train.batch_size or recorded.get("batch_size") or default_batch_size(rows)
    warmup = train.warmup_steps
    if warmup == "auto":
        warmup = recorded.get("warmup_steps", "auto")
    if warmup == "auto":
        steps = math.ceil(rows / batch_size) * train.epochs
        warmup = min(LONGEST_WARMUP, int(WARMUP_SHARE * steps))
    return replace(
        train,
        batch_size=batch_size,
        warmup_steps=warmup,
        patience=train.patience or max(PATIENCE, math.ceil(PATIENCE_SHARE * train.epochs)),
        precision=precision,
        cpu_layers=_cpu_layers(train, precision, device, recorded),
    )


def default_batch_size(rows: int) -> int:
    """Return the largest power of two, up to 8192, that gives an epoch of `rows` rows 50 steps.

    It is at least 64, so an epoch of few rows has fewer steps.
    """
    most = rows // STEPS_PER_EPOCH
    return min(LARGEST_BATCH, max(SMALLEST_BATCH, 1 << max(0, most.bit_length() - 1)))


def _cpu_layers(
    train: Train, precision: str, device: torch.device, recorded: Mapping[str, Any]
) -> CpuLayers:
    """Return how a CPU computes the layers: as configured, as recorded, or by the CPU's vendor."""
    if train.cpu_layers != "auto":
        return train.cpu_layers
    if device.type != "cpu":
        return "plain"
    before: Literal["auto"] | CpuLayers = recorded.get("cpu_layers", "auto")
    return vendor_cpu_layers(bf16=precision == "bf16") if before == "auto" else before
