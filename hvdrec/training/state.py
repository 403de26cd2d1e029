"""The state that a training step changes: the model, its tables and their optimizers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hvdrec.config import Config
from hvdrec.embeddings.sharded import DistributedTables
from hvdrec.models.recommender import Recommender
from hvdrec.parallel.gradients import DenseGradients, average
from hvdrec.training.average import Averages
from hvdrec.training.optimizer import optimizer_tensors


@dataclass(frozen=True)
class TrainState:
    """A model that is being trained.

    Attributes:
        config: Configuration of the run.
        model: The dense part of the model, without embedding tables.
        tables: The embedding tables, distributed over all ranks.
        optimizer: Optimizer of the dense weights; the tables have their own.
        log_probability: Logarithm of each item's share of the positive training rows [items], for
            the logQ correction; None if that is off.
        teacher: Model in evaluation mode, with its tables; None without distillation.
        averages: Moving averages of all weights; None if they are off.
        features: Identity of the features on which the model is trained.
        dense: Sums the dense gradients over the ranks.
    """

    config: Config
    model: Recommender
    tables: DistributedTables
    optimizer: torch.optim.Optimizer
    log_probability: Tensor | None = None
    teacher: Recommender | None = None
    averages: Averages | None = None
    features: str = ""
    dense: DenseGradients = field(init=False)

    def __post_init__(self) -> None:
        dense = DenseGradients(self.model.parameters(), self.config.parallel.synchronization)
        object.__setattr__(self, "dense", dense)

    def average_ranks(self) -> None:
        """Average the dense weights, and the moments of their optimizer, over the ranks.

        Do nothing unless ``parallel.synchronization`` is "average". With this setting, each rank
        updates its weights by its own gradients between two calls.
        """
        if self.config.parallel.synchronization != "average":
            return
        tensors = optimizer_tensors(self.model, self.optimizer)
        moments = [value for name, value in tensors.items() if not name.endswith("/step")]
        average([parameter.data for parameter in self.model.parameters()] + moments)
