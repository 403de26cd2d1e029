"""The optimizer, its learning rate over time, and its state as named tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hvdrec.config.sections import Train


def make_optimizer(model: nn.Module, train: Train) -> torch.optim.AdamW:
    """Return AdamW over the model's dense parameters, of which only matrices are decayed."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=train.learning_rate, fused=True
    )


def schedule(train: Train, step: int, progress: float) -> float:
    """Return the share of the peak learning rates that a step takes.

    step: 0-based, since the start of training; progress: share in [0, 1] of all epochs' rows that
    were seen before it (so that the schedule does not depend on the number of ranks).
    """
    warmup = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
    left = 1.0 - min(max(progress, 0.0), 1.0)
    match train.schedule:
        case "constant":
            fall = 1.0
        case "linear":
            fall = left
        case "cosine":
            fall = 0.5 * (1.0 - math.cos(math.pi * left))
    return warmup * (train.schedule_end + (1.0 - train.schedule_end) * fall)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors named ``parameter name/state name``."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Put tensors named by `optimizer_tensors` back into the optimizer."""
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameter_name, key = name.rsplit("/", 1)
        parameter = parameters[parameter_name]
        # Step counters stay where they were made; moments live beside their parameter.
        target = value if value.ndim == 0 else value.to(parameter.device)
        optimizer.state[parameter][key] = target.clone()
