"""Code that the peer programs share: arguments, data, the clock and the line of results.

It runs in each peer's own environment, so it imports only numpy, pyarrow and torch.
"""

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

TABLES, WIDTH_A, NUMBERS = 8, 16, 13
INPUTS_A = TABLES * WIDTH_A + NUMBERS
WIDTH_B, HIDDEN_B, DROPOUT_B, BATCH_B, MAX_GENRES = 32, (256, 128), 0.1, 8192, 6
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Options:
    work: str
    data: Path
    seconds: float
    warmup: int
    precision: str
    hidden: tuple[int, ...]
    threads: int
    adam: str
    distributed: bool


def options(precisions: tuple[str, ...] = ("fp32",), *, distributed: bool = False) -> Options:
    """Parse the command line; a peer names its precisions and whether it supports two ranks."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--work", choices=("a", "b"), required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with work_a.* or work_b.*")
    parser.add_argument("--seconds", type=float, default=5.0, help="timed, after the warm-up")
    parser.add_argument("--warmup", type=int, default=5, help="steps that are not timed")
    parser.add_argument("--precision", choices=precisions, default="fp32")
    parser.add_argument("--hidden", default="400,400,400", help="widths of work a's MLP")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    parser.add_argument("--threads", type=int, default=threads, help="of each process")
    parser.add_argument(
        "--adam",
        choices=("plain", "fused"),
        default="plain",
        help="torch's Adam as the peer's documents have it, or fused (TorchRec: always fused)",
    )
    if distributed:
        parser.add_argument("--distributed", action="store_true", help="run under torchrun")
    given = vars(parser.parse_args())
    given["hidden"] = tuple(int(width) for width in given["hidden"].split(","))
    torch.set_num_threads(given["threads"])
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    return Options(**{"distributed": False} | given)


@dataclass(frozen=True)
class WorkA:
    """ids int64 [batches, 4096, 8], dense float32 [batches, 4096, 13], label float32."""

    ids: torch.Tensor
    dense: torch.Tensor
    label: torch.Tensor
    rows: int

    def batches(self, rank: int = 0, ranks: int = 1) -> list[tuple[torch.Tensor, ...]]:
        """(ids, dense, label) of each batch; of several ranks each has its share of the rows."""
        size = self.label.shape[1] // ranks
        mine = slice(rank * size, (rank + 1) * size)
        parts = self.ids[:, mine], self.dense[:, mine], self.label[:, mine]
        return list(zip(*parts, strict=True))


def work_a(folder: Path) -> WorkA:
    with np.load(folder / "work_a.npz", allow_pickle=False) as file:
        ids, dense, label = (torch.from_numpy(file[name]) for name in ("ids", "dense", "label"))
        return WorkA(ids, dense, label, int(file["rows"]))


@dataclass(frozen=True)
class WorkB:
    """Columns of codes (genres int32 [n, 6], padded with 0), labels, and ids per column."""

    columns: dict[str, np.ndarray[Any, Any]]
    label: np.ndarray[Any, Any]
    sizes: dict[str, int]

    def first(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the first batch: its columns and its labels."""
        columns = {name: torch.from_numpy(full[:BATCH_B]) for name, full in self.columns.items()}
        return columns, torch.from_numpy(self.label[:BATCH_B])


def work_b(folder: Path) -> WorkB:
    sizes: dict[str, int] = json.loads((folder / "work_b.json").read_text())["sizes"]
    table = pq.read_table(folder / "work_b.parquet", columns=[*sizes, "label"])
    columns = {}
    for name in sizes:
        column = table[name].combine_chunks()
        if name == "genres":
            lengths = np.diff(column.offsets.to_numpy())
            columns[name] = np.zeros((len(lengths), MAX_GENRES), np.int32)
            filled = np.arange(MAX_GENRES) < lengths[:, None]
            columns[name][filled] = column.flatten().to_numpy()
        else:
            columns[name] = column.to_numpy().copy()  # torch wants arrays it may write to
    return WorkB(columns, table["label"].to_numpy().copy(), sizes)


class Clock:
    """Hands batches to a training loop, times the steps between them, and ends the loop.

    A step lasts from asking for its batch to asking for the next, so a loader inside
    `batches` is part of it. A batch is a dictionary with "label" or a sequence that ends with it.
    """

    def __init__(self, seconds: float, warmup: int) -> None:
        self.seconds, self.warmup = seconds, warmup
        self.steps, self.samples, self.elapsed = 0, 0, 0.0

    def batches(self, epoch: Iterable[Any], stop: Callable[[bool], bool] = bool) -> Iterator[Any]:
        """Repeats `epoch` until the time is over; `stop` lets ranks agree on the last step."""
        done, start = 0, time.perf_counter()
        while True:
            for batch in epoch:
                yield batch
                done += 1
                if done <= self.warmup:
                    start = time.perf_counter()
                    continue
                self.steps += 1
                self.samples += len(batch["label"] if isinstance(batch, dict) else batch[-1])
                self.elapsed = time.perf_counter() - start
                if stop(self.elapsed >= self.seconds):
                    return


def peak_memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def report(clock: Clock, loss: float, packages: Iterable[str], **more: Any) -> None:
    """Print the line of results; `loss` is that of the first batch after training.

    `more` adds to the line, or replaces figures that one rank alone does not know.
    """
    names = ("torch", "numpy", *packages)
    line = {
        "samples_per_second": clock.samples / clock.elapsed,
        "steps": clock.steps,
        "seconds": clock.elapsed,
        "peak_memory_mb": peak_memory_mb(),
        "loss": loss,
        "versions": {"python": platform.python_version(), **{n: version(n) for n in names}},
        **more,
    }
    print(json.dumps(line), flush=True)
