"""Train work (a) with plain Horovod, without hvdrec; every rank holds all rows of all tables.

``--tables dense``: the gradient of a whole table is one dense tensor, which Horovod sums.
``--tables sparse``: torch's sparse gradients and Horovod's DistributedOptimizer, which gathers row
numbers and values from all ranks.

Start it like a training job: ``horovodrun -np 4 … python horovod_peer.py …``. The first rank prints
the same JSON line as every program of the benchmarks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import time
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 16


class Network(nn.Module):
    """Embedding tables and an MLP over their vectors and the dense inputs."""

    def __init__(self, tables: int, rows: int, numbers: int, *, sparse: bool) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, WIDTH, sparse=sparse) for _ in range(tables))
        widths = [tables * WIDTH + numbers, 400, 400, 400]
        layers: list[nn.Module] = []
        for width, size in itertools.pairwise(widths):
            layers += [nn.Linear(width, size), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        vectors = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        logit: Tensor = self.layers(torch.cat([*vectors, dense], dim=1))
        return logit.squeeze(-1)


def mine(data: NDArray[Any], batch: int) -> Tensor:
    """Return this rank's share of data [batches, rows, ...], in batches of the chosen size."""
    rows = data.reshape(-1, *data.shape[2:])
    cut = rows[: len(rows) // batch * batch].reshape(-1, batch, *data.shape[2:])
    size = batch // hvd.size()
    return torch.from_numpy(cut[:, hvd.rank() * size : (hvd.rank() + 1) * size].copy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory with work_a.npz")
    parser.add_argument("--tables", choices=["dense", "sparse"], required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, required=True, help="rows on all ranks together")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args()
    hvd.init()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    with np.load(options.data / "work_a.npz", allow_pickle=False) as data:
        ids, dense, label = (mine(data[name], options.batch) for name in ("ids", "dense", "label"))
        rows = int(data["rows"])
    sparse = options.tables == "sparse"
    network = Network(ids.shape[2], rows, dense.shape[2], sparse=sparse)
    hvd.broadcast_parameters(network.state_dict(), root_rank=0)
    # SGD, because it is the cheapest optimizer.
    optimizer: Any = torch.optim.SGD(network.parameters(), lr=0.01)
    optimizer = hvd.DistributedOptimizer(optimizer, network.named_parameters(), op=hvd.Average)
    total = options.warmup + options.steps
    started = time.perf_counter()
    for number in range(total):
        if number == options.warmup:
            started = time.perf_counter()
        place = number % len(ids)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            logit = network(ids[place], dense[place])
        loss = functional.binary_cross_entropy_with_logits(logit.float(), label[place])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - started
    if hvd.rank() == 0:
        facts = {
            "samples_per_second": options.steps * len(label[0]) * hvd.size() / seconds,
            "steps": options.steps,
            "seconds": seconds,
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "loss": float(loss.detach()),
            "versions": {"torch": torch.__version__},
        }
        print(json.dumps(facts))


if __name__ == "__main__":
    main()
