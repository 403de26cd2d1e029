"""Train on a GPU and on the CPU, compare the losses of each step, and print samples per second.

The model is that of configs/movielens-1m.toml, on random tables of MovieLens-1M's shape. Initial
weights and row order do not depend on the device, and dropout, which does, is off. So the losses of
both runs differ by rounding only. Matrix products use full float32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from synthetic import write_tables

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "movielens-1m.toml"
RATINGS = 400_000
BIN = Path(sys.executable).parent


def main() -> int:
    """Run the check. Exit code 0: GPU and CPU agree; 1: they differ; 2: there is no GPU."""
    parser = argparse.ArgumentParser(prog="scripts/gpu_check", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="device to check")
    parser.add_argument("--ranks", type=int, default=0, help="default: one rank for each GPU")
    parser.add_argument("--tolerance", type=float, default=2e-3, help="largest relative difference")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    facts = machine()
    if options.device == "cuda" and not facts["gpus"]:
        print(
            f"scripts/gpu_check: torch {facts['torch']} sees no GPU here; install a CUDA build of "
            "torch (scripts/install --cuda), or try the check itself with --device cpu",
            file=sys.stderr,
        )
        return 2
    ranks = options.ranks or max(1, len(facts["gpus"])) if options.device == "cuda" else 1
    with tempfile.TemporaryDirectory(prefix="hvdrec-gpu-") as name:
        folder = Path(name)
        write_tables(folder / "raw", RATINGS)
        for verb in ("samples", "prepare"):
            hvdrec(verb, folder)
        reference = train(folder, "cpu", "fp32", 1)
        runs = {
            f"{options.device} {precision} on {count}": train(
                folder, options.device, precision, count
            )
            for precision, count in dict.fromkeys(
                [("fp32", 1), ("bf16", 1), ("fp32", ranks), ("bf16", ranks)]
            )
        }
    difference = largest_difference(reference, runs[f"{options.device} fp32 on 1"])
    agrees = difference <= options.tolerance
    result = {
        **facts,
        "largest_loss_difference": difference,
        "tolerance": options.tolerance,
        "agrees": agrees,
        "samples_per_second": {
            "cpu fp32 on 1": reference["speed"],
            **{name: run["speed"] for name, run in runs.items()},
        },
        "validation_auc": {
            "cpu fp32 on 1": reference["auc"],
            **{name: run["auc"] for name, run in runs.items()},
        },
    }
    if options.json:
        print(json.dumps(result))
    else:
        print(json.dumps(result, indent=1))
        verdict = "agrees with" if agrees else "DIFFERS from"
        print(
            f"{options.device} {verdict} the CPU: the losses differ by at most {difference:.2g} "
            f"(allowed {options.tolerance:g})"
        )
    return 0 if agrees else 1


def machine() -> dict[str, Any]:
    """Describe the GPUs and Horovod's access to them."""
    import horovod.torch as hvd
    import torch

    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "horovod_nccl": bool(hvd.nccl_built()),
    }


def train(folder: Path, device: str, precision: str, ranks: int) -> dict[str, Any]:
    """Train one epoch; return the losses of its steps, samples per second, and the AUC."""
    run = folder / "run"
    hvdrec(
        "train",
        folder,
        f"--train.device={device}",
        f"--train.precision={precision}",
        "--train.epochs=1",
        "--train.log-every=10",
        "--model.ranker.dropout=0",
        "--overwrite",
        ranks=ranks,
    )
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    speeds = sorted(event["rows_per_second"] for event in steps[1:] or steps)
    validation = next(event for event in events if event["event"] == "validation")
    return {
        "losses": [event["loss"] for event in steps],
        "speed": speeds[len(speeds) // 2],
        "auc": validation["auc"],
    }


def largest_difference(reference: dict[str, Any], run: dict[str, Any]) -> float:
    """Return the largest relative difference between the losses of the same steps."""
    pairs = list(zip(reference["losses"], run["losses"], strict=True))
    assert pairs
    return max(abs(there - here) / abs(here) for here, there in pairs)


def hvdrec(verb: str, folder: Path, *options: str, ranks: int = 1) -> None:
    """Run a command with its messages on stderr."""
    command = [str(BIN / "hvdrec"), verb, str(CONFIG)]
    if ranks > 1:
        command = [str(BIN / "horovodrun"), "-np", str(ranks), *command]
    paths = [f"--paths.raw={folder / 'raw'}", f"--paths.work={folder}"]
    environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}
    subprocess.run([*command, *paths, *options], check=True, stdout=sys.stderr, env=environment)


if __name__ == "__main__":
    sys.exit(main())
