"""The parts of scripts/gpu_check that run in a process of their own, or on two ranks.

A part raises an error if the device computes something wrong. The last line that it prints on rank
0 is a JSON object of its figures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hvdrec.config import Config
from hvdrec.data.loader import ShardLoader
from hvdrec.embeddings.alltoall import start_alltoall
from hvdrec.embeddings.setup import make_tables
from hvdrec.parallel import ranks
from hvdrec.parallel.ranks import World
from hvdrec.training import checkpoint
from hvdrec.training.build import build_model
from hvdrec.training.machine import has_bf16, pick_device
from hvdrec.training.optimizer import make_optimizer, optimizer_tensors
from hvdrec.training.pipeline import make_preparer, steps
from hvdrec.training.state import TrainState
from hvdrec.training.step import take_step
from tests.parallel.programs import collectives, gradients
from tests.small_model import SIZES, of_type, small_batch, small_config

CPU = torch.device("cpu")
REFERENCE = "reference.safetensors"
TOLERANCE = 1e-10
"""Largest allowed difference of float64 results."""
FP32_TOLERANCE, BF16_TOLERANCE = 2e-3, 5e-2
"""Largest allowed relative difference of a step's loss from the CPU's in fp32."""
LOSS_STEPS, RESUME_STEPS, ROWS = 30, 12, 256


@dataclass(frozen=True)
class Task:
    """What a part checks: the device, the directory for its files, and for how long."""

    device: torch.device
    folder: Path
    seconds: float


# Contracts on one rank


def check_gradients(task: Task) -> dict[str, Any]:
    """Gradients, losses and tables of all settings equal those of the CPU, in float64."""
    expected = reference(task.folder)
    return compare(expected, gradients.take_all(World(), task.device, fbgemm=False))


def reference(folder: Path) -> dict[str, Tensor]:
    """Return the results of the CPU; compute them on the first call."""
    file = folder / REFERENCE
    if not file.is_file():
        draft = file.with_suffix(f".{os.getpid()}")
        save_file(gradients.take_all(World(), CPU, fbgemm=False), draft)
        draft.rename(file)
    return load_file(file)


def compare(expected: dict[str, Tensor], got: dict[str, Tensor]) -> dict[str, Any]:
    """Return the largest difference; raise AssertionError if one is larger than allowed."""
    largest = 0.0
    for name, value in got.items():
        difference = float((value - expected[name]).abs().max())
        if not difference <= TOLERANCE:  # also if it is NaN
            raise AssertionError(f"{name} differs by {difference:.2g}, allowed {TOLERANCE:g}")
        largest = max(largest, difference)
    settings = {name.split("/")[0] for name in got}
    return {"settings": len(settings), "largest_difference": largest, "allowed": TOLERANCE}


def check_losses(task: Task) -> dict[str, Any]:
    """Training in fp32 and in bf16 has the losses of the CPU's fp32, up to rounding."""
    expected = losses(CPU, "fp32")
    figures: dict[str, Any] = {"steps": LOSS_STEPS}
    allowed = {"fp32": FP32_TOLERANCE, "bf16": BF16_TOLERANCE}
    for precision, limit in allowed.items():
        if precision == "bf16" and not has_bf16(task.device):
            figures["bf16"] = "the device has no bf16 instructions"
            continue
        pairs = zip(expected, losses(task.device, precision), strict=True)
        difference = max(abs(got - loss) / abs(loss) for loss, got in pairs)
        if not difference <= limit:
            raise AssertionError(
                f"{precision} losses differ by {difference:.2g} of the CPU's, allowed {limit:g}"
            )
        figures[f"largest_difference_{precision}"] = difference
    return figures


def losses(device: torch.device, precision: str) -> list[float]:
    """Train the small model and return the loss of each step."""
    config = small_config("joint", precision=precision, warmup_steps=0)
    return [float(loss) for loss in train(new_state(config, device), 0, LOSS_STEPS)]


def new_state(config: Config, device: torch.device) -> TrainState:
    """Return a small model in float32, its tables and optimizer on a device."""
    torch.manual_seed(config.seed)
    model = build_model(config, SIZES, with_tables=False).to(device)
    tables = make_tables(config, SIZES, World(), device)
    # All random items are equally frequent.
    log_probability = torch.full((SIZES["item_id"],), -math.log(9), device=device)
    return TrainState(config, model, tables, make_optimizer(model, config.train), log_probability)


def train(state: TrainState, start: int, stop: int) -> list[Tensor]:
    """Take the steps `start` to `stop` (exclusive); return their losses."""
    state.model.train()
    prepare = make_preparer(state.tables, state.config, start)
    batches = (
        prepare(n - start, replace(of_type(small_batch(ROWS, seed=n), torch.float32), tasks=None))
        for n in range(start, stop)
    )
    device = state.tables.device
    return [
        take_step(state, step, start + n, 0.0).total.cpu()
        for n, step in enumerate(steps(batches, state.tables, device))
    ]


def check_resume(task: Task) -> dict[str, Any]:
    """A run that continues from a checkpoint equals an uninterrupted one, bit for bit."""
    torch.use_deterministic_algorithms(True)
    config = small_config("joint", warmup_steps=0)
    ranker = replace(config.model.ranker, dropout=0.2)
    config = replace(config, model=replace(config.model, ranker=ranker))
    half = RESUME_STEPS // 2
    whole = new_state(config, task.device)
    expected = train(whole, 0, RESUME_STEPS)
    first = new_state(config, task.device)
    got = train(first, 0, half)
    run = task.folder / "run"
    checkpoint.save(run, checkpoint.Position(step=half), first, {})
    second = new_state(replace(config, seed=config.seed + 1), task.device)
    second = replace_config(second, config)
    position = checkpoint.restore(run, second)
    assert position.step == half
    got += train(second, half, RESUME_STEPS)
    assert [float(a) for a in got] == [float(a) for a in expected], "the losses differ"
    reference, resumed = all_tensors(whole), all_tensors(second)
    differ = [name for name, value in reference.items() if not torch.equal(value, resumed[name])]
    assert not differ, f"these tensors differ after the resumed run: {', '.join(differ)}"
    return {"steps": RESUME_STEPS, "tensors_equal": len(reference)}


def replace_config(state: TrainState, config: Config) -> TrainState:
    """Return a state whose weights have other initial values, with a configuration."""
    return TrainState(config, state.model, state.tables, state.optimizer, state.log_probability)


def all_tensors(state: TrainState) -> dict[str, Tensor]:
    """Return the weights, tables and optimizer state by name."""
    tensors = {**state.model.state_dict(), **optimizer_tensors(state.model, state.optimizer)}
    for kernel in state.tables.kernels:
        tensors[f"table {kernel.weight.shape[1]}"] = kernel.weight
        tensors |= {f"table {key}": value for key, value in kernel.state.items()}
    return tensors


def check_loader(task: Task) -> dict[str, Any]:
    """Batches from pinned memory arrive on the device with the values of the shards."""
    from training import work_a

    config = work_a(task.folder, task.device)

    def epoch(device: torch.device) -> list[Any]:
        options = replace(config, train=replace(config.train, device=device.type))
        loader = ShardLoader.from_config(options, "train", 4096, 0, 1, shuffle=True)
        return list(loader.epoch(0))

    pinned, plain = epoch(task.device), epoch(CPU)
    assert len(pinned) == len(plain)
    is_cuda = task.device.type == "cuda"
    started = time.perf_counter()
    for batch, other in zip(pinned, plain, strict=True):
        assert batch.label.is_pinned() == is_cuda, "the batch is not in page-locked memory"
        moved = batch.to(task.device)
        for name, values in moved.features.items():
            assert values.device.type == task.device.type, name
            assert torch.equal(values.cpu(), other.features[name]), name
        assert torch.equal(moved.label.cpu(), other.label)
    return {
        "batches": len(pinned),
        "pinned": is_cuda,
        "batches_per_second_with_comparison": len(pinned) / (time.perf_counter() - started),
    }


# Contracts on two ranks


def check_exchange(task: Task) -> dict[str, Any]:
    """All collectives are right; then alltoalls of random sizes, many of them empty, for a time."""
    world = ranks.init()
    collectives.main(task.device.type)
    started, rounds, rows = time.perf_counter(), 0, 0
    while True:
        # All ranks draw the same sizes; a third of the messages is empty, some rounds are.
        random = np.random.default_rng(rounds)
        counts = random.integers(0, 3000, (world.size, world.size))
        counts[random.random(counts.shape) < 1 / 3] = 0
        counts[:, random.random(world.size) < 0.05] = 0
        mine, due = counts[world.rank], counts[:, world.rank]
        sent = torch.cat([message(world.rank, r, n, rounds) for r, n in enumerate(mine)])
        splits = torch.from_numpy(mine.astype(np.int32))
        handle = start_alltoall(sent.to(task.device), splits, f"soak/{rounds % 2}")
        received, received_counts = ranks.wait(handle)
        assert received.device.type == task.device.type
        assert received_counts.tolist() == due.tolist(), f"round {rounds}: wrong splits"
        expected = torch.cat([message(r, world.rank, n, rounds) for r, n in enumerate(due)])
        assert torch.equal(received.cpu(), expected), f"round {rounds}: wrong rows"
        rounds, rows = rounds + 1, rows + len(received)
        if rounds % 20 == 0:
            seconds = time.perf_counter() - started
            if ranks.broadcast_object(seconds > task.seconds):
                return {"rounds": rounds, "rounds_per_second": rounds / seconds, "rows": rows}


def message(sender: int, receiver: int, rows: int, number: int) -> Tensor:
    """Return the rows that one rank sends another in a round, float32 [rows, 16]."""
    start = float(1000 * sender + 100 * receiver + number % 97)
    return (start + torch.arange(rows * 16, dtype=torch.float32)).view(rows, 16)


def check_two_ranks(task: Task) -> dict[str, Any]:
    """Ranks that share a global batch give the gradients of one rank on the CPU, in float64."""
    world = ranks.init()
    expected: dict[str, Tensor] = {}
    if world.is_first:
        with ranks.single_rank():
            expected = reference(task.folder)
    got = gradients.take_all(world, task.device, fbgemm=False)
    return compare(expected, got) if world.is_first else {}


def check_training(task: Task, precision: str) -> dict[str, Any]:
    """Train work (a), and measure the speed and where the time goes."""
    from training import measure

    return measure(task.folder, task.device, precision, task.seconds)


PROGRAMS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "gradients": check_gradients,
    "losses": check_losses,
    "resume": check_resume,
    "loader": check_loader,
    "exchange": check_exchange,
    "two-ranks": check_two_ranks,
    "train-fp32": lambda task: check_training(task, "fp32"),
    "train-bf16": lambda task: check_training(task, "bf16"),
}


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PROGRAMS)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--folder", type=Path, required=True, help="directory for files")
    parser.add_argument("--seconds", type=float, default=10, help="length of a soak or measurement")
    parser.add_argument("--launched", action="store_true", help="mpirun or horovodrun started it")
    options = parser.parse_args()
    world = ranks.init() if options.launched else World()
    device = pick_device(options.device, world)
    figures = PROGRAMS[options.part](Task(device, options.folder, options.seconds))
    if ranks.current().is_first:
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
