"""Check hvdrec on a GPU within ten minutes: results, exchange between ranks, speed.

Each part runs in processes of its own with a time limit, so one failure leaves the others. Work (a)
is the model of scripts/benchmark_training: 8 tables of 1,000,000 rows (10,000 on a CPU), width 16,
MLP 400-400-400, batch 4,096.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from build_part import Source, provide_horovod
from parts import (
    HOROVOD,
    PARTS,
    Outcome,
    Part,
    command_of,
    environment_of,
    limit_of,
    run_command,
)
from report import exit_code, summary, table, training

EPILOG = """\
examples:
  scripts/gpu_check                        all parts on the GPU; the results are in gpu-check/
  scripts/gpu_check --device cpu           the same on the CPU, to try the check itself
  scripts/gpu_check --only train-bf16      one part
  scripts/gpu_check --pack /tmp/pack       make a directory that runs elsewhere, without network:
                                           /tmp/pack/run

Exit code: 0; 1 if a part failed; 2 for a mistake in the arguments or if there is no GPU.
"""


def say(text: str) -> None:
    """Print a line on stderr at once."""
    print(text, file=sys.stderr, flush=True)


# This machine


def machine(device: str) -> dict[str, Any]:
    """Describe the machine and the installed versions."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "device": device,
        "gpus": gpus,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpus else None,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "nvcc": nvcc(),
    }


def nvcc() -> str | None:
    """Return the path of CUDA's compiler, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


# All parts


def run_parts(
    chosen: Sequence[Part], options: argparse.Namespace, facts: dict[str, Any]
) -> list[Outcome]:
    """Run parts one after the other until the time is used up."""
    end = time.monotonic() + 60 * options.minutes
    outcomes: list[Outcome] = []
    has_horovod = True
    for number, part in enumerate(chosen, start=1):
        left = end - time.monotonic()
        limit = limit_of(part, left, options.patience)
        if left < 1:
            outcome = Outcome(part.name, "failed", 0, f"--minutes {options.minutes:g} are over")
        elif part.needs_horovod and not has_horovod:
            outcome = Outcome(part.name, "skipped", 0, "needs Horovod")
        else:
            say(f"[{number}/{len(chosen)}] {part.name}: {part.checks} (at most {limit:.0f} s)")
            outcome = run_part(part, options, limit, facts)
        if part.name == HOROVOD:
            has_horovod = outcome.status == "passed"
        outcomes.append(outcome)
        say(f"  {outcome.status}: {outcome.detail or summary(outcome.figures)}")
    return outcomes


def run_part(
    part: Part, options: argparse.Namespace, limit: float, facts: dict[str, Any]
) -> Outcome:
    """Run one part."""
    if part.name == HOROVOD:
        several = len(facts["gpus"]) > 1
        source = Source(options.wheel, options.sdist)
        return provide_horovod(options.out, options.device, limit, source, several, say)
    command = command_of(part, options.device, options.out, options.seconds)
    environment = environment_of(
        os.environ, options.out / "horovod", is_launched=bool(part.launcher)
    )
    return run_command(part.name, command, limit, options.out / f"{part.name}.log", environment)


def choose(names: Sequence[str] | None) -> list[Part]:
    """Return the named parts in their order, and Horovod where one of them needs it."""
    if not names:
        return list(PARTS)
    wanted = {part.name for part in PARTS if part.name in names}
    if any(part.needs_horovod for part in PARTS if part.name in wanted):
        wanted.add(HOROVOD)
    return [part for part in PARTS if part.name in wanted]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda", help="device to check")
    names = [part.name for part in PARTS]
    add("--only", action="append", choices=names, metavar="PART", help="run one part (see --list)")
    add("--list", action="store_true", help="list the parts and their time limits")
    add("--out", type=Path, default=Path("gpu-check"), metavar="DIR", help="logs and report.json")
    add("--minutes", type=float, default=10, help="time limit of all parts together (default: 10)")
    add("--seconds", type=float, default=10, help="length of a soak or measurement (default: 10)")
    add("--patience", type=float, default=1, help="multiply the time limits of the parts by this")
    add("--wheel", type=Path, metavar="FILE", help="wheel of Horovod to use, instead of a build")
    add("--sdist", type=Path, metavar="FILE", help="source distribution of Horovod, to build it")
    add("--json", action="store_true", help="print report.json on stdout instead of tables")
    add("--pack", type=Path, metavar="DIR", help="make a directory that runs without network")
    add("--python", default="3.12", help="--pack: the Python there (default: 3.12)")
    options = parser.parse_args()
    for name in ("minutes", "seconds", "patience"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name} must be greater than 0")
    for name in ("wheel", "sdist"):
        file = getattr(options, name)
        if file is not None and not file.is_file():
            parser.error(f"--{name} {file}: no such file")
    return options


def main() -> int:
    """Run the command line; return the exit code."""
    options = arguments()
    if options.list:
        for part in PARTS:
            print(f"{part.name:15}{part.limit:4.0f} s  {part.checks}")
        return 0
    if options.pack is not None:
        from pack import make_pack

        return make_pack(options.pack, options.python, say)
    facts = machine(options.device)
    if options.device == "cuda" and not facts["gpus"]:
        say(
            f"scripts/gpu_check: torch {facts['torch']} sees no GPU here; install a CUDA build of "
            "torch (scripts/install --cuda), or try the check itself with --device cpu"
        )
        return 2
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    say("  ".join(f"{name} {value}" for name, value in facts.items()))
    outcomes = run_parts(choose(options.only), options, facts)
    report = {"machine": facts, "parts": [asdict(outcome) for outcome in outcomes]}
    report["passed"] = exit_code(outcomes) == 0
    text = json.dumps(report, indent=1)
    (options.out / "report.json").write_text(text + "\n")
    if options.json:
        print(text)
    else:
        print(f"\n{table(outcomes)}\n\n{training(outcomes)}\n\nlogs: {options.out}")
    return exit_code(outcomes)


if __name__ == "__main__":
    sys.exit(main())
