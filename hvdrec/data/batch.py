"""`Batch`: the tensors that the loader delivers and a training step uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """n rows as tensors: samples, followed by padding rows that are zero in every column.

    Attributes:
        features: Feature name -> integer codes [n]; for a list feature, codes [n, max_length]
            padded with 0; for a plain number, float32 [n].
        user_index: The number of each row's user, int64 [n].
        item_index: The number of each row's item, int64 [n].
        label: The label of each row, float32 [n].
        weight: The weight of each row, float32 [n]; 0 for padding.
        rows: The number of samples among the n rows.
        tasks: The label of each row for each task, float32 [n, tasks], NaN if it is unknown; None
            if there are no tasks.
    """

    features: dict[str, Tensor]
    user_index: Tensor
    item_index: Tensor
    label: Tensor
    weight: Tensor
    rows: int
    tasks: Tensor | None = None

    def part(self, start: int, stop: int) -> Batch:
        """Return a batch of the rows `start` to `stop` (exclusive)."""
        part = self._map(lambda tensor: tensor[start:stop])
        return replace(part, rows=max(0, min(stop, self.rows) - start))

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device; a copy from pinned memory is asynchronous."""
        if device.type == "cpu":
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return a copy of the batch in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            {name: function(tensor) for name, tensor in self.features.items()},
            function(self.user_index),
            function(self.item_index),
            function(self.label),
            function(self.weight),
            self.rows,
            None if self.tasks is None else function(self.tasks),
        )
