"""In-batch softmax."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def softmax(logits_BC: Tensor, positive_B: Tensor) -> Tensor:
    """Compute for each row the cross-entropy of its positive among all candidates: -> [B]."""
    return functional.cross_entropy(logits_BC, positive_B, reduction="none")
