"""A ranker that predicts several labels, and the score that combines its predictions.

A *task* is one of these labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from hvdrec.config.data_sections import Task
from hvdrec.config.sections import Ranker
from hvdrec.models.cpu_layers import Dropout, joined
from hvdrec.models.layers import CrossNetwork, Mlp


class TaskRanker(nn.Module):
    """A DNN with one logit per task: [rows, width] -> [rows, tasks].

    With sharing "bottom", all tasks share the hidden layers. With "mmoe", there are several experts
    with their own hidden layers, and task t reads the mean of the experts' outputs weighted by
    softmax(gate_t(inputs)). The result goes through each task's own layers and linear head. Cross
    layers, if any, are shared by the tasks; their output is joined to the input of each task's own
    layers. One linear layer, ``first``, computes the first layer of all experts and all gates.

    Source: Ma et al., "Modeling task relationships in multi-task learning with multi-gate
    mixture-of-experts", KDD 2018, equations 6 and 7; unlike in the paper, the gates have a bias.

    Args:
        width: Number of input columns.
        shape: The ``[model.ranker]`` section.
        tasks: Number of tasks.
    """

    def __init__(self, width: int, shape: Ranker, tasks: int) -> None:
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
        shared_width = inner.output_width + (width if self.cross is not None else 0)
        self.heads = nn.ModuleList()
        for _ in range(tasks):
            own = Mlp(shared_width, shape.task_hidden, shape.dropout)
            self.heads.append(nn.Sequential(*own, nn.Linear(own.output_width, 1)))

    def outputs(self) -> list[nn.Linear]:
        """Return the layers that compute the tasks' logits."""
        last = [list(head.children())[-1] for head in self.heads]
        return [layer for layer in last if isinstance(layer, nn.Linear)]

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        """Map inputs, given as a sequence of blocks of columns, to logits [rows, tasks]."""
        vectors = joined(parts)
        crossed = None if self.cross is None else self.cross(vectors)
        return self.after_first(self.first(vectors), crossed)

    def after_first(self, first: Tensor, crossed: Tensor | None = None) -> Tensor:
        """Compute logits [rows, tasks] from the outputs of the first layer and the cross layers.

        Args:
            first: Output of the layer ``first`` [rows, its width].
            crossed: Output of the cross layers [rows, width]; None if there are none.
        """
        parts = torch.split(first, self.widths, dim=-1)
        outputs = [expert(part) for expert, part in zip(self.experts, parts, strict=False)]
        if self.is_mixture:
            gates = parts[-1].reshape(-1, self.tasks, len(outputs)).softmax(dim=-1)
            mixed = torch.matmul(gates, torch.stack(outputs, dim=1))
            inputs = list(mixed.unbind(dim=1))
        else:
            inputs = outputs * self.tasks
        if crossed is not None:
            inputs = [torch.cat([crossed, part], dim=-1) for part in inputs]
        logits = [head(part) for head, part in zip(self.heads, inputs, strict=True)]
        return torch.cat(logits, dim=-1)


def combined_score(probabilities: Tensor, tasks: Sequence[Task], combine: str) -> Tensor:
    """Combine the probabilities of all tasks into the served score [rows], which is in [0, 1].

    Args:
        probabilities: Predicted probability for each task [rows, tasks].
        tasks: The tasks; ``share`` is the weight of each in the score.
        combine: "product" for the product of p ** share. With shares of 1 this is a plain product,
            as in P(click) * P(long view | click). "sum" for the mean of p weighted by the shares.
    """
    shares = probabilities.new_tensor([task.share for task in tasks])
    if combine == "product":
        return torch.prod(probabilities**shares, dim=-1)
    return functional.linear(probabilities, shares / shares.sum())
