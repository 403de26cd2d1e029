"""Losses as weighted sums over a rank's rows, ready to be divided by the global weight.

A retrieval loss is a function of masked logits (`RetrievalLoss`), chosen by name with
``train.retrieval_loss``. To add one, write it in a file of its own and register it here.
"""

from hvdrec.models.losses.bpr import bpr
from hvdrec.models.losses.by_name import RetrievalLoss, register_loss, retrieval_loss
from hvdrec.models.losses.in_batch import in_batch_loss, in_mixture
from hvdrec.models.losses.softmax import softmax

register_loss("softmax", softmax)
register_loss("bpr", bpr)

__all__ = ["RetrievalLoss", "in_batch_loss", "in_mixture", "register_loss", "retrieval_loss"]
