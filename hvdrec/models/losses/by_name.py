"""Retrieval losses by name."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hvdrec.errors import unknown_name


class RetrievalLoss(Protocol):
    """The loss of each positive row against the candidate items of the batch."""

    def __call__(self, logits_BC: Tensor, positive_B: Tensor) -> Tensor:
        """Compute the losses of a block of rows.

        Temperature, logQ correction, removal of accidental hits and choice of hard negatives are
        already applied. A loss must not depend on how the rows are cut into blocks.

        Args:
            logits_BC: [B, C] logits of each row's candidates; -inf where a candidate does not
                count. The positive is always finite.
            positive_B: int64 [B], the column of each row's positive item.

        Returns:
            The losses [B], unweighted.
        """
        ...


_LOSSES: dict[str, RetrievalLoss] = {}


def register_loss(name: str, loss: RetrievalLoss) -> None:
    """Make a loss known under a name for ``train.retrieval_loss``.

    A later registration of the same name replaces the earlier one. In a job of several ranks,
    every rank must register the loss before it calls `hvdrec.train`.
    """
    _LOSSES[name] = loss


def retrieval_loss(name: str) -> RetrievalLoss:
    """Return the loss with a name.

    Raises:
        UserError: No loss of this name is registered.
    """
    if name not in _LOSSES:
        raise unknown_name("train.retrieval_loss", name, _LOSSES)
    return _LOSSES[name]
