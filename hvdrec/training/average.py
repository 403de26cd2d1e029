"""Exponential moving averages of all weights. If they are on, validation and export use them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hvdrec.embeddings.kernels import AVERAGE
from hvdrec.embeddings.sharded import DistributedTables


class Averages:
    """Moving averages of the dense weights and of this rank's rows of the embedding tables.

    The averages of table rows are part of the state of the tables' optimizers, in memory and in
    checkpoints. An update reads all rows. To save time, only every `every`-th step has an update,
    with the decay factor decay ** every.

    Attributes:
        dense: Name of a dense parameter -> its average.
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

        Early in training, the average is the plain mean of the initial weights and the weights at
        all updates so far. In this mean, the initial weights fade faster than with `decay`.
        """
        if (number + 1) % self._every:
            return
        updates = (number + 1) // self._every
        share = max(1 - self._decay**self._every, 1 / (1 + updates))
        for weight, average in self._pairs():
            average.lerp_(weight, share)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Use the averages as the weights of the model in the ``with`` body."""
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
