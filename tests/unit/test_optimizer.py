"""Learning rate over time, decay groups, and optimizer state that survives a round trip."""

from __future__ import annotations

import pytest
import torch

from hvdrec.config import Train
from hvdrec.training.optimizer import (
    clip_gradients,
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
)
from tests.small_model import small_config, small_model


def test_warm_up_is_linear_and_then_the_schedule_falls() -> None:
    train = Train(learning_rate=2.0, warmup_steps=4, schedule="linear")
    assert [learning_rate(train, step, 0.0) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert learning_rate(train, 100, 0.75) == pytest.approx(0.5)
    assert learning_rate(train, 100, 1.0) == 0.0


def test_cosine_is_half_way_in_the_middle() -> None:
    train = Train(learning_rate=1.0, warmup_steps=0, schedule="cosine")
    assert learning_rate(train, 9, 0.5) == pytest.approx(0.5)
    assert learning_rate(train, 0, 0.0) == 1.0


def test_only_matrices_outside_tables_are_decayed() -> None:
    model = small_model(small_config())
    optimizer = make_optimizer(model, Train(weight_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)] for p in optimizer.param_groups[0]["params"]}
    vectors = {names[id(p)] for p in optimizer.param_groups[1]["params"]}
    tables = {names[id(p)] for p in optimizer.param_groups[2]["params"]}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.0]
    assert all(name.endswith("weight") and "tables" not in name for name in decayed)
    assert all(name.endswith("bias") for name in vectors)
    assert all("tables" in name for name in tables)
    assert decayed | vectors | tables == set(names.values())


def test_tables_have_a_learning_rate_of_their_own() -> None:
    train = Train(learning_rate=0.5, embedding_learning_rate=2.0)
    optimizer = make_optimizer(small_model(small_config()), train)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25, 1.0]


def test_state_survives_a_round_trip() -> None:
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


def test_clipping_scales_to_the_norm() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    clip_gradients([parameter], 1.0)
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
