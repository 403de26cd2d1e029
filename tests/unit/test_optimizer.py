"""Learning rate schedules, weight decay groups and the optimizer state."""

from __future__ import annotations

import pytest
import torch

from hvdrec.config.sections import Train
from hvdrec.training.optimizer import (
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    schedule,
    set_learning_rate,
)
from tests.small_model import small_config, small_model


def test_the_learning_rate_warms_up_linearly_and_then_falls() -> None:
    train = Train(warmup_steps=4, schedule="linear")
    assert [schedule(train, step, 0.0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule(train, 100, 0.75) == pytest.approx(0.25)
    assert schedule(train, 100, 1.0) == 0.0


def test_the_cosine_schedule_is_half_way_in_the_middle() -> None:
    train = Train(warmup_steps=0, schedule="cosine")
    assert schedule(train, 9, 0.5) == pytest.approx(0.5)
    assert schedule(train, 0, 0.0) == 1.0


def test_a_schedule_may_end_above_zero() -> None:
    train = Train(warmup_steps=4, schedule="linear", schedule_end=0.5)
    assert schedule(train, 0, 0.0) == 0.25
    assert schedule(train, 9, 0.5) == pytest.approx(0.75)
    assert schedule(train, 9, 1.0) == 0.5
    assert schedule(Train(warmup_steps=0, schedule_end=0.5), 9, 1.0) == 1.0


def test_only_matrices_are_decayed() -> None:
    model = small_model(small_config(), with_tables=False)
    optimizer = make_optimizer(model, Train(weight_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = ({names[id(p)] for p in g["params"]} for g in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(name.endswith("weight") for name in decayed)
    assert all(name.endswith("bias") for name in others)
    assert decayed | others == set(names.values())
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_optimizer_state_survives_a_round_trip() -> None:
    model = small_model(small_config())
    optimizer = make_optimizer(model, Train())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = optimizer_tensors(model, optimizer)
    fresh = make_optimizer(model, Train())
    restore_optimizer(model, fresh, saved)
    again = optimizer_tensors(model, fresh)
    assert saved.keys() == again.keys()
    assert len(saved) == 3 * len(list(model.parameters()))
    assert all(torch.equal(saved[name], again[name]) for name in saved)


def test_restored_state_is_on_the_device_of_its_parameter() -> None:
    model = torch.nn.Linear(2, 3)
    optimizer = make_optimizer(model, Train())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = optimizer_tensors(model, optimizer)
    # The fused optimizer refuses this device.
    meta = torch.nn.Linear(2, 3, device="meta")
    restored = torch.optim.AdamW(meta.parameters())
    restore_optimizer(meta, restored, saved)
    state = optimizer_tensors(meta, restored)
    assert state.keys() == saved.keys()
    assert any(name.endswith("/step") for name in state)
    assert {value.device.type for value in state.values()} == {"meta"}
