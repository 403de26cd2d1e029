"""Training settings that follow the data and the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hvdrec.config.sections import Train
from hvdrec.training import defaults, machine
from hvdrec.training.defaults import default_batch_size, with_defaults
from hvdrec.training.machine import has_bf16

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("rows", "batch"),
    [(0, 64), (800, 64), (8_000, 128), (48_000, 512), (800_000, 8192), (10**9, 8192)],
)
def test_an_epoch_has_fifty_steps_where_the_rows_allow_it(rows: int, batch: int) -> None:
    assert default_batch_size(rows) == batch


def test_open_settings_follow_the_rows_and_the_epochs() -> None:
    train = with_defaults(Train(epochs=10), 48_000, CPU, None)
    # 94 steps of 512 rows an epoch, so the run has 940 steps.
    assert (train.batch_size, train.warmup_steps, train.patience) == (512, 94, 2)
    train = with_defaults(Train(epochs=50), 1_000, CPU, None)
    assert (train.batch_size, train.warmup_steps, train.patience) == (64, 80, 10)
    assert with_defaults(Train(epochs=1), 60, CPU, None).warmup_steps == 0


def test_what_is_configured_stays_and_what_was_recorded_comes_before_the_default() -> None:
    given = Train(batch_size=8192, warmup_steps=100, patience=3, precision="bf16")
    train = with_defaults(given, 100, CPU, {"batch_size": 1, "warmup_steps": 1})
    assert (train.batch_size, train.warmup_steps, train.patience) == (8192, 100, 3)
    assert train.precision == "bf16"
    before = {"batch_size": 8192, "warmup_steps": 7, "precision": "bf16", "patience": 2}
    train = with_defaults(Train(precision="auto", epochs=20), 100, CPU, before)
    assert (train.batch_size, train.warmup_steps, train.patience) == (8192, 7, 4)
    assert train.precision == "bf16"


@pytest.mark.parametrize(
    ("option", "device", "recorded", "expected"),
    [
        ("onednn", CPU, "plain", "onednn"),
        ("auto", GPU, None, "plain"),
        ("auto", CPU, "onednn", "onednn"),
        ("auto", CPU, "auto", "fused"),
        ("auto", CPU, None, "fused"),
    ],
)
def test_cpu_layers_follow_the_option_then_the_record_then_the_vendor(
    monkeypatch: pytest.MonkeyPatch,
    option: Any,
    device: torch.device,
    recorded: str | None,
    expected: str,
) -> None:
    monkeypatch.setattr(defaults, "vendor_cpu_layers", lambda *, bf16: "fused")
    before = None if recorded is None else {"cpu_layers": recorded}
    assert with_defaults(Train(cpu_layers=option), 100, device, before).cpu_layers == expected


@pytest.mark.parametrize(
    ("flags", "instructions", "fast"),
    [
        ("flags\t\t: fpu avx512_bf16 amx_bf16 amx_tile", True, True),
        ("flags\t\t: fpu avx512_bf16", True, False),
        ("flags\t\t: fpu avx2 avx512f", False, False),
        ("Features\t: fp asimd bf16", True, False),
        (None, True, False),
    ],
)
def test_bf16_is_chosen_with_matrix_units_and_warned_about_without_instructions(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    flags: str | None,
    instructions: bool,
    fast: bool,
) -> None:
    file = tmp_path / "cpuinfo"
    if flags is not None:
        file.write_text(f"model name\t: some CPU\n{flags}\n")
    monkeypatch.setattr(machine, "CPU_FACTS", file)
    assert (has_bf16(CPU), has_bf16(CPU, fast=True)) == (instructions, fast)
    chosen = with_defaults(Train(precision="auto"), 100, CPU, None).precision
    assert chosen == ("bf16" if fast else "fp32")
