"""Choose settings that the configuration leaves open, from the data and the machine."""

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
    """Choose values for open settings: batch size, warm-up, patience, precision and CPU layers.

    A run that goes on from a checkpoint keeps the values that the checkpoint recorded, except for
    patience. The chosen values depend only on the arguments and the type of CPU or GPU, so equal
    runs on equal machines give equal results.

    Args:
        train: The ``[train]`` section.
        rows: Number of rows of the training split.
        device: Device on which the run computes.
        recorded: ``[train]`` section of the checkpoint from which the run resumes or starts; None
            if there is no such checkpoint.
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
    """Return the largest power of two with which an epoch of `rows` rows has at least 50 steps.

    The result is at least 64 and at most 8192. So with few rows, an epoch has fewer than 50 steps.
    """
    most = rows // STEPS_PER_EPOCH
    return min(LARGEST_BATCH, max(SMALLEST_BATCH, 1 << max(0, most.bit_length() - 1)))


def _cpu_layers(
    train: Train, precision: str, device: torch.device, recorded: Mapping[str, Any]
) -> CpuLayers:
    """Return ``train.cpu_layers``: as configured, else as recorded, else the vendor's default."""
    if train.cpu_layers != "auto":
        return train.cpu_layers
    if device.type != "cpu":
        return "plain"
    before: Literal["auto"] | CpuLayers = recorded.get("cpu_layers", "auto")
    return vendor_cpu_layers(bf16=precision == "bf16") if before == "auto" else before
