"""Record the operations of training steps and their times, with the profiler of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hvdrec.errors import write_errors_named
from hvdrec.parallel.progress import print_line
from hvdrec.parallel.ranks import World

SKIPPED_STEPS, RECORDED_STEPS = 10, 20
"""The first steps of a process allocate memory and fill caches, so they are not recorded."""
TABLE_ROWS = 30


@contextmanager
def record_steps(
    directory: Path | None, world: World, device: torch.device
) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step of the ``with`` body.

    Steps 11 to 30 are recorded. Each rank writes ``trace-rank-00000.json``, which Perfetto and
    Chrome show as a timeline. The first rank also writes ``summary.txt``, a table of the operations
    that took most time. If training ends before step 30, fewer steps are recorded.

    Args:
        directory: Where to write; None to record nothing, with a function that does nothing.
        world: Number of this rank, and number of all ranks.
        device: Device on which this rank computes.

    Raises:
        UserError: The directory cannot be written.
    """
    if directory is None:
        yield lambda: None
        return
    with write_errors_named(directory):
        directory.mkdir(parents=True, exist_ok=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)

    def write(profile: torch.profiler.profile) -> None:
        with write_errors_named(directory):
            profile.export_chrome_trace(str(directory / f"trace-rank-{world.rank:05}.json"))
            if world.is_first:
                by = f"self_{device.type}_time_total"
                table = profile.key_averages().table(sort_by=by, row_limit=TABLE_ROWS)
                (directory / "summary.txt").write_text(table)
        print_line(f"profile of {RECORDED_STEPS} steps: {directory}")

    steps = 0

    def after_step() -> None:
        nonlocal steps
        steps += 1
        profile.step()

    schedule = torch.profiler.schedule(
        wait=SKIPPED_STEPS - 1, warmup=1, active=RECORDED_STEPS, repeat=1
    )
    with torch.profiler.profile(
        activities=activities, schedule=schedule, on_trace_ready=write
    ) as profile:
        yield after_step
    if steps <= SKIPPED_STEPS:
        print_line(
            f"profile: nothing recorded, there were only {steps} steps; {SKIPPED_STEPS} "
            "steps are skipped"
        )
