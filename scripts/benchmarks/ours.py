"""hvdrec's side of the benchmarks: the training step of `hvdrec train`, with the reader.

Prints one JSON line, as the peers' programs do; under horovodrun or mpirun the first rank prints it
for all ranks. ``--only-mlp`` runs the same MLP, optimizer and loss on vectors in memory, without
tables and reader: an upper bound on the speed of a step. It uses torch's layers, or hvdrec's with
``--own-layers``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import resource
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from work import (
    BATCH,
    FEATURES,
    NUMBERS,
    WIDTH,
    config_a,
    config_b,
    table_sizes,
    with_options,
)

from hvdrec.config import Config
from hvdrec.data.loader import ShardLoader
from hvdrec.embeddings.setup import make_tables
from hvdrec.models.cpu_layers import use_cpu_layers, vendor_cpu_layers
from hvdrec.models.layers import Mlp
from hvdrec.parallel import ranks
from hvdrec.parallel.gradients import broadcast_state
from hvdrec.parallel.ranks import World
from hvdrec.training.build import build_model
from hvdrec.training.machine import no_gc_pauses, set_up_process
from hvdrec.training.optimizer import make_optimizer
from hvdrec.training.pipeline import Step, make_preparer, steps
from hvdrec.training.state import TrainState
from hvdrec.training.step import take_step

CPU = torch.device("cpu")


def trained(
    config: Config,
    sizes: dict[str, int],
    threads: int,
    world: World | None = None,
    device: torch.device = CPU,
) -> tuple[TrainState, ShardLoader]:
    """Set up training as hvdrec.training.job does; on all ranks if `world` is None."""
    world = world or ranks.init()
    set_up_process(threads)
    torch.manual_seed(0)
    model = build_model(config, sizes, with_tables=False).to(device)
    tables = make_tables(config, sizes, world, device)
    broadcast_state(dict(model.state_dict()))
    rows = math.ceil(config.train.batch_size / world.size)
    loader = ShardLoader.from_config(config, "train", rows, world.rank, world.size, shuffle=True)
    return TrainState(config, model, tables, make_optimizer(model, config.train)), loader


def endless(state: TrainState, loader: ShardLoader) -> Iterator[Step]:
    """Yield the steps of one epoch after another."""
    prepare = make_preparer(state.tables, state.config, 0)
    for prepared in loader.epochs(0, None, prepare):
        yield from steps(prepared, state.tables, state.tables.device)


def run(state: TrainState, loader: ShardLoader, options: argparse.Namespace) -> dict[str, Any]:
    """Train for the given time and return the figures of all ranks together."""
    state.model.train()
    world = ranks.current()
    batches = endless(state, loader)
    times = [time.perf_counter()]
    for number in range(options.warmup):
        take_step(state, next(batches), number, 0.0)
        times.append(time.perf_counter())
    wanted = options.steps
    if world.size > 1 and not wanted:
        # Ranks must agree on the end: they count steps, not seconds.
        half = options.warmup // 2
        step_seconds = (times[-1] - times[half]) / (options.warmup - half)
        wanted = ranks.broadcast_object(max(1, round(options.seconds / step_seconds)))
    if options.meet:
        meet(options.meet)
    waited, sent = loader.waited_seconds, state.tables.sent_bytes
    started = time.perf_counter()
    count = rows = 0
    while count < wanted if wanted else time.perf_counter() - started < options.seconds:
        step = next(batches)
        loss = take_step(state, step, options.warmup + count, 0.0)
        count += 1
        rows += step.batch.rows
    seconds = time.perf_counter() - started
    mine = facts(rows, count, seconds, float(loss.total))
    mine["bytes_per_step"] = (state.tables.sent_bytes - sent) / count + dense_bytes(state)
    mine["reader_wait"] = (loader.waited_seconds - waited) / seconds
    everyone = ranks.gather_objects(mine)
    return {
        **mine,
        "samples_per_second": sum(rank["samples_per_second"] for rank in everyone),
        "peak_memory_mb": max(rank["peak_memory_mb"] for rank in everyone),
        "reader_wait": max(rank["reader_wait"] for rank in everyone),
        "ranks": world.size,
        "kernels": [kernel.name for kernel in state.tables.kernels],
    }


def dense_bytes(state: TrainState) -> float:
    """Return the bytes of dense gradients that a rank sends in a step of ring-allreduce."""
    size = ranks.current().size
    return 8 * sum(p.numel() for p in state.model.parameters()) * (size - 1) / size


def meet(folder: Path) -> None:
    """Wait until another process with the same folder has reached this point."""
    (folder / str(os.getpid())).touch()
    latest = time.monotonic() + 120
    while len(list(folder.iterdir())) < 2:
        if time.monotonic() > latest:
            raise SystemExit(f"--meet {folder}: nobody else came within 120 s")
        time.sleep(0.001)


def run_mlp(options: argparse.Namespace) -> dict[str, Any]:
    """Train only the MLP of work (a), on vectors in memory."""
    set_up_process(options.threads)
    torch.manual_seed(0)
    widths = [FEATURES * WIDTH + NUMBERS, *options.hidden]
    hidden: torch.nn.Module = Mlp(widths[0], options.hidden, 0.0)
    if options.own_layers:
        use_cpu_layers(hidden, vendor_cpu_layers(bf16=options.precision == "bf16"))
    network: Any = torch.nn.Sequential(hidden, torch.nn.Linear(widths[-1], 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    forward = torch.compile(network) if options.compile else network
    vectors = [torch.randn(options.batch, widths[0]) for _ in range(8)]
    labels = [torch.randint(0, 2, (options.batch,)).float() for _ in range(8)]

    def step(number: int) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            logit = forward(vectors[number % 8]).squeeze(-1)
        loss = functional.binary_cross_entropy_with_logits(logit.float(), labels[number % 8])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss.detach())

    for number in range(options.warmup):
        step(number)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < options.seconds:
        loss = step(count)
        count += 1
    return facts(count * options.batch, count, time.perf_counter() - started, loss)


def facts(samples: int, count: int, seconds: float, loss: float) -> dict[str, Any]:
    """Return the figures that every program of the benchmarks prints."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "fbgemm-gpu-cpu", "horovod", "numpy", "hvdrec"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "samples_per_second": samples / seconds,
        "steps": count,
        "seconds": seconds,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "loss": loss,
        "versions": versions,
    }


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", choices=["a", "b"], default="a")
    parser.add_argument("--data", type=Path, help="folder that work.py wrote")
    parser.add_argument(
        "--batch", type=int, default=0, help="rows on all ranks (default: the work's)"
    )
    parser.add_argument("--seconds", type=float, default=5, help="seconds to time after warm-up")
    parser.add_argument("--steps", type=int, default=0, help="time so many steps, not seconds")
    parser.add_argument("--warmup", type=int, default=10, help="steps that are not timed")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--hidden", default="400,400,400", help="widths of work (a)'s MLP")
    parser.add_argument("--threads", type=int, default=cores, help="threads of a rank")
    parser.add_argument("--compile", action="store_true", help="--only-mlp with torch.compile")
    parser.add_argument("--placement", default="auto")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument(
        "--meet", type=Path, help="start with the other process that has this folder"
    )
    parser.add_argument("--only-mlp", action="store_true", help="work (a) without tables or reader")
    parser.add_argument("--own-layers", action="store_true", help="--only-mlp with hvdrec's layers")
    options = parser.parse_args()
    options.hidden = tuple(map(int, options.hidden.split(",")))
    if options.only_mlp:
        options.batch = options.batch or BATCH
        print(json.dumps(run_mlp(options)))
        return
    if options.data is None:
        parser.error("--data is needed (but for --only-mlp)")
    config = config_b(options.data)
    if options.work == "a":
        config = config_a(options.data, options.hidden)
    config = with_options(
        config,
        precision=options.precision,
        placement=options.placement,
        kernel=options.kernel,
        batch=options.batch or config.train.batch_size,
    )
    state, loader = trained(config, table_sizes(options.data), options.threads)
    with no_gc_pauses():
        result = run(state, loader, options)
    if ranks.current().is_first:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
