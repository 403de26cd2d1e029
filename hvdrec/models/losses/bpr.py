"""Bayesian personalized ranking."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def bpr(logits_BC: Tensor, positive_B: Tensor) -> Tensor:
    """Compute the mean of -log sigmoid(positive - negative) over each row's negatives, [B].

    The loss is 0 for a row without negatives. With the logQ correction, the difference of two
    scores estimates the log ratio of the items' probabilities given the user, whatever distribution
    the negatives are drawn from.

    Source: Rendle et al., "BPR: Bayesian personalized ranking from implicit feedback", UAI 2009,
    section 4.1, with the batch's other items as the drawn negatives.
    """
    positive_B1 = positive_B.unsqueeze(1)
    difference_BC = logits_BC - logits_BC.gather(1, positive_B1)
    # softplus(-inf) is 0 with gradient 0: masked candidates and the positive itself drop out.
    difference_BC = difference_BC.scatter(1, positive_B1, -float("inf"))
    negatives_B = difference_BC.isfinite().sum(dim=1).clamp(min=1)
    return functional.softplus(difference_BC).sum(dim=1) / negatives_B
