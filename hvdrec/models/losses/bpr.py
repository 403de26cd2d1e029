"""The loss ``bpr``: Bayesian personalized ranking over in-batch negatives.

B is the number of rows in a block, C the number of candidate items.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def bpr(logits_BC: Tensor, positive_B: Tensor) -> Tensor:
    """Return, for each row, the mean of -log sigmoid(positive - negative) over its negatives [B].

    A row without negatives has a loss of 0. With the logQ correction, the difference of two items'
    logits estimates the log ratio of the items' probabilities given the user. This holds for any
    distribution of the negatives.

    Source: Rendle et al., "BPR: Bayesian personalized ranking from implicit feedback", UAI 2009,
    section 4.1. The negatives of a row are the other candidates of the batch.
    """
    positive_B1 = positive_B.unsqueeze(1)
    difference_BC = logits_BC - logits_BC.gather(1, positive_B1)
    # softplus(-inf) is 0 with gradient 0, so masked candidates and the positive do not count.
    difference_BC = difference_BC.scatter(1, positive_B1, -float("inf"))
    negatives_B = difference_BC.isfinite().sum(dim=1).clamp(min=1)
    return functional.softplus(difference_BC).sum(dim=1) / negatives_B
