"""Measure `hvdrec prepare` on generated samples: rows per second, CPU time and peak memory.

The samples have seven columns: user, item, four numbers and small categories, and a history of 50
items. With --baseline, another checkout prepares the same samples in turns, and the files of all
shards must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvdrec.storage.artifacts import write_artifact

REPOSITORY = Path(__file__).parents[2]
USERS, ITEMS, HISTORY, PART_ROWS, GROUP_ROWS = 100_000, 20_000, 50, 524_288, 65_536
CONFIG = """
name = "speed"
paths.work = "."
samples = {{ user = "user", item = "item" }}
features = [
    {{ name = "user", dtype = "{dtype}" }},
    {{ name = "history", kind = "sequence", dtype = "{dtype}", max_length = 50 }},
    {{ name = "age", kind = "numeric", dtype = "float" }},
    {{ name = "item", side = "item", dtype = "{dtype}" }},
    {{ name = "price", side = "item", kind = "numeric", dtype = "float", transform = "quantile" }},
    {{ name = "hour", side = "scene", dtype = "int", default = 12 }},
    {{ name = "device", side = "scene", default = "phone" }},
]
"""


@dataclass(frozen=True)
class Measurement:
    """One run of the command.

    Attributes:
        rows_per_second: Rows of all splits by wall time, starting the command included.
        cpu_seconds: User and system time of all its processes.
        peak_memory_mb: Largest sum of their resident memory (10^6 bytes), sampled every 0.1 s.
    """

    rows_per_second: float
    cpu_seconds: float
    peak_memory_mb: float


def write_samples(folder: Path, rows: int, dtype: str) -> None:
    """Write samples: `rows` training rows, and a twentieth of that in each other split."""
    random = np.random.default_rng(0)
    with write_artifact(folder / "samples", "samples") as draft:
        for split, count in (("train", rows), ("validation", rows // 20), ("test", rows // 20)):
            (draft / split).mkdir()
            for part, start in enumerate(range(0, count, PART_ROWS)):
                table = _rows(random, min(PART_ROWS, count - start), dtype)
                file = draft / split / f"part-{part:05d}.parquet"
                pq.write_table(table, file, row_group_size=GROUP_ROWS, compression="zstd")
        users = _rows(random, USERS, dtype).select(["history", "age"])
        users = users.append_column("user", _keys(np.arange(USERS), "u", dtype))
        pq.write_table(users, draft / "users_train.parquet")
        items = {"item": _keys(np.arange(ITEMS), "i", dtype), "price": random.gamma(2, 5, ITEMS)}
        pq.write_table(pa.table(items), draft / "items.parquet")


def _rows(random: np.random.Generator, rows: int, dtype: str) -> pa.Table:
    lengths = random.integers(HISTORY // 2, HISTORY * 3 // 2 + 1, rows).clip(max=HISTORY)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    items = (ITEMS * random.random(lengths.sum() + rows) ** 3).astype(np.int64)
    history = pa.ListArray.from_arrays(offsets, _keys(items[rows:], "i", dtype))
    devices = pa.array(["phone", "tablet", "television", None])
    return pa.table(
        {
            "user": _keys(random.integers(0, USERS, rows), "u", dtype),
            "item": _keys(items[:rows], "i", dtype),
            "history": history,
            "age": random.normal(40, 10, rows),
            "price": random.gamma(2, 5, rows).round(2),
            "hour": random.integers(0, 24, rows),
            "device": devices.take(pa.array(random.integers(0, 4, rows))),
            "label": pa.array(random.random(rows) < 0.3).cast(pa.float32()),
            "weight": np.ones(rows, np.float32),
        }
    )


def _keys(numbers: NDArray[np.int64], prefix: str, dtype: str) -> pa.Array:
    if dtype == "int":
        return pa.array(numbers)
    distinct = pa.array([f"{prefix}{number:07d}" for number in range(max(USERS, ITEMS))])
    return distinct.take(pa.array(numbers))


def measure(checkout: Path, folder: Path, rows: int, workers: int) -> Measurement:
    """Run the command of a checkout in the folder of the samples."""
    command = [sys.executable, "-m", "hvdrec", "prepare", "run.toml", "--overwrite"]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    used, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.Popen(
        [*command, "--workers", str(workers)],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, _resident(process.pid))
        time.sleep(0.1)
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"hvdrec prepare failed with exit code {process.returncode}")
    cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    return Measurement(round(rows / seconds), round(cpu, 2), round(peak / 1e6, 1))


def _resident(pid: int) -> int:
    total = 0
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def shard_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each shard and of the encoded tables of users and items."""
    files = json.loads((folder / "features" / "manifest.json").read_text())["files"]
    encoded = ("train/", "validation/", "test/", "users", "items")
    return {
        name: facts["sha256"]
        for name, facts in files.items()
        if name.endswith(".parquet") and name.startswith(encoded)
    }


def main() -> None:
    """Parse options, measure, print a line of JSON per run and the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="example: scripts/benchmark_prepare --rows 1000000 --baseline ../hvdrec-old",
    )
    parser.add_argument("--rows", type=int, default=2_000_000, help="training rows")
    parser.add_argument("--dtype", choices=("string", "int"), default="string", help="of keys")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--turns", type=int, default=3, help="runs of each checkout")
    parser.add_argument("--baseline", type=Path, help="another checkout to compare with")
    options = parser.parse_args()
    total = options.rows + 2 * (options.rows // 20)
    checkouts = {"this": REPOSITORY}
    if options.baseline:
        checkouts = {"baseline": options.baseline.absolute()} | checkouts
    results: dict[str, list[Measurement]] = {name: [] for name in checkouts}
    contents: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory(prefix="hvdrec-prepare-") as scratch:
        folder = Path(scratch)
        (folder / "run.toml").write_text(CONFIG.format(dtype=options.dtype))
        write_samples(folder, options.rows, options.dtype)
        for _ in range(options.turns):
            for name, checkout in checkouts.items():
                figures = measure(checkout, folder, total, options.workers)
                results[name].append(figures)
                contents[name] = shard_files(folder)
                print(json.dumps({"checkout": name, "rows": total, **asdict(figures)}), flush=True)
    if options.baseline:
        if contents["baseline"] != contents["this"]:
            raise SystemExit("the shards of the two checkouts differ")
        for figure in ("rows_per_second", "cpu_seconds", "peak_memory_mb"):
            pairs = zip(results["this"], results["baseline"], strict=True)
            ratios = [getattr(this, figure) / getattr(other, figure) for this, other in pairs]
            print(f"{figure}: this / baseline = {statistics.median(ratios):.2f} (median)")


if __name__ == "__main__":
    main()
