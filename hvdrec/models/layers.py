"""Small layers that towers and ranker are made of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from hvdrec.models.dropout import ReluDropout

ONEDNN_WORK = 100_000_000
"""Multiplications of a forward pass from which on converting to oneDNN's layout pays."""


class Mlp(nn.Sequential):
    """Linear-ReLU(-dropout) layers: [N, width] -> [N, last of hidden].

    Large steps of training in float32 on a CPU run in oneDNN's tensor layout: its matrix products
    are faster than those that torch takes for dense tensors (by a fifth on AMD's Zen 4).
    Their parameters stay as they are, and their names are those of nn.Sequential.
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
        if not self._takes_onednn(inputs):
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

    def _takes_onednn(self, inputs: Tensor) -> bool:
        return bool(
            self.training
            and inputs.dtype is torch.float32
            and inputs.device.type == "cpu"
            and inputs.shape[0] * self._products >= ONEDNN_WORK
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
            and torch.backends.mkldnn.enabled
        )


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
