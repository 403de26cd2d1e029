"""Small layers that towers and ranker are made of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hvdrec.models.dropout import ReluDropout

ONEDNN_WORK = 100_000_000
"""Multiplications of a forward pass from which on converting to oneDNN's layout pays."""


class Mlp(nn.Sequential):
    """Linear-ReLU(-dropout) layers: [N, width] -> [N, last of hidden].

    On a CPU training takes the fastest way through them: without dropout `_LinearRelu`, in bf16
    and on Intel's CPUs; else large steps in float32 run in oneDNN's tensor layout, but for Intel's:
    on AMD's Zen 4 its products are a fifth faster than those that torch takes for dense tensors,
    MKL's. The parameters stay as they are, and their names are those of nn.Sequential.
    """

    def __init__(self, width: int, hidden: Sequence[int], dropout: float) -> None:
        layers: list[nn.Module] = []
        widths = [width, *hidden]
        for before, size in pairwise(widths):
            layers.append(nn.Linear(before, size))
            # Each layer has its number, and the parameters their names by it.
            if dropout > 0:
                layers += [nn.Identity(), ReluDropout(dropout)]
            else:
                layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)
        self.output_width = widths[-1]
        self._has_dropout = dropout > 0
        self._products = sum(before * size for before, size in pairwise(widths))

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> Tensor:
        """Map inputs [N, width], which may be given in parts that lie side by side."""
        parts = [inputs] if isinstance(inputs, Tensor) else pieces(inputs)
        if (kind := self._own_layers(parts)) is not None:
            linear = [layer for layer in self if isinstance(layer, nn.Linear)]
            with torch.autocast("cpu", enabled=False):
                for one in linear:
                    out: Tensor = _LinearRelu.apply(  # type: ignore[no-untyped-call]
                        kind, one is not linear[-1], one.weight, one.bias, *parts
                    )
                    parts = [out]
            return out
        hidden = joined(parts)
        if not self._takes_onednn(hidden):
            for layer in self:
                hidden = layer(hidden)
        elif self._has_dropout:
            for layer in self:
                is_linear = isinstance(layer, nn.Linear)
                hidden = layer(hidden.to_mkldnn()).to_dense() if is_linear else layer(hidden)
        else:
            hidden = hidden.to_mkldnn()
            for layer in self:
                hidden = layer(hidden)
            hidden = hidden.to_dense()
        return hidden

    def _own_layers(self, parts: Sequence[Tensor]) -> torch.dtype | None:
        """Return in which type `_LinearRelu` is to compute the layers, or None for torch's own."""
        if self._has_dropout or not self._trains_on_cpu(parts[0]):
            return None
        if torch.is_autocast_enabled("cpu"):
            is_short = torch.get_autocast_dtype("cpu") is torch.bfloat16
            return torch.bfloat16 if is_short and _has_bf16_products() else None
        is_single = all(part.dtype is torch.float32 for part in (self[0].weight, *parts))
        return torch.float32 if is_single and is_intel() and _has_onednn() else None

    def _takes_onednn(self, inputs: Tensor) -> bool:
        return bool(
            self._trains_on_cpu(inputs)
            and inputs.dtype is torch.float32
            and inputs.shape[0] * self._products >= ONEDNN_WORK
            and not torch.is_autocast_enabled("cpu")
            and not is_intel()
            and _has_onednn()
        )

    def _trains_on_cpu(self, inputs: Tensor) -> bool:
        return bool(
            self.training
            and self._products
            and inputs.device.type == "cpu"
            and not torch.compiler.is_compiling()
        )


def _has_onednn() -> bool:
    is_built = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(is_built and torch.backends.mkldnn.enabled)


def _has_bf16_products() -> bool:
    return bool(_has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def is_intel() -> bool:
    """Return whether the CPU is Intel's, for which MKL keeps its fastest products."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


ALIGNED = 16
"""Inputs' widths are rounded up to a multiple of this: products of odd ones take a fifth longer."""


class _LinearRelu(torch.autograd.Function):
    """relu(x W^T + b) in bf16 or float32: parts of x side by side, [out, width], [out] -> [N, out].

    Weights and their gradients are float32. Parts are written to where the product reads them, in
    its type. Bias and ReLU are part of the product: as a pass of its own ReLU took a sixth of the
    forward pass in bf16 on a CPU with matrix units (AMX). is_inner: the gradient comes from another
    such layer, which made it for this one alone, so it may be overwritten.
    """

    @staticmethod
    def forward(
        ctx: Any, kind: torch.dtype, is_inner: bool, weight: Tensor, bias: Tensor, *parts: Tensor
    ) -> Tensor:
        width = weight.shape[1]
        padding = -width % ALIGNED
        if len(parts) == 1 and parts[0].dtype is kind and not padding:
            inputs = parts[0]
        else:
            inputs = parts[0].new_empty(len(parts[0]), width + padding, dtype=kind)
            inputs[:, width:] = 0
            places = torch.split(inputs[:, :width], [part.shape[1] for part in parts], 1)
            for place, part in zip(places, parts, strict=True):
                place.copy_(part)
        matrix = functional.pad(weight.to(kind), (0, padding)) if padding else weight.to(kind)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, matrix, bias.to(kind), "relu", [], ""
        )
        ctx.is_inner, ctx.parts = is_inner, [(part.shape[1], part.dtype) for part in parts]
        ctx.save_for_backward(inputs, matrix, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, matrix, out = ctx.saved_tensors
        passed = gradients[0]
        if ctx.is_inner:
            torch.ops.aten.threshold_backward.grad_input(passed, out, 0, grad_input=passed)
        else:
            passed = torch.ops.aten.threshold_backward(passed, out, 0)
        of_parts: list[Tensor | None] = []
        start = 0
        for (width, kind), is_wanted in zip(ctx.parts, ctx.needs_input_grad[4:], strict=True):
            columns = matrix[:, start : start + width]
            of_parts.append(passed.mm(columns).to(kind) if is_wanted else None)
            start += width
        of_weight = passed.t().mm(inputs)[:, :start].float()
        return None, None, of_weight, passed.sum(0).float(), *of_parts


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return [N, sum of widths] of parts [N, width]."""
    found = pieces(parts)
    return torch.cat(found, dim=-1) if len(found) > 1 else found[0]


def pieces(parts: Sequence[Tensor]) -> list[Tensor]:
    """Return parts [N, width] in fewer: the columns of one matrix, in their order, are that matrix.

    Parts without columns are left out.
    """
    some = [part for part in parts if part.shape[1]] or list(parts[:1])
    if torch.compiler.is_compiling():
        return some
    found: list[Tensor] = []
    start = 0
    while start < len(some):
        matrix, count = _whole(some, start) or (some[start], 1)
        found.append(matrix)
        start += count
    return found


def _whole(parts: list[Tensor], start: int) -> tuple[Tensor, int] | None:
    """Return the matrix whose columns the next parts are, and how many parts, if there is one."""
    matrix = parts[start]._base
    if matrix is None or matrix.dim() != 2 or matrix.shape[0] != parts[start].shape[0]:
        return None
    column, count = 0, 0
    for part in parts[start:]:
        if column == matrix.shape[1]:
            break
        is_next = (
            part._base is matrix
            and part.requires_grad == matrix.requires_grad
            and part.storage_offset() == matrix.storage_offset() + column
            and part.stride(0) == matrix.stride(0)
            and (part.shape[1] == 1 or part.stride(1) == matrix.stride(1) == 1)
        )
        if not is_next:
            return None
        column, count = column + part.shape[1], count + 1
    return (matrix, count) if column == matrix.shape[1] else None


class CrossNetwork(nn.Module):
    """Cross layers of DCN-V2: x_{l+1} = x_0 * (W_l x_l + b_l) + x_l.

    Source: Wang et al., "DCN V2", WWW 2021, equation 1. Maps [N, width] to [N, width].
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, inputs: Tensor) -> Tensor:
        crossed = inputs
        for layer in self.layers:
            crossed = torch.addcmul(crossed, inputs, layer(crossed))
        return crossed


def head_products(user: Tensor, item: Tensor, heads: int) -> Tensor:
    """Return the inner products of each of `heads` parts of users with each of items' parts.

    [N, D] twice -> [N, heads^2]. After the multi-head bilinear fusion of Mao et al., "FinalMLP",
    AAAI 2023, section 3.3, without its weight matrices: the towers learn them.
    """
    parts = [side.reshape(side.shape[0], heads, -1) for side in (user, item)]
    return torch.matmul(parts[0], parts[1].transpose(1, 2)).flatten(1)


class AttentionPooling(nn.Module):
    """A mean of list entries with learned weights: softmax over v . tanh(W x + p).

    x: an entry's vector, zero where there is none; p: its place, counted from the list's end.
    Source: Yang et al., "Hierarchical attention networks", NAACL 2016, equations 5 to 7. Maps
    [N, L, width] to [N, width], zero for an empty list; L is at most `length`.
    """

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)
        self.place = nn.Parameter(torch.zeros(length, width))
        self.query = nn.Linear(width, 1, bias=False)

    def forward(self, entries: Tensor) -> Tensor:
        present = (entries != 0).any(-1)
        place = self.place[self.place.shape[0] - entries.shape[1] :]
        score = self.query(torch.tanh(self.project(entries) + place)).squeeze(-1)
        return _weighed(score, present, entries)


class SelfAttentionPooling(nn.Module):
    """One layer of self-attention among list entries, with a residual, then AttentionPooling.

    Source: Vaswani et al., "Attention is all you need", 2017, equation 1, with one head. Maps
    [N, L, width] to [N, width], zero for an empty list.
    """

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(length, width))
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.pool = AttentionPooling(width, length)

    def forward(self, entries: Tensor) -> Tensor:
        present = (entries != 0).any(-1)
        place = self.place[self.place.shape[0] - entries.shape[1] :]
        query, key, value = self.inputs(entries + place).chunk(3, dim=-1)
        score = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        score = score.masked_fill(~present.unsqueeze(1), LOWEST)
        seen = entries + self.output(torch.softmax(score, -1) @ value)
        pooled: Tensor = self.pool(seen * present.unsqueeze(-1))
        return pooled


LOWEST = -1e9
"""In place of -inf, which would make NaN of a list without entries."""


def _weighed(score: Tensor, present: Tensor, entries: Tensor) -> Tensor:
    """Return the mean of entries [N, L, width] by the softmax of scores [N, L], where present."""
    weight = torch.softmax(score.masked_fill(~present, LOWEST), -1)
    return (weight.unsqueeze(-1) * entries).sum(1)
