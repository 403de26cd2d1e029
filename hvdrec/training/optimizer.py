"""The optimizer of the dense weights, its learning rate schedule, and its state as tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hvdrec.config.sections import Train


def make_optimizer(model: nn.Module, train: Train) -> torch.optim.AdamW:
    """Create AdamW for the dense parameters; only matrices have weight decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=train.learning_rate, fused=True
    )


def schedule(train: Train, step: int, progress: float) -> float:
    """Return the factor, in [0, 1], by which the learning rates are multiplied in a step.

    Args:
        train: The ``[train]`` section; a ``warmup_steps`` that is still "auto" counts as 0.
        step: Number of steps since the start of training.
        progress: Share of the rows of all epochs that were read before this step, in [0, 1]. After
            the warm-up, the factor depends on this share only, not on the number of ranks.
    """
    steps = 0 if train.warmup_steps == "auto" else train.warmup_steps
    warmup = min(1.0, (step + 1) / steps) if steps else 1.0
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
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of the optimizer: ``PARAMETER/STATE`` -> tensor."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Load the result of `optimizer_tensors` into an optimizer."""
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameter_name, key = name.rsplit("/", 1)
        parameter = parameters[parameter_name]
        # A fused optimizer needs even the step counter on the device of the parameter.
        optimizer.state[parameter][key] = value.to(parameter.device, copy=True)
