"""What scripts/gpu_check prints: one line for each part, and the figures of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from parts import Outcome

WIDTH = 100
SHOWN = ("samples_per_second", "milliseconds_per_step", "rounds_per_second", "largest_difference")


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """Return 1 if a part failed, else 0."""
    return int(any(outcome.status == "failed" for outcome in outcomes))


def table(outcomes: Sequence[Outcome]) -> str:
    """Format one line for each part: name, status, seconds, and the main figures or the reason."""
    width = max((len(outcome.name) for outcome in outcomes), default=4)
    lines = [f"{'part':{width}}  result   seconds"]
    for outcome in outcomes:
        said = outcome.detail or summary(outcome.figures)
        line = f"{outcome.name:{width}}  {outcome.status:7}  {outcome.seconds:7.0f}  {said}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def summary(figures: dict[str, Any]) -> str:
    """Format the figures of a part that are numbers or text, in one line."""
    words = []
    for name, value in figures.items():
        if isinstance(value, float):
            shown = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
            words.append(f"{name.replace('_', ' ')} {shown}")
        elif isinstance(value, int | str):
            words.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(words)


def training(outcomes: Sequence[Outcome]) -> str:
    """Format samples per second, the use of the GPU, and where the time of a step goes."""
    lines = []
    for outcome in outcomes:
        figures = outcome.figures
        if outcome.status != "passed" or "samples_per_second" not in figures:
            continue
        shares = ", ".join(
            f"{name} {share:.0%}" for name, share in figures["shares_of_time"].items()
        )
        lines += [
            f"{outcome.name}: {figures['samples_per_second']:,.0f} samples/s",
            f"  time of a step: {shares}",
        ]
        if used := figures["nvidia_smi"]:
            lines.append(
                f"  GPU busy {used['busy_share']:.0%} (nvidia-smi), {used['memory_mb']:,.0f} MB"
            )
        longest = list(figures["operations"].items())[:4]
        lines.append("  longest: " + ", ".join(f"{name} {ms:g} ms" for name, ms in longest))
    return "\n".join(lines)
