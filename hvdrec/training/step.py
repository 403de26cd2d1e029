"""One training step."""

from __future__ import annotations

import numpy as np
import torch

from hvdrec.training.objective import StepLoss, clip, compute_gradients
from hvdrec.training.optimizer import schedule, set_learning_rate
from hvdrec.training.pipeline import Step
from hvdrec.training.state import TrainState


def take_step(state: TrainState, step: Step, number: int, progress: float) -> StepLoss:
    """Take a training step; every rank must call this together.

    Args:
        state: Updated in place.
        step: The batch and its table rows.
        number: Steps since the start of training.
        progress: Share in [0, 1] of training before this step.
    """
    config, tables = state.config, state.tables
    train, parallel = config.train, config.parallel
    # Random numbers depend on seed, step and rank only, so a resumed run repeats them.
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
        # The next step's rows are sent while the dense optimizer works.
        tables.start_fetch(step.next_request)
    state.dense.wait()
    state.optimizer.step()
    if (number + 1) % parallel.average_every == 0:
        state.average_ranks()
    if state.averages is not None:
        state.averages.update(number)
    return loss


def _seed(seed: int, device: torch.device) -> None:
    """Seed the default generator; torch.manual_seed takes 0.8 ms to check every device type."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
