"""Measure `hvdrec samples` on a generated log, beside DuckDB's reading and writing of the log.

The log has seven columns: user, item and time, four features and a click. Users have 100 rows on
average, 30 % of them clicks. Users and items follow Zipf-like distributions. Each sample gets a
history of the user's last 50 clicks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

REPOSITORY = Path(__file__).parents[2]
BLOCK_ROWS = 1_048_576
CONFIG = """
name = "speed"
features = [
    { name = "user_id" },
    { name = "item_id", side = "item" },
    { name = "clicked_items", kind = "sequence", shares = "item_id", max_length = 50 },
    { name = "hour", side = "scene", dtype = "int" },
    { name = "device", side = "scene" },
    { name = "price", side = "scene", kind = "numeric", dtype = "float" },
]

[paths]
raw = "."
work = "work"

[samples]
interactions = "log.parquet"
time = "time"
label = "clicked"
history = [{ name = "clicked_items", length = 50 }]
"""
READ_AND_WRITE = """
import duckdb, sys
connection = duckdb.connect()
connection.execute("SET threads = 2; SET enable_progress_bar = false")
connection.execute("COPY (SELECT * FROM 'log.parquet') TO 'copy.parquet' (COMPRESSION zstd)")
"""


@dataclass(frozen=True)
class Measurement:
    """One run of a command.

    Attributes:
        rows_per_second: Rows of the log by wall time, starting the command included.
        seconds: Wall time.
        cpu_seconds: User and system time.
        peak_memory_mb: Largest resident memory of the process (10^6 bytes).
    """

    rows_per_second: float
    seconds: float
    cpu_seconds: float
    peak_memory_mb: float


def write_log(file: Path, rows: int) -> None:
    """Write a log with so many rows."""
    random = np.random.default_rng(0)
    users, items = max(10, rows // 100), max(10, min(rows // 100, 100_000))
    user_keys, item_keys = random.permutation(users), random.permutation(items)
    devices = pa.array(["phone", "tablet", "desktop", "television"])
    writer = None
    for start in range(0, rows, BLOCK_ROWS):
        count = min(BLOCK_ROWS, rows - start)
        table = pa.table(
            {
                "user_id": user_keys[_ranks(random, users, count, 0.7)],
                "item_id": item_keys[_ranks(random, items, count, 1.05)],
                "time": 1_700_000_000 + random.integers(0, 30 * 86_400, count),
                "hour": random.integers(0, 24, count),
                "device": devices.take(pa.array(random.integers(0, 4, count))),
                "price": random.gamma(2, 10, count).round(2),
                "clicked": (random.random(count) < 0.3).astype(np.int64),
            }
        )
        writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
        writer.write_table(table, row_group_size=131_072)
    if writer:
        writer.close()


def _ranks(random: np.random.Generator, most: int, rows: int, skew: float) -> NDArray[np.int64]:
    """Draw ranks below `most`, with a density that falls as rank ** -skew."""
    power = 1 - skew
    drawn = (random.random(rows) * ((most + 1.0) ** power - 1) + 1) ** (1 / power)
    return np.minimum(drawn.astype(np.int64) - 1, most - 1)


def measure(command: Sequence[str], folder: Path, rows: int) -> Measurement:
    """Run a Python command in a folder, on this checkout."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    start = time.monotonic()
    process = psutil.Popen(
        [sys.executable, *command], cwd=folder, env=environment, stderr=subprocess.PIPE
    )
    with process.stderr:
        for line in process.stderr:
            print(line.decode(), end="", file=sys.stderr)
    # `wait4` also returns the largest resident memory of this one process.
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    if status:
        raise SystemExit(f"{' '.join(command[:3])} failed")
    cpu = used.ru_utime + used.ru_stime
    return Measurement(
        round(rows / seconds), round(seconds, 2), round(cpu, 2), round(used.ru_maxrss / 976.5625, 1)
    )


def main() -> None:
    """Parse options, measure in turns, print a line of JSON per run and the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="example: scripts/benchmark_samples --rows 20000000 --folder /tmp",
    )
    parser.add_argument("--rows", type=int, default=2_000_000, help="rows of the log")
    parser.add_argument("--turns", type=int, default=1, help="runs of each command")
    parser.add_argument("--folder", type=Path, help="where to make a temporary folder")
    options = parser.parse_args()
    commands = {
        "DuckDB": ["-c", READ_AND_WRITE],
        "hvdrec samples": ["-m", "hvdrec", "samples", "run.toml", "--overwrite"],
    }
    with tempfile.TemporaryDirectory(prefix="hvdrec-samples-", dir=options.folder) as scratch:
        folder = Path(scratch)
        (folder / "run.toml").write_text(CONFIG)
        write_log(folder / "log.parquet", options.rows)
        ratios, processor = [], []
        for _ in range(options.turns):
            found = {n: measure(c, folder, options.rows) for n, c in commands.items()}
            for name, figures in found.items():
                print(json.dumps({"command": name, "rows": options.rows, **asdict(figures)}))
            one, other = found.values()
            ratios.append(other.seconds / one.seconds)
            processor.append(other.cpu_seconds / one.cpu_seconds)
    print(f"hvdrec samples / DuckDB's read and write: wall time {np.median(ratios):.2f}, ", end="")
    print(f"processor time {np.median(processor):.2f} (medians)")


if __name__ == "__main__":
    main()
