"""A ranker with several labels: what its tasks share, what each has for itself, their combination.

Shapes: N rows, T tasks, E experts, H width of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from hvdrec.config.sections import Ranker as RankerShape
from hvdrec.config.sections import Task
from hvdrec.models.dropout import Dropout
from hvdrec.models.layers import CrossNetwork, Mlp, joined


class TaskRanker(nn.Module):
    """A DNN with one logit per task: [N, width] -> [N, T].

    bottom: all tasks share the hidden layers. mmoe: there are E experts, each with such layers, and
    task t goes on with the experts' outputs summed with the weights softmax(gate_t(inputs)) (Ma et
    al., "Modeling task relationships in multi-task learning with multi-gate mixture-of-experts",
    KDD 2018, equations 6 and 7; these gates have a bias). Behind them every task has layers and a
    linear head of its own. Cross layers, if any, are shared and go into every task's own layers.

    The first layer of all experts and the gates are one linear map, ``first``.
    """

    def __init__(self, width: int, shape: RankerShape, tasks: int) -> None:
        super().__init__()
        self.is_mixture = shape.sharing == "mmoe"
        self.tasks = tasks
        experts = shape.experts if self.is_mixture else 1
        first_width, *widths = shape.hidden
        self.widths = [first_width] * experts
        if self.is_mixture:
            self.widths.append(tasks * experts)
        self.first = nn.Linear(width, sum(self.widths))
        self.cross = CrossNetwork(width, shape.cross_layers) if shape.cross_layers else None
        self.experts = nn.ModuleList()
        for _ in range(experts):
            inner = Mlp(first_width, widths, shape.dropout)
            begin = [nn.ReLU(), *([Dropout(shape.dropout)] if shape.dropout > 0 else [])]
            self.experts.append(nn.Sequential(*begin, *inner))
        last = inner.output_width
        if self.cross is not None:
            last += width
        self.heads = nn.ModuleList()
        for _ in range(tasks):
            own = Mlp(last, shape.task_hidden, shape.dropout)
            self.heads.append(nn.Sequential(*own, nn.Linear(own.output_width, 1)))

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        """Map vectors, given in parts that lie side by side."""
        vectors = joined(parts)
        crossed = None if self.cross is None else self.cross(vectors)
        return self.after_first(self.first(vectors), crossed)

    def after_first(self, first: Tensor, crossed: Tensor | None = None) -> Tensor:
        """Return logits [N, T] from the first layer's output [N, H] and the cross layers'."""
        parts = torch.split(first, self.widths, dim=-1)
        outputs = [expert(part) for expert, part in zip(self.experts, parts, strict=False)]
        if self.is_mixture:
            gates = parts[-1].reshape(-1, self.tasks, len(outputs)).softmax(dim=-1)
            mixed = torch.matmul(gates, torch.stack(outputs, dim=1))
            own = list(mixed.unbind(dim=1))
        else:
            own = outputs * self.tasks
        if crossed is not None:
            own = [torch.cat([crossed, part], dim=-1) for part in own]
        logits = [head(part) for head, part in zip(self.heads, own, strict=True)]
        return torch.cat(logits, dim=-1)


def combined(probabilities: Tensor, tasks: Sequence[Task], combine: str) -> Tensor:
    """Return the served score [N], in [0, 1], of the tasks' probabilities [N, T].

    product: of p ** share, so that shares of 1 multiply, as P(click) P(long view | click). sum: the
    mean, weighted by the shares.
    """
    shares = probabilities.new_tensor([task.share for task in tasks])
    if combine == "product":
        return torch.prod(probabilities**shares, dim=-1)
    return functional.linear(probabilities, shares / shares.sum())
