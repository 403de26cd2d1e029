"""The registry of retrieval losses (losses of the two towers) by name."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hvdrec.errors import unknown_name


class RetrievalLoss(Protocol):
    """A loss that compares each positive row's own item with the other items of the batch."""

    def __call__(self, logits_BC: Tensor, positive_B: Tensor) -> Tensor:
        """Compute the losses of a block of B rows against C candidate items.

        The logits already include the options of ``[train]``: temperature, logQ correction,
        removal of accidental hits, hard negatives. The losses must not depend on how the rows of a
        batch are cut into blocks.

        Args:
            logits_BC: Logit of each candidate for each row [B, C]; -inf for candidates that do not
                count. The logit of the positive item is always finite.
            positive_B: Column of each row's positive item, int64 [B].

        Returns:
            The losses [B], unweighted.
        """
        ...


_LOSSES: dict[str, RetrievalLoss] = {}


def register_loss(name: str, loss: RetrievalLoss) -> None:
    """Register a loss, so that ``train.retrieval_loss = name`` selects it.

    If the name is registered already, the new loss replaces the old one. In a job of several ranks,
    every rank must register the loss before it calls `hvdrec.train`.
    """
    _LOSSES[name] = loss


def retrieval_loss(name: str) -> RetrievalLoss:
    """Return the loss that is registered under a name.

    Raises:
        UserError: No loss of this name is registered.
    """
    if name not in _LOSSES:
        raise unknown_name("train.retrieval_loss", name, _LOSSES)
    return _LOSSES[name]
