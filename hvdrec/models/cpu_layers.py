"""Faster CPU versions of the model's layers for training, and the switch between them.

The switch is `use_cpu_layers`. "plain" computes with torch's public layers. The other choices use
private torch operators, which no other module uses. They apply only to training on a CPU;
evaluation and GPUs always use plain layers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

CpuLayers = Literal["plain", "fused", "onednn"]
"""plain: torch's public layers. fused: linear layers that include bias and ReLU, in MLPs without
dropout. onednn: oneDNN's tensor layout, in MLPs with large float32 batches. fused and onednn draw
dropout masks from 16 random bits per element."""

MIN_ONEDNN_WORK = 100_000_000
"""An MLP whose forward pass takes fewer multiplications gains nothing from oneDNN's layout."""

ALIGNMENT = 16
"""Input widths are padded to a multiple of this; other widths slow matrix products by a fifth."""

DROPOUT_STEPS = 1 << 16
"""Fast dropout rounds its rate to a multiple of 1 / DROPOUT_STEPS."""


class HasCpuLayers(nn.Module):
    """A module with a faster version for CPUs; `cpu_layers` chooses it."""

    cpu_layers: CpuLayers = "plain"


def use_cpu_layers(model: nn.Module, choice: CpuLayers) -> None:
    """Choose for all layers of a model how a CPU computes them in training."""
    for module in model.modules():
        if isinstance(module, HasCpuLayers):
            module.cpu_layers = choice
    if choice != "plain" and _has_onednn():
        _works(choice)


def vendor_cpu_layers(*, bf16: bool) -> CpuLayers:
    """Return the layers that were fastest on CPUs of this vendor in our measurements.

    MKL uses its fastest float32 matrix products on Intel's CPUs only. On AMD's Zen 4, the products
    of oneDNN are a fifth faster than MKL's.
    """
    return "fused" if bf16 or _is_intel() else "onednn"


@cache
def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@cache
def _works(choice: CpuLayers) -> bool:
    """Return True if a small step with these layers gives the right result; else log a warning.

    The private operators of a choice may be missing in a version of torch, or have other arguments.
    """
    # skip_init draws no random numbers, so the check does not change later results.
    linear: list[nn.Linear] = [
        skip_init(nn.Linear, *widths)  # type: ignore[no-untyped-call]
        for widths in ((ALIGNMENT, 3), (3, 2))
    ]
    layers = nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.ReLU())
    inputs = torch.linspace(-1, 1, 2 * ALIGNMENT).view(2, ALIGNMENT)
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for weight in layers.parameters():
            nn.init.ones_(weight)
        expected = _step(layers, layers(inputs))
        try:
            if choice == "fused":
                found = _step(layers, _run_fused(linear, torch.float32, [inputs]))
            else:
                found = _step(layers, _run_onednn(layers, inputs))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        except Exception as error:  # any exception means that this version of torch differs
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            _warn(choice, reason)
            return False
    return True


def _warn(choice: CpuLayers, reason: str) -> None:
    logging.getLogger(__name__).warning(
        "torch %s does not run %s layers (%s): MLPs use plain layers",
        torch.__version__,
        choice,
        reason,
    )


def _step(layers: nn.Module, out: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out.sum(), list(layers.parameters()))]


def _has_onednn() -> bool:
    is_built = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(is_built and torch.backends.mkldnn.enabled)


@cache
def _has_bf16_products() -> bool:
    """Return True if oneDNN computes in bf16 on this CPU; log a warning if torch cannot tell."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        _warn("fused", "mkldnn::_is_mkldnn_bf16_supported is missing")
        return False


def run_mlp(layers: nn.Sequential, choice: CpuLayers, parts: Sequence[Tensor]) -> Tensor:
    """Run the layers of an MLP on inputs that are given as a sequence of blocks of columns."""
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if not linear or not layers.training or parts[0].device.type != "cpu":
        choice = "plain"
    if choice == "fused":
        parts = pieces(parts)
        if (dtype := _fused_dtype(layers, linear[0], parts)) is not None:
            return _run_fused(linear, dtype, parts)
    hidden = joined(parts)
    if choice == "onednn" and _suits_onednn(linear, hidden):
        return _run_onednn(layers, hidden)
    for layer in layers:
        hidden = layer(hidden)
    return hidden


def _fused_dtype(
    layers: nn.Sequential, first: nn.Linear, parts: Sequence[Tensor]
) -> torch.dtype | None:
    """Return the dtype in which the fused layers run, or None if plain layers must run."""
    if any(isinstance(layer, nn.Dropout) for layer in layers):
        return None
    if not (_has_onednn() and _works("fused")):
        return None
    if torch.is_autocast_enabled("cpu"):
        is_bf16 = torch.get_autocast_dtype("cpu") is torch.bfloat16
        return torch.bfloat16 if is_bf16 and _has_bf16_products() else None
    is_float32 = all(tensor.dtype is torch.float32 for tensor in (first.weight, *parts))
    return torch.float32 if is_float32 else None


def _run_fused(linear: list[nn.Linear], dtype: torch.dtype, parts: Sequence[Tensor]) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        for layer in linear:
            out: Tensor = _LinearRelu.apply(  # type: ignore[no-untyped-call]
                dtype, layer is not linear[-1], layer.weight, layer.bias, *parts
            )
            parts = [out]
    return out


class _LinearRelu(torch.autograd.Function):
    """Compute relu(x W^T + b) in bf16 or float32; x is given as a sequence of blocks of columns.

    Weights [out, width], biases [out] and their gradients are float32. The blocks of x are copied
    into one matrix of dtype `dtype`. One operator computes product, bias and ReLU: as a separate
    pass, ReLU took a sixth of the forward pass in bf16 on a CPU with matrix units (AMX).
    `is_inner` says that another such layer follows. Only this layer reads the gradient which the
    following layer returns, so the backward pass overwrites that gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, is_inner: bool, weight: Tensor, bias: Tensor, *parts: Tensor
    ) -> Tensor:
        width = weight.shape[1]
        padding = -width % ALIGNMENT
        if len(parts) == 1 and parts[0].dtype is dtype and not padding:
            inputs = parts[0]
        else:
            inputs = parts[0].new_empty(len(parts[0]), width + padding, dtype=dtype)
            inputs[:, width:] = 0
            blocks = torch.split(inputs[:, :width], [part.shape[1] for part in parts], 1)
            for block, part in zip(blocks, parts, strict=True):
                block.copy_(part)
        matrix = functional.pad(weight.to(dtype), (0, padding)) if padding else weight.to(dtype)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, matrix, bias.to(dtype), "relu", [], ""
        )
        ctx.is_inner, ctx.parts = is_inner, [(part.shape[1], part.dtype) for part in parts]
        ctx.save_for_backward(inputs, matrix, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, matrix, out = ctx.saved_tensors
        gradient = gradients[0]
        if ctx.is_inner:
            torch.ops.aten.threshold_backward.grad_input(gradient, out, 0, grad_input=gradient)
        else:
            gradient = torch.ops.aten.threshold_backward(gradient, out, 0)
        part_gradients: list[Tensor | None] = []
        start = 0
        for (width, dtype), is_needed in zip(ctx.parts, ctx.needs_input_grad[4:], strict=True):
            columns = matrix[:, start : start + width]
            part_gradients.append(gradient.mm(columns).to(dtype) if is_needed else None)
            start += width
        weight_gradient = gradient.t().mm(inputs)[:, :start].float()
        return None, None, weight_gradient, gradient.sum(0).float(), *part_gradients


def _suits_onednn(linear: list[nn.Linear], inputs: Tensor) -> bool:
    work = inputs.shape[0] * sum(layer.in_features * layer.out_features for layer in linear)
    return bool(
        inputs.dtype is torch.float32
        and work >= MIN_ONEDNN_WORK
        and not torch.is_autocast_enabled("cpu")
        and _has_onednn()
        and _works("onednn")
    )


def _run_onednn(layers: nn.Sequential, inputs: Tensor) -> Tensor:
    if any(isinstance(layer, nn.Dropout) for layer in layers):
        # Dropout has no oneDNN kernel, so only the linear layers run in oneDNN's layout.
        hidden = inputs
        for layer in layers:
            is_linear = isinstance(layer, nn.Linear)
            hidden = layer(hidden.to_mkldnn()).to_dense() if is_linear else layer(hidden)
        return hidden
    hidden = inputs.to_mkldnn()
    for layer in layers:
        hidden = layer(hidden)
    dense: Tensor = hidden.to_dense()
    return dense


class Dropout(HasCpuLayers, nn.Dropout):
    """nn.Dropout that can draw its masks faster on a CPU.

    On a CPU, torch draws one random number after the other, which took a fifth of a ranking model's
    step. A fast mask takes 16 random bits per element. Its seed comes from torch's default
    generator, so ``torch.manual_seed`` fixes fast and plain masks.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of an input of any shape."""
        if not self._is_fast(input):
            return super().forward(input)
        mask, scale = _dropout_mask(input, self.p)
        return input.mul(mask).mul_(scale)

    def _is_fast(self, input: Tensor) -> bool:
        is_on = self.training and self.p > 0 and self.cpu_layers != "plain"
        return is_on and input.device.type == "cpu"


class ReluDropout(Dropout):
    """ReLU followed by dropout; the fast version stores only its output for the backward pass."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply ReLU and drop elements of an input of any shape."""
        if not self._is_fast(input):
            return super().forward(functional.relu(input))
        out: Tensor = _ReluDropout.apply(input, self.p)  # type: ignore[no-untyped-call]
        return out


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, rate: float) -> Tensor:
        mask, ctx.scale = _dropout_mask(inputs, rate)
        out = inputs.relu().mul_(mask).mul_(ctx.scale)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # The output is positive exactly where the input is positive and the mask keeps it.
        (out,) = ctx.saved_tensors
        gradient: Tensor = torch.ops.aten.threshold_backward(gradients[0], out, 0)
        return gradient.mul_(ctx.scale), None


def _dropout_mask(like: Tensor, rate: float) -> tuple[Tensor, float]:
    """Return a random bool mask of the elements to keep, and the factor that scales them."""
    dropped = min(round(rate * DROPOUT_STEPS), DROPOUT_STEPS - 1)
    count = math.prod(like.shape)
    seed = int(torch.randint(2**62, ()))
    bits: Any = np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.int16)
    mask = torch.from_numpy(bits[:count]).view(like.shape) >= dropped - DROPOUT_STEPS // 2
    return mask, DROPOUT_STEPS / (DROPOUT_STEPS - dropped)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate blocks of columns, each [rows, its width], without a copy if possible.

    No copy is needed if the blocks, in their order, are views of all columns of one matrix.
    """
    merged = pieces(parts)
    return torch.cat(merged, dim=-1) if len(merged) > 1 else merged[0]


def pieces(parts: Sequence[Tensor]) -> list[Tensor]:
    """Replace consecutive blocks that cover all columns of a matrix by it; drop empty blocks."""
    blocks = [part for part in parts if part.shape[1]] or list(parts[:1])
    if torch.compiler.is_compiling():
        return blocks
    merged: list[Tensor] = []
    start = 0
    while start < len(blocks):
        matrix, count = _whole_matrix(blocks, start) or (blocks[start], 1)
        merged.append(matrix)
        start += count
    return merged


def _whole_matrix(blocks: list[Tensor], start: int) -> tuple[Tensor, int] | None:
    """Return the matrix that the next blocks cover and the number of these blocks, or None."""
    matrix: Tensor | None = getattr(blocks[start], "_base", None)
    if matrix is None or matrix.dim() != 2 or matrix.shape[0] != blocks[start].shape[0]:
        return None
    column, count = 0, 0
    for block in blocks[start:]:
        if column == matrix.shape[1]:
            break
        is_next = (
            block._base is matrix
            and block.requires_grad == matrix.requires_grad
            and block.storage_offset() == matrix.storage_offset() + column
            and block.stride(0) == matrix.stride(0)
            and (block.shape[1] == 1 or block.stride(1) == matrix.stride(1) == 1)
        )
        if not is_next:
            return None
        column, count = column + block.shape[1], count + 1
    return (matrix, count) if column == matrix.shape[1] else None
