"""The losses of ranker and towers, each a weighted sum over the rows of a rank.

The caller divides by the total weight over all ranks. ``train.retrieval_loss`` chooses the loss of
the towers by name (`RetrievalLoss`). To add one, write it in a new file and register it here.
"""

from hvdrec.models.losses.bpr import bpr
from hvdrec.models.losses.by_name import RetrievalLoss, register_loss, retrieval_loss
from hvdrec.models.losses.in_batch import in_batch_loss, in_mixture
from hvdrec.models.losses.softmax import softmax

register_loss("softmax", softmax)
register_loss("bpr", bpr)

__all__ = ["RetrievalLoss", "in_batch_loss", "in_mixture", "register_loss", "retrieval_loss"]
