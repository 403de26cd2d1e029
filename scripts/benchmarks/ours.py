"""hvdrec's side of the benchmarks: the training step as `hvdrec train` takes it, reader included.

Prints one JSON line like the peers' programs. With ``--only-mlp`` the same MLP, optimizer and loss
run on ready-made vectors, without tables and reader: the most that a step could reach.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from work import BATCH, FEATURES, NUMBERS, WIDTH, config_a, with_options

from hvdrec.config import Config
from hvdrec.loader import ShardLoader
from hvdrec.models.recommender import Recommender
from hvdrec.parallel import ranks
from hvdrec.parallel.gradients import broadcast_state
from hvdrec.parallel.setup import make_tables
from hvdrec.training.machine import set_up_process
from hvdrec.training.optimizer import make_optimizer
from hvdrec.training.pipeline import Step, preparer, steps
from hvdrec.training.step import Trainee, take_step


def trained(config: Config, sizes: dict[str, int], threads: int) -> tuple[Trainee, ShardLoader]:
    """Set up as hvdrec.training.loop does."""
    world = ranks.init()
    set_up_process(threads)
    torch.manual_seed(0)
    device = torch.device("cpu")
    model = Recommender(config, sizes, with_tables=False)
    tables = make_tables(config, sizes, world, device)
    broadcast_state(dict(model.state_dict()))
    loader = ShardLoader(
        config.paths.of("features") / "train",
        config.schema,
        batch_size=math.ceil(config.train.batch_size / world.size),
        rank=world.rank,
        world_size=world.size,
        window_rows=config.loader.shuffle_rows,
        workers=config.loader.workers,
        prefetch=config.loader.prefetch,
    )
    return Trainee(config, model, tables, make_optimizer(model, config.train)), loader


def endless(trainee: Trainee, loader: ShardLoader) -> Iterator[Step]:
    """Yield the steps of one epoch after the other."""
    number = 0
    for epoch in itertools.count():
        prepare = preparer(trainee.tables, trainee.config, number, trainee.tables.world.rank)
        for step in steps(loader.prepared(epoch, prepare), trainee.tables, torch.device("cpu")):
            number += 1
            yield step


def run(trainee: Trainee, loader: ShardLoader, options: argparse.Namespace) -> dict[str, Any]:
    """Train for the given time and return the figures."""
    trainee.model.train()
    batches = endless(trainee, loader)
    number = 0
    for number in range(options.warmup):
        loss = take_step(trainee, next(batches), number, 0.0)
    waited, started = loader.waited_seconds, time.perf_counter()
    count = 0
    while True:
        loss = take_step(trainee, next(batches), number + count, 0.0)
        count += 1
        # Ranks must agree on the end: they count steps, not seconds.
        if (
            count == options.steps
            if options.steps
            else time.perf_counter() - started > options.seconds
        ):
            break
    seconds = time.perf_counter() - started
    return {
        **facts(count * trainee.config.train.batch_size, count, seconds, float(loss.total)),
        "reader_wait": (loader.waited_seconds - waited) / seconds,
        "kernels": [kernel.name for kernel in trainee.tables.kernels],
    }


def run_mlp(options: argparse.Namespace) -> dict[str, Any]:
    """Train the MLP of work (a) alone on vectors in memory."""
    set_up_process(options.threads)
    torch.manual_seed(0)
    widths = [FEATURES * WIDTH + NUMBERS, *options.hidden]
    layers: list[torch.nn.Module] = []
    for width, size in itertools.pairwise(widths):
        layers += [torch.nn.Linear(width, size), torch.nn.ReLU()]
    network: Any = torch.nn.Sequential(*layers, torch.nn.Linear(widths[-1], 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    forward = torch.compile(network) if options.compile else network
    vectors = [torch.randn(BATCH, widths[0]) for _ in range(8)]
    labels = [torch.randint(0, 2, (BATCH,)).float() for _ in range(8)]

    def step(number: int) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            logit = forward(vectors[number % 8]).squeeze(-1)
        loss = functional.binary_cross_entropy_with_logits(logit.float(), labels[number % 8])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    for number in range(options.warmup):
        step(number)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < options.seconds:
        loss = step(count)
        count += 1
    return facts(count * BATCH, count, time.perf_counter() - started, loss)


def facts(samples: int, count: int, seconds: float, loss: float) -> dict[str, Any]:
    """Return what every program of the benchmarks prints."""
    return {
        "samples_per_second": samples / seconds,
        "steps": count,
        "seconds": seconds,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "loss": loss,
        "versions": {"torch": torch.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--steps", type=int, default=0, help="steps instead of seconds")
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--hidden", default="400,400,400")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--placement", default="auto")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--only-mlp", action="store_true")
    options = parser.parse_args()
    options.hidden = tuple(map(int, options.hidden.split(",")))
    if options.only_mlp:
        print(json.dumps(run_mlp(options)))
        return
    from dataclasses import replace

    config = with_options(
        config_a(options.data, options.hidden),
        precision=options.precision,
        compiled=options.compile,
        placement=options.placement,
    )
    config = replace(config, parallel=replace(config.parallel, kernel=options.kernel))
    sizes = json.loads((options.data / "features" / "sizes.json").read_text())
    trainee, loader = trained(config, sizes, options.threads)
    result = run(trainee, loader, options)
    if ranks.current().is_first:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
