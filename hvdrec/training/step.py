"""One training step."""

from __future__ import annotations

import numpy as np
import torch

from hvdrec.training.objective import StepLoss, clip, compute_gradients
from hvdrec.training.optimizer import schedule, set_learning_rate
from hvdrec.training.pipeline import Step
from hvdrec.training.state import TrainState


def take_step(state: TrainState, step: Step, number: int, progress: float) -> StepLoss:
    """Train on one batch: compute the gradients and update weights and table rows.

    All ranks must call this at the same time.

    Args:
        state: The model, its tables and their optimizers; updated in place.
        step: The batch, and the request for its table rows.
        number: Number of steps taken before this one.
        progress: Share of the rows of all epochs that were read before this step, in [0, 1].

    Returns:
        This rank's share of the losses.
    """
    config, tables = state.config, state.tables
    train, parallel = config.train, config.parallel
    # Random numbers depend only on seed, step and rank, so a resumed run draws the same.
    seed = np.random.SeedSequence([config.seed, number, tables.world.rank])
    _seed(int(seed.generate_state(1, np.uint32)[0]), tables.device)
    share = schedule(train, number, progress)
    set_learning_rate(state.optimizer, share * train.learning_rate)
    tables.set_learning_rate(share * train.embedding_learning_rate)
    state.optimizer.zero_grad(set_to_none=True)
    loss, pending = compute_gradients(state, step)
    gradients = tables.wait_gradients(pending)
    if train.clip_norm > 0:
        state.dense.wait()
        gradients = clip(state, step, gradients, train.clip_norm)
    tables.update(step.request, gradients)
    if step.next_request is not None:
        # Table rows of the next step are sent while the dense weights are updated.
        tables.start_fetch(step.next_request)
    state.dense.wait()
    state.optimizer.step()
    if (number + 1) % parallel.average_every == 0:
        state.average_ranks()
    if state.averages is not None:
        state.averages.update(number)
    return loss


def _seed(seed: int, device: torch.device) -> None:
    """Seed the default generator. torch.manual_seed would take 0.8 ms to check all device types."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
