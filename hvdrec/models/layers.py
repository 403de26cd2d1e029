"""The layers of towers and ranker, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from hvdrec.models.cpu_layers import HasCpuLayers, ReluDropout, run_mlp

MASKED = -1e9
"""The attention score of padding. With -inf, softmax over a list without entries gives NaN."""


class Mlp(HasCpuLayers, nn.Sequential):
    """Linear layers, each followed by ReLU and dropout: [rows, width] -> [rows, last width]."""

    def __init__(self, width: int, hidden: Sequence[int], dropout: float) -> None:
        layers: list[nn.Module] = []
        widths = [width, *hidden]
        for inputs, outputs in pairwise(widths):
            layers.append(nn.Linear(inputs, outputs))
            if dropout > 0:
                # Checkpoints name parameters by layer number. Identity keeps the numbers that
                # separate ReLU and dropout layers would give.
                layers += [nn.Identity(), ReluDropout(dropout)]
            else:
                layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)
        self.input_width, self.output_width = width, widths[-1]

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> Tensor:
        """Map inputs [rows, width] to [rows, last width].

        Inputs may also be given as a sequence of blocks of columns.
        """
        parts = [inputs] if isinstance(inputs, Tensor) else inputs
        return run_mlp(self, self.cpu_layers, parts)


class CrossNetwork(nn.Module):
    """Cross layers of DCN-V2: x_{l+1} = x_0 * (W_l x_l + b_l) + x_l.

    Here x_l is the input of layer l. Inputs and outputs are [rows, width]. Source: Wang et al.,
    "DCN V2", WWW 2021, equation 1.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs [rows, width] to outputs of the same shape."""
        crossed = inputs
        for layer in self.layers:
            crossed = torch.addcmul(crossed, inputs, layer(crossed))
        return crossed


def head_products(user: Tensor, item: Tensor, heads: int) -> Tensor:
    """Compute the inner product of every head of the user with every head of the item.

    A head is one of `heads` equal slices of an embedding. Source: the multi-head bilinear fusion of
    Mao et al., "FinalMLP", AAAI 2023, section 3.3, without its weight matrices, because the towers
    can learn them.

    Args:
        user: Embedding of each row's user [rows, width].
        item: Embedding of each row's item [rows, width].
        heads: Number of slices into which the columns are cut.

    Returns:
        The inner products [rows, heads^2].
    """
    parts = [side.reshape(side.shape[0], heads, -1) for side in (user, item)]
    return torch.matmul(parts[0], parts[1].transpose(1, 2)).flatten(1)


class AttentionPooling(nn.Module):
    """Pool a list by a weighted mean; an entry x has weight softmax(v . tanh(W x + p)).

    v, W and p are learned; p depends on the entry's position, counted from the end of the list.
    An entry that is all zero is padding and is ignored. An empty list gives zeros. Inputs are
    [rows, entries, width] with at most `length` entries, outputs are [rows, width].
    Source: Yang et al., "Hierarchical attention networks", NAACL 2016, equations 5 to 7.
    """

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)
        self.place = nn.Parameter(torch.zeros(length, width))
        self.query = nn.Linear(width, 1, bias=False)

    def forward(self, entries: Tensor) -> Tensor:
        """Pool entries [rows, entries, width] into one vector for each row [rows, width]."""
        present = (entries != 0).any(-1)
        position = self.place[self.place.shape[0] - entries.shape[1] :]
        score = self.query(torch.tanh(self.project(entries) + position)).squeeze(-1)
        weight = torch.softmax(score.masked_fill(~present, MASKED), -1)
        return (weight.unsqueeze(-1) * entries).sum(1)


class SelfAttentionPooling(nn.Module):
    """Self-attention (one layer, added to the list entries), followed by `AttentionPooling`.

    Inputs are [rows, entries, width] with at most `length` entries, outputs are [rows, width]. An
    empty list gives zeros.
    Source: Vaswani et al., "Attention is all you need", 2017, equation 1, with one head.
    """

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(length, width))
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.pool = AttentionPooling(width, length)

    def forward(self, entries: Tensor) -> Tensor:
        """Pool entries [rows, entries, width] into one vector for each row [rows, width]."""
        present = (entries != 0).any(-1)
        position = self.place[self.place.shape[0] - entries.shape[1] :]
        query, key, value = self.inputs(entries + position).chunk(3, dim=-1)
        score = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        score = score.masked_fill(~present.unsqueeze(1), MASKED)
        attended = entries + self.output(torch.softmax(score, -1) @ value)
        pooled: Tensor = self.pool(attended * present.unsqueeze(-1))
        return pooled
