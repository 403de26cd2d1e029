"""Kill a training job while it writes a checkpoint, and check the files that it leaves."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import hvdrec
from hvdrec.errors import UserError
from hvdrec.storage.artifacts import verify_artifact
from hvdrec.training.pointers import FOLDER, find_checkpoint, has_checkpoint
from tests.small_data import write_small_data

BUCKETS = 1_400_000
"""Number of rows of a table with 8 float32 columns. With the optimizer state, a checkpoint takes
about 50 MB."""
START_SECONDS = 120.0
MOST_CHECKPOINTS = 5
"""Largest number of checkpoints on disk with train.keep = 1: the latest, the best, one being
written, one left by a killed job, and one being removed."""


def kill_writers(folder: Path, kills: int, seed: int) -> bool:
    """Kill a job `kills` times; return True if `latest` was complete each time.

    Each job resumes the run and is killed at a random moment after it starts to write a checkpoint.
    """
    toml = write_small_data(folder)
    text = toml.read_text().replace("buckets = 16", f"buckets = {BUCKETS}")
    toml.write_text(text)
    config = hvdrec.load_config(
        toml,
        {
            "train.checkpoint_every": 1,
            "train.keep": 1,
            "train.epochs": 10_000,
            "train.patience": 10_000,
            "train.cpu_layers": "fused",
            "parallel.kernel": "torch",
        },
    )
    hvdrec.make_samples(config, progress=False)
    hvdrec.prepare(config, workers=1, progress=False)
    run, draw = config.paths.of("run"), random.Random(seed)
    seconds, largest, size, is_right = 0.5, 0, 0, True
    for number in range(kills):
        job = _start(config)
        if not _wait_for_writing(run, job):
            print(f"kill {number}: the job wrote nothing", file=sys.stderr)
            return False
        time.sleep(draw.uniform(0, seconds))
        os.kill(job, signal.SIGKILL)
        os.waitpid(job, 0)
        largest = max(largest, _bytes_below(run))
        if has_checkpoint(run):
            try:
                latest = find_checkpoint(run, "latest")
                verify_artifact(latest.directory, "checkpoint")
                size = max(size, _bytes_below(latest.directory))
            except UserError as error:
                print(f"kill {number}: {error}", file=sys.stderr)
                is_right = False
    is_bounded = largest <= MOST_CHECKPOINTS * max(size, 1)
    print(
        f"{kills} kills: latest {'complete' if is_right else 'NOT COMPLETE'} each time; a "
        f"checkpoint has {size / 1e6:.0f} MB, the run at most {largest / 1e6:.0f} MB"
        f"{'' if is_bounded else ', which is TOO MUCH'}",
        flush=True,
    )
    return is_right and is_bounded


def _start(config: Any) -> int:
    """Start a job in a forked process, which need not import anything; return its id."""
    import hvdrec.training.trainer  # loaded once, by the parent

    job = os.fork()
    if job:
        return job
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        hvdrec.train(config, resume=True, progress=False)
    finally:
        os._exit(1)


def _wait_for_writing(run: Path, job: int) -> bool:
    """Wait until a job writes a checkpoint; return False if it ends or takes too long."""
    before = set((run / FOLDER).glob(".*.partial"))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if set((run / FOLDER).glob(".*.partial")) - before:
            return True
        if os.waitpid(job, os.WNOHANG)[0]:
            return False
        time.sleep(0.005)
    os.kill(job, signal.SIGKILL)
    os.waitpid(job, 0)
    return False


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
