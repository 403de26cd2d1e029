"""The loss ``softmax``: cross-entropy over in-batch negatives.

B is the number of rows in a block, C the number of candidate items.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def softmax(logits_BC: Tensor, positive_B: Tensor) -> Tensor:
    """Return, for each row, the cross-entropy of its positive item among all candidates [B]."""
    return functional.cross_entropy(logits_BC, positive_B, reduction="none")
