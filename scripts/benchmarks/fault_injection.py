"""Damage the files of a small run and check that no stage silently gives a wrong result.

Each trial flips one bit of an artifact, or truncates one of its files, and runs a stage that reads
it. The outcome is "no effect" (the same bytes or figures as without damage), "named" (one line that
names a file of the artifact), or WRONG. `--kills` kills a training job that writes a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from kills import kill_writers

import hvdrec
from hvdrec.scoring.errors import ScoringError
from hvdrec.storage.artifacts import read_manifest
from hvdrec.training.pointers import POINTERS, find_checkpoint, write_pointer
from tests.small_data import write_small_data

EPILOG = """\
examples:
  scripts/fault_injection --flips 20 --truncations 20
  scripts/fault_injection --flips 200 --truncations 200 --kills 100
  scripts/fault_injection --flips 200 --stages prepare,export --seed 7

Exit code: 0; 1 if a trial is WRONG; 2 if an argument is wrong.
"""
Fault = Literal["flip", "truncation"]


@dataclass(frozen=True)
class Setting:
    """The small run: its TOML file, and the directory of its artifacts."""

    toml: Path
    work: Path

    def config(self, **fields: Any) -> Any:
        """Return the configuration with other values of some fields."""
        fixed = {"train.cpu_layers": "fused", "parallel.kernel": "torch"}
        names = {name.replace("__", "."): value for name, value in fields.items()}
        return hvdrec.load_config(self.toml, {**fixed, **names})

    @property
    def out(self) -> Path:
        """A directory for what a trial writes."""
        return self.work.parent / "out"


def prepare(setting: Setting) -> str:
    """Return the identity of features made from the samples."""
    config = setting.config(paths__features=str(setting.out))
    hvdrec.prepare(config, overwrite=True, workers=1, progress=False)
    return read_manifest(setting.out, "features").identity


def train(setting: Setting) -> str:
    """Return the identity of a checkpoint trained on the features."""
    config = setting.config(paths__run=str(setting.out), train__epochs=1)
    hvdrec.train(config, overwrite=setting.out.exists(), progress=False)
    return find_checkpoint(setting.out, "latest").manifest.identity


def evaluate(setting: Setting) -> str:
    """Return the metrics of the run."""
    result = hvdrec.evaluate(setting.work / "run", baselines=False).to_dict()
    return json.dumps({**result, "run": ""}, sort_keys=True)


def export(setting: Setting) -> str:
    """Return the identity of the run's bundle."""
    run = setting.work / "run"
    hvdrec.export(run, to=setting.out, overwrite=True, workers=1, progress=False)
    return read_manifest(setting.out, "bundle").identity


def resume(setting: Setting) -> str:
    """Return the identity of the last checkpoint of the half-trained run, resumed."""
    shutil.copytree(setting.work / "half", setting.out)
    hvdrec.train(setting.config(paths__run=str(setting.out)), resume=True, progress=False)
    return find_checkpoint(setting.out, "latest").manifest.identity


def recommend(setting: Setting) -> str:
    """Return what the bundle recommends to some users, with all scores."""
    scorer = hvdrec.Scorer.load(setting.work / "bundle")
    lists = [scorer.recommend(user, {"hour": 3, "shop": 2}, k=10) for user in ("u1", "u7", "u30")]
    return str([[(each.item, each.score) for each in items] for items in lists])


STAGES: dict[str, tuple[Callable[[Setting], str], str]] = {
    "prepare": (prepare, "samples"),
    "train": (train, "features"),
    "evaluate": (evaluate, "run"),
    "export": (export, "run"),
    "resume": (resume, "half"),
    "recommend": (recommend, "bundle"),
}
"""Stage -> function that runs it, and the directory whose files are damaged."""


def make(folder: Path) -> Setting:
    """Make the small run: all artifacts, and in ``half`` the run in the middle of an epoch."""
    toml = write_small_data(folder)
    setting = Setting(toml, folder / "work")
    config = setting.config(train__checkpoint_every=3, train__keep=99)
    hvdrec.make_samples(config, progress=False)
    hvdrec.prepare(config, workers=1, progress=False)
    hvdrec.train(config, progress=False)
    hvdrec.export(setting.work / "run", workers=1, progress=False)
    run, half = setting.work / "run", setting.work / "half"
    shutil.copytree(run, half)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    _keep_only(run, find_checkpoint(run, "best").name)
    _keep_only(half, names[len(names) // 2 - 1])
    (half / "best").unlink()
    return setting


def _keep_only(run: Path, name: str) -> None:
    """Remove all checkpoints but one, so that most faults are in files that a stage reads."""
    for directory in (run / "checkpoints").iterdir():
        if directory.name != name:
            shutil.rmtree(directory)
    for pointer in POINTERS:
        write_pointer(run, pointer, name)


@contextmanager
def damaged(folder: Path, fault: Fault, draw: random.Random) -> Iterator[str]:
    """Damage a file of a folder, yield a description of the damage, and repair the file at the end.

    In half of the trials, the file is drawn with a probability proportional to its size, in the
    others with equal probability.
    """
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.stat().st_size]
    sizes = [file.stat().st_size for file in files]
    file = draw.choices(files, sizes if draw.random() < 0.5 else None)[0]
    data = file.read_bytes()
    try:
        if fault == "flip":
            bit = draw.randrange(8 * len(data))
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            what = f"bit {bit} of {file.relative_to(folder)}"
        else:
            size = draw.randrange(len(data))
            changed = bytearray(data[:size])
            what = f"{file.relative_to(folder)} cut to {size} of {len(data)} bytes"
        file.write_bytes(changed)
        yield what
    finally:
        file.write_bytes(data)


def outcome(stage: str, setting: Setting, expected: str | None) -> str:
    """Run a stage on damaged files; return "no effect", "named", or a description of what is wrong.

    If `expected` is None, return the result of the stage instead.
    """
    action, folder = STAGES[stage]
    shutil.rmtree(setting.out, ignore_errors=True)
    try:
        result = action(setting)
    except (hvdrec.UserError, ScoringError) as error:
        text = str(error)
        names = str(setting.work / folder) in text or str(setting.out) in text
        return "named" if names and "\n" not in text else f"WRONG: names no file: {text}"
    except BaseException as error:
        return f"WRONG: {type(error).__name__}: {error}"
    if expected is None:
        return result
    return "no effect" if result == expected else "WRONG: another result"


class Worker:
    """Runs stages in a separate process, so that a crash is an outcome, too."""

    def __init__(self) -> None:
        """Start the process."""
        self._start()

    def _start(self) -> None:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"))

    def run(self, stage: str, setting: Setting, expected: str | None) -> str:
        """Return the `outcome` of a stage."""
        try:
            return self._pool.submit(outcome, stage, setting, expected).result(timeout=120)
        except BrokenProcessPool:
            self._start()
            return "WRONG: the process crashed"
        except TimeoutError:
            for process in self._pool._processes.values():
                process.kill()
            self._start()
            return "WRONG: no result within 120 s"


def inject(setting: Setting, stages: list[str], counts: dict[Fault, int], seed: int) -> bool:
    """Run all trials and print a table; return True if none is WRONG."""
    worker, is_right = Worker(), True
    print(f"{'stage':<10} {'damaged':<9} {'fault':<11} {'no effect':>9} {'named':>6} {'WRONG':>6}")
    for stage in stages:
        folder = STAGES[stage][1]
        expected = worker.run(stage, setting, None)
        again = worker.run(stage, setting, expected)
        if again != "no effect":
            raise SystemExit(f"scripts/fault_injection: {stage} without damage: {again}")
        for fault, count in counts.items():
            draw = random.Random(f"{seed} {stage} {fault}")
            found: Counter[str] = Counter()
            for _ in range(count):
                with damaged(setting.work / folder, fault, draw) as what:
                    result = worker.run(stage, setting, expected)
                if result.startswith("WRONG"):
                    print(f"{stage}: {folder}: {what}: {result}", file=sys.stderr, flush=True)
                found[result.split(":")[0]] += 1
            is_right &= not found["WRONG"]
            row = f"{stage:<10} {folder:<9} {fault:<11}"
            print(
                f"{row} {found['no effect']:>9} {found['named']:>6} {found['WRONG']:>6}", flush=True
            )
    return is_right


def main() -> None:
    """Parse the arguments, run the trials, and exit."""
    parser = argparse.ArgumentParser(
        prog="scripts/fault_injection",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--flips", type=int, default=0, metavar="N", help="bits for each stage")
    parser.add_argument("--truncations", type=int, default=0, metavar="N", help="for each stage")
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="of a training job")
    parser.add_argument("--stages", default=",".join(STAGES), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of all draws; default: %(default)s")
    options = parser.parse_args()
    stages = options.stages.split(",")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        parser.error(f"--stages: unknown: {', '.join(unknown)}; known: {', '.join(STAGES)}")
    counts: dict[Fault, int] = {"flip": options.flips, "truncation": options.truncations}
    counts = {fault: count for fault, count in counts.items() if count > 0}
    if not counts and options.kills <= 0:
        parser.error("give --flips, --truncations or --kills")
    is_right = True
    with tempfile.TemporaryDirectory(prefix="fault-injection-") as name:
        if counts:
            is_right &= inject(make(Path(name) / "faults"), stages, counts, options.seed)
        if options.kills > 0:
            is_right &= kill_writers(Path(name) / "kills", options.kills, options.seed)
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
