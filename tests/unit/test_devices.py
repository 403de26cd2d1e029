"""A training step with every tensor on a device that is not the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from hvdrec.embeddings.setup import make_tables
from hvdrec.parallel.ranks import World
from hvdrec.training.average import Averages
from hvdrec.training.build import build_model
from hvdrec.training.pipeline import make_preparer, steps
from hvdrec.training.state import TrainState
from hvdrec.training.step import take_step
from tests.small_model import SIZES, small_batch, small_config

META = torch.device("meta")
"""Its tensors have no values. An operation on tensors of both this device and the CPU fails."""


@pytest.mark.parametrize("objective", ["ranking", "retrieval", "joint"])
def test_a_step_mixes_no_devices(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Autocast refuses this device. It changes types of numbers only, never the device.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    config = small_config(objective, clip_norm=1.0)
    model = build_model(config, SIZES, with_tables=False).to(META)
    tables = make_tables(config, SIZES, World(), META, kernels={4: "torch"})
    optimizer = torch.optim.SGD(model.parameters())  # the fused Adam refuses this device, too
    state = TrainState(
        config,
        model,
        tables,
        optimizer,
        log_probability=torch.zeros(SIZES["item_id"], device=META),
        averages=Averages(model, tables, 0.9, 1),
    )
    prepare = make_preparer(tables, config, 0)
    batches = [prepare(number, replace(small_batch(12), tasks=None)) for number in range(3)]
    for number, step in enumerate(steps(batches, tables, META)):
        loss = take_step(state, step, number, 0.0)
        assert loss.total.device == META
    assert all(p.grad is not None and p.grad.device == META for p in model.parameters())
