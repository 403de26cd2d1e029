"""The batch of tensors that the loader delivers and training consumes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """N rows as tensors: `rows` data rows, then padding rows that are zero in every column.

    Attributes:
        features: Per feature, integer codes [N] or [N, max_length] (0 pads), or float32 [N].
        user_index: Row numbers in the users table, int64 [N].
        item_index: Row numbers in the items table, int64 [N].
        label: float32 [N].
        weight: float32 [N]; 0 for padding.
        rows: The number of data rows.
        tasks: Labels of T tasks, float32 [N, T], NaN where unknown; None if there are no tasks.
    """

    features: dict[str, Tensor]
    user_index: Tensor
    item_index: Tensor
    label: Tensor
    weight: Tensor
    rows: int
    tasks: Tensor | None = None

    def part(self, start: int, stop: int) -> Batch:
        """Return rows [start, stop)."""
        part = self._map(lambda tensor: tensor[start:stop])
        return replace(part, rows=max(0, min(stop, self.rows) - start))

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; copies from pinned memory are asynchronous."""
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
