"""One step of training, and what is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hvdrec.config import Config
from hvdrec.embeddings.sharded import DistributedTables
from hvdrec.models.recommender import Recommender
from hvdrec.parallel.gradients import DenseGradients, average
from hvdrec.training.average import Averages
from hvdrec.training.objective import StepLoss, clip, compute_gradients
from hvdrec.training.optimizer import optimizer_tensors, schedule, set_learning_rate
from hvdrec.training.pipeline import Step


@dataclass(frozen=True)
class Trainee:
    """A model, its tables over the ranks, and the optimizer of its dense weights.

    log_probability, teacher: see `compute_gradients`. averages: of all weights, if so configured.
    dense: the gradients of the model's parameters.
    """

    config: Config
    model: Recommender
    tables: DistributedTables
    optimizer: torch.optim.Optimizer
    log_probability: Tensor | None = None
    teacher: Recommender | None = None
    averages: Averages | None = None
    dense: DenseGradients = field(init=False)

    def __post_init__(self) -> None:
        dense = DenseGradients(self.model.parameters(), self.config.parallel.synchronization)
        object.__setattr__(self, "dense", dense)


def take_step(trainee: Trainee, step: Step, number: int, progress: float) -> StepLoss:
    """Take a training step; every rank calls this together.

    number: 0-based, since the start of training; progress: share in [0, 1] of training before it.
    """
    config, tables, model = trainee.config, trainee.tables, trainee.model
    train, parallel = config.train, config.parallel
    # A step's random numbers depend on its place alone: a resumed run repeats them.
    seed = np.random.SeedSequence([config.seed, number, tables.world.rank])
    _seed(int(seed.generate_state(1, np.uint32)[0]), tables.device)
    share = schedule(train, number, progress)
    set_learning_rate(trainee.optimizer, share * train.learning_rate)
    tables.set_learning_rate(share * train.embedding_learning_rate)
    trainee.optimizer.zero_grad(set_to_none=True)
    dense = trainee.dense
    loss, sent = compute_gradients(
        model,
        step,
        tables,
        config,
        trainee.log_probability,
        dense,
        trainee.teacher,
    )
    gradients = tables.wait_gradients(sent)
    if train.clip_norm > 0:
        dense.wait()
        gradients = clip(model, tables, step, gradients, train.clip_norm)
    tables.update(step.asked, gradients)
    if step.following is not None:
        # The next step's vectors travel while dense weights are brought up to date.
        tables.start_fetch(step.following)
    dense.wait()
    trainee.optimizer.step()
    if parallel.synchronization == "average" and (number + 1) % parallel.average_every == 0:
        settle(trainee)
    if trainee.averages is not None:
        trainee.averages.update(number)
    return loss


def _seed(seed: int, device: torch.device) -> None:
    """Seed where random numbers are drawn; torch.manual_seed would look at every kind of device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def settle(trainee: Trainee) -> None:
    """Bring the ranks' dense weights and their moments together, where each steps by itself."""
    if trainee.config.parallel.synchronization != "average":
        return
    state = optimizer_tensors(trainee.model, trainee.optimizer)
    moments = [value for name, value in state.items() if not name.endswith("/step")]
    average([parameter.data for parameter in trainee.model.parameters()] + moments)
