"""Measure the label join: exposures with feedback, beside DuckDB's read and write of the exposures.

The exposures have seven columns: request, user, item, time, hour, device and position. A tenth as
many clicks are joined by request and item within 30 minutes. Both copies are Parquet files. Each
step runs in a process of its own, with DuckDB's default memory limit and two threads.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duckdb

from hvdrec.config.loading import load_config
from hvdrec.samples.engine import connect
from hvdrec.samples.exposures import join_feedback
from hvdrec.samples.label_tables import open_tables
from hvdrec.samples.spec import SampleSpec

CONFIG = """
name = "speed"
features = [{ name = "user_id" }, { name = "item_id", side = "item" }]
[samples]
interactions = "exposures.parquet"
time = "t"
label = "click_count > 0"
[[samples.feedback]]
name = "click"
table = "clicks.parquet"
on = ["request_id", "item_id"]
window = "30m"
"""
EXPOSURES = """
SELECT 'r' || (i // 10) AS request_id, 'u' || (hash(i // 10) % 1000000) AS user_id,
    'i' || (hash(i) % 100000) AS item_id, 1700000000 + i // 100 AS t,
    CAST(i // 360000 % 24 AS INTEGER) AS hour, 'device' || (hash(i, 1) % 3)
    AS device, CAST(i % 10 AS INTEGER) AS position
FROM range({rows}) AS rows(i)
"""
CLICKS = """
SELECT request_id, item_id, t + CAST(hash(request_id, item_id) % 2400 AS BIGINT) AS t
FROM '{exposures}' WHERE hash(request_id, item_id, 2) % 10 = 0
"""


def generate(folder: Path, rows: int) -> None:
    """Write the tables."""
    exposures = folder / "exposures.parquet"
    with duckdb.connect() as connection:
        for query, file in (
            (EXPOSURES.format(rows=rows), exposures),
            (CLICKS.format(exposures=exposures), folder / "clicks.parquet"),
        ):
            connection.execute(f"COPY ({query}) TO '{file}' (FORMAT parquet)")
    (folder / "run.toml").write_text(CONFIG)


def copy(folder: Path) -> None:
    """Read and write the exposures with DuckDB."""
    with duckdb.connect() as connection:
        connection.execute("SET threads = 2")
        connection.execute("SET preserve_insertion_order = false")
        source, target = folder / "exposures.parquet", folder / "copy.parquet"
        options = "FORMAT parquet, COMPRESSION zstd"
        connection.execute(f"COPY (SELECT * FROM '{source}') TO '{target}' ({options})")


def join(folder: Path, *, is_written: bool = False) -> None:
    """Join the exposures with the clicks; write the result if `is_written`, else store it."""
    spec = SampleSpec.of(load_config(folder / "run.toml"))
    with connect() as engine:
        engine.connection.execute("SET threads = 2")
        exposures = engine.read(folder, "exposures.parquet", spec.declared)
        tables = open_tables(engine, spec, folder, exposures, folder / "exposures.parquet")
        joined = join_feedback(engine, spec, tables)
        if is_written:
            engine.save(joined.table, folder / "joined.parquet")
        else:
            engine.materialize(joined.table)
        joined.save(engine, folder / "unsettled")
    print(json.dumps(joined.facts))


STEPS = {"copy": copy, "join": join, "write": functools.partial(join, is_written=True)}


def measure(step: str, folder: Path) -> dict[str, float]:
    """Run a step in a process of its own; return its wall and CPU time and its peak memory."""
    subprocess.run(["rm", "-rf", str(folder / "unsettled")], check=True)
    command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
    start = time.monotonic()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds = time.monotonic() - start
    facts: dict[str, float] = json.loads(output.splitlines()[-1])
    return {"seconds": round(seconds, 2), **facts}


def main() -> None:
    """Parse options, generate tables, and print the seconds and memory of each step."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="example: scripts/benchmark_label_join --rows 2000000",
    )
    parser.add_argument(
        "--rows", type=int, default=2_000_000, help="exposures (default: 2,000,000)"
    )
    parser.add_argument("--turns", type=int, default=1, help="runs of each step (default: 1)")
    parser.add_argument("--step", choices=tuple(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        STEPS[options.step](options.folder)
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9
        print(json.dumps({"cpu_seconds": round(cpu, 2), "peak_memory_gb": round(peak, 3)}))
        return
    with tempfile.TemporaryDirectory(prefix="hvdrec-label-join-") as scratch:
        folder = Path(scratch)
        generate(folder, options.rows)
        for _ in range(options.turns):
            facts = {}
            for step in STEPS:
                facts[step] = measure(step, folder)
                print(json.dumps({"step": step, "rows": options.rows, **facts[step]}), flush=True)
            for name in ("seconds", "cpu_seconds"):
                for step in ("join", "write"):
                    ratio = facts[step][name] / facts["copy"][name]
                    print(f"{name}: {step} / copy = {ratio:.2f}")


if __name__ == "__main__":
    main()
