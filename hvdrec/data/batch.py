"""Rows as tensors, as the loader delivers and training takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows as tensors; behind the first `rows` rows there is padding of weight zero.

    features: name -> int32 codes [N] or [N, max_length] (0 pads), or float32 [N]; user_index,
    item_index: int64 [N]; label, weight: float32 [N]; tasks: float32 [N, T] of further labels, NaN
    where a row tells nothing, or None where none are read. Padding rows are zero everywhere.
    """

    features: dict[str, Tensor]
    user_index: Tensor
    item_index: Tensor
    label: Tensor
    weight: Tensor
    rows: int
    tasks: Tensor | None = None

    def part(self, start: int, stop: int) -> Batch:
        """Return some of the rows."""
        part = self._each(lambda tensor: tensor[start:stop])
        return replace(part, rows=max(0, min(stop, self.rows) - start))

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; from pinned memory the copy does not wait."""
        if device.type == "cpu":
            return self
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            {name: change(tensor) for name, tensor in self.features.items()},
            change(self.user_index),
            change(self.item_index),
            change(self.label),
            change(self.weight),
            self.rows,
            None if self.tasks is None else change(self.tasks),
        )
