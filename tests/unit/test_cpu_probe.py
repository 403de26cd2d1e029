"""The choice of CPU layers: by hand, as recorded, by vendor, or by a probe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hvdrec.config.sections import Train
from hvdrec.training import cpu_probe
from hvdrec.training.cpu_probe import choose_cpu_layers, fastest, probe_cpu_layers
from tests.small_model import small_config, small_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FASTER_PLAIN = {"plain": [5.0, 5.2], "fused": [9.0, 9.1], "onednn": [9.5, 9.3]}


@pytest.mark.parametrize(
    ("timings", "expected"),
    [
        (FASTER_PLAIN, "plain"),
        # 8 % faster is not enough.
        ({"plain": [9.2, 9.2], "fused": [10.0, 10.0]}, "fused"),
        # Another program slowed the default down: its CPU time is the same.
        ({"plain": [8.0, 8.0], "fused": [20.0, 8.2]}, "fused"),
        # Less CPU time, but no faster: it runs on fewer threads.
        ({"plain": [10.0, 5.0], "fused": [10.0, 10.0]}, "fused"),
        ({"plain": [8, 8], "fused": [10, 10], "onednn": [7, 7]}, "onednn"),
        # Half the time, but of a tiny model.
        ({"plain": [2.0, 2.0], "fused": [4.0, 4.0]}, "fused"),
        ({}, "fused"),
    ],
)
def test_another_choice_must_be_clearly_faster(
    timings: dict[str, list[float]], expected: str
) -> None:
    assert fastest(timings, "fused") == expected


@pytest.mark.parametrize(
    ("option", "device", "recorded", "expected"),
    [
        ("onednn", CPU, "plain", "onednn"),
        ("auto", GPU, None, "plain"),
        ("auto", CPU, "onednn", "onednn"),
        ("auto", CPU, "", "fused"),  # a checkpoint that records no choice
        ("auto", CPU, "auto", "fused"),
        ("auto", CPU, None, "plain"),
    ],
)
def test_the_option_comes_before_the_record_and_the_record_before_the_probe(
    monkeypatch: pytest.MonkeyPatch,
    option: Any,
    device: torch.device,
    recorded: str | None,
    expected: str,
) -> None:
    monkeypatch.setattr(cpu_probe, "vendor_cpu_layers", lambda *, bf16: "fused")
    monkeypatch.setattr(cpu_probe, "probe_cpu_layers", lambda *_, bf16: FASTER_PLAIN)
    train = {"cpu_layers": recorded} if recorded else {}
    stored = None if recorded is None else {"config": {"train": train}}
    model = small_model(small_config(), with_tables=False)
    choice, timings = choose_cpu_layers(model, Train(cpu_layers=option), 8, device, stored)
    assert choice == expected
    is_probed = option == "auto" and device is CPU and recorded is None
    assert timings == ({"plain": 5.0, "fused": 9.0, "onednn": 9.5} if is_probed else {})


@pytest.mark.parametrize("bf16", [False, True])
def test_a_probe_times_every_choice_and_leaves_no_trace(bf16: bool) -> None:
    model = small_model(small_config(), with_tables=False).float()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    generator = torch.get_rng_state()
    times = probe_cpu_layers(model, 8, bf16=bf16)
    assert list(times) == ["plain", "fused"] + ["onednn"] * (not bf16)
    assert all(wall > 0 and cpu > 0 for wall, cpu in times.values())
    assert torch.equal(torch.get_rng_state(), generator)
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        assert parameter.grad is None and torch.equal(parameter, weight)


def test_a_model_without_hidden_layers_needs_no_probe() -> None:
    config = small_config()
    shape = replace(
        config.model,
        tower=replace(config.model.tower, hidden=()),
        ranker=replace(config.model.ranker, hidden=()),
    )
    model = small_model(replace(config, model=shape), with_tables=False)
    assert probe_cpu_layers(model, 8, bf16=False) == {}
