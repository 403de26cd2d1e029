"""Exponential moving averages of all weights, which are validated, exported and served."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hvdrec.embeddings.kernels import AVERAGE
from hvdrec.embeddings.sharded import DistributedTables


class Averages:
    """Averages of a model's dense weights and of this rank's table rows.

    Averages of rows are a state of the table kernels and are saved with it. An update reads all
    rows, so it happens every `every` steps only, with decay ** every.

    Attributes:
        dense: Averages by name of the parameter.
    """

    def __init__(
        self, model: nn.Module, tables: DistributedTables, decay: float, every: int
    ) -> None:
        self._model, self._tables = model, tables
        self._decay, self._every = decay, every
        self.dense = {name: value.detach().clone() for name, value in model.named_parameters()}
        for kernel in tables.kernels:
            kernel.state[AVERAGE] = kernel.weight.clone()

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Update the averages after step `number`, counted from 0.

        Early in training the plain mean over all updates is used: it forgets the initial values
        faster than the decay.
        """
        if (number + 1) % self._every:
            return
        updates = (number + 1) // self._every
        share = max(1 - self._decay**self._every, 1 / (1 + updates))
        for weight, average in self._pairs():
            average.lerp_(weight, share)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Exchange weights and averages within a block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for weight, average in self._pairs():
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for name, parameter in self._model.named_parameters():
            yield parameter.data, self.dense[name]
        for kernel in self._tables.kernels:
            yield kernel.weight, kernel.state[AVERAGE]
