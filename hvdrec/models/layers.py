"""Small layers that towers and ranker are made of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvdrec.models.dropout import ReluDropout

ONEDNN_WORK = 100_000_000
"""Multiplications of a forward pass from which on converting to oneDNN's layout pays."""


class Mlp(nn.Sequential):
    """Linear-ReLU(-dropout) layers: [N, width] -> [N, last of hidden].

    On a CPU training takes the fastest way through them. In bf16 a layer's ReLU is part of its
    matrix product. Large steps in float32 run in oneDNN's tensor layout, but for Intel's CPUs: on
    AMD's Zen 4 its products are a fifth faster than those that torch takes for dense tensors, which
    are MKL's. The parameters stay as they are, and their names are those of nn.Sequential.
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

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs
        if self._fuses(inputs):
            with torch.autocast("cpu", enabled=False):
                hidden = hidden.bfloat16()
                linear = [layer for layer in self if isinstance(layer, nn.Linear)]
                for one in linear:
                    hidden = _LinearRelu.apply(  # type: ignore[no-untyped-call]
                        hidden, one.weight, one.bias, one is not linear[-1]
                    )
        elif not self._takes_onednn(inputs):
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

    def _fuses(self, inputs: Tensor) -> bool:
        return bool(
            self._trains_with_onednn(inputs)
            and not self._has_dropout
            and torch.is_autocast_enabled("cpu")
            and torch.get_autocast_dtype("cpu") is torch.bfloat16
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )

    def _takes_onednn(self, inputs: Tensor) -> bool:
        return bool(
            self._trains_with_onednn(inputs)
            and inputs.dtype is torch.float32
            and inputs.shape[0] * self._products >= ONEDNN_WORK
            and not torch.is_autocast_enabled("cpu")
            and not is_intel()
        )

    def _trains_with_onednn(self, inputs: Tensor) -> bool:
        return bool(
            self.training
            and inputs.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
            and torch.backends.mkldnn.enabled
        )


@cache
def is_intel() -> bool:
    """Return whether the CPU is Intel's, for which MKL keeps its fastest products."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


class _LinearRelu(torch.autograd.Function):
    """relu(x W^T + b) in bf16, in one pass: [N, width], [out, width], [out] -> [N, out].

    Weights and their gradients are float32. As its own pass over the products, ReLU took a sixth
    of the forward pass on a CPU with matrix units (AMX).
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, is_inner: bool) -> Tensor:
        ctx.is_inner = is_inner
        short = weight.bfloat16()
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, short, bias.bfloat16(), "relu", [], ""
        )
        ctx.save_for_backward(inputs, short, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        inputs, weight, out = ctx.saved_tensors
        passed = gradients[0]
        if ctx.is_inner:
            # What the next layer made of its gradient, for this one alone.
            torch.ops.aten.threshold_backward.grad_input(passed, out, 0, grad_input=passed)
        else:
            passed = torch.ops.aten.threshold_backward(passed, out, 0)
        of_inputs = passed.mm(weight) if ctx.needs_input_grad[0] else None
        return of_inputs, passed.t().mm(inputs).float(), passed.sum(0).float(), None


def joined(parts: list[Tensor]) -> Tensor:
    """Return [N, sum of widths] of parts [N, width].

    Parts that are all columns of one matrix, in their order, are copied as that matrix.
    """
    parts = [part for part in parts if part.shape[1]] or parts[:1]
    merged: list[Tensor] = []
    start = 0
    while start < len(parts):
        whole = None if torch.compiler.is_compiling() else _whole(parts, start)
        merged.append(parts[start] if whole is None else whole[0])
        start += 1 if whole is None else whole[1]
    return torch.cat(merged, dim=-1) if len(merged) > 1 else merged[0]


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
