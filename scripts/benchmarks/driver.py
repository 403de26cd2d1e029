"""Measure the training speed of hvdrec and its peers on the same work, in turns.

Each program runs in one process, except in the measurements with two ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measurements import (
    BIN,
    ENVIRONMENTS,
    MEMORY,
    ONLY,
    PEERS,
    SPEED,
    Program,
    Ratio,
    programs,
    ratios,
)
from tqdm import tqdm

HERE = Path(__file__).parent
CONFIG_B = HERE.parents[1] / "configs" / "movielens-1m-ranking.toml"
SHARDS = HERE.parents[1] / "hvdrec" / "features" / "shards.py"
CORES = len(os.sched_getaffinity(0))
MANY, FEW = 10_000_000, 10_000
SETUP_SECONDS = 900  # for a program's start, tables and warm-up; after that it counts as hung

EPILOG = """\
examples:
  scripts/benchmark_training                      everything, as a table (about 50 minutes)
  scripts/benchmark_training --only two_ranks     one measurement
  scripts/benchmark_training --json > result.json one JSON object; the table goes to stderr
  scripts/benchmark_training --list               the measurements and their ratios

The first run downloads the peers' environments (about 6 GB) and MovieLens-1M. Ratios are of the
medians over the turns; "samples/s" of two processes is their sum. Exit code: 0; 1 if a program
failed (its ratios are null); 2 for a mistake in the arguments.
"""


def say(text: str) -> None:
    """Print a progress line beside the bar."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


class Failed(Exception):
    """A program failed or could not be installed; the text gives the reason in one line."""


def last_line(text: str) -> str:
    """Return the last line that is not empty."""
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["no message"])[-1]


def call(*command: str | Path) -> None:
    """Run a preparation command with its output on stderr. Raises Failed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise Failed(f"{words[0]}: exit code {done.returncode}: {last_line(done.stderr)}")


def once(folder: Path, stamp: str, make: Callable[[], None]) -> None:
    """Create a folder, unless an earlier call with the same `stamp` completed it."""
    digest, seal = hashlib.sha256(stamp.encode()).hexdigest(), folder / ".made"
    if seal.is_file() and seal.read_text() == digest:
        return
    if folder.exists() and not seal.is_file():
        raise SystemExit(f"{folder}: holds something else; move it away or give another --work-dir")
    say(f"making {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    seal.write_text("not yet")
    make()
    seal.write_text(digest)


def make_data(work: Path, name: str) -> None:
    """Create the data in one folder of the work directory; see work.py."""
    folder, program = work / name, HERE / "work.py"
    sizes: dict[str, tuple[str, ...]] = {
        "work_a": (),
        "few": ("--rows", str(FEW), "--distinct-of", str(FEW)),
        "many": ("--rows", str(MANY), "--distinct-of", str(FEW)),
    }

    def encode() -> None:
        raw, hvdrec = work / "movielens-1m", BIN / "hvdrec"
        if not (raw / "manifest.json").is_file():
            call(hvdrec, "data", "movielens-1m", "--to", raw)
        paths = ("--paths.raw", raw, "--paths.work", folder)
        call(hvdrec, "samples", CONFIG_B, *paths)
        call(hvdrec, "prepare", CONFIG_B, *paths)
        call(sys.executable, program, "b", folder)

    def draw() -> None:
        call(sys.executable, program, "a", folder, *sizes[name])

    made_by = [program, SHARDS, *([CONFIG_B] if name == "work_b" else [])]
    stamp = "".join(file.read_text() for file in made_by)
    once(folder, stamp, encode if name == "work_b" else draw)


def make_environment(folder: Path, name: str) -> None:
    """Create a peer's virtual environment from environments.toml."""
    told = ENVIRONMENTS[name]

    def install() -> None:
        call(sys.executable, "-m", "venv", folder)
        python = folder / "bin" / "python"
        pip = (python, "-m", "pip", "install", "-q", "--no-input", "--disable-pip-version-check")
        call(*pip, *told["first"])
        call(*pip, *told["requirements"])
        if told["without_dependencies"]:
            call(*pip, "--no-deps", *told["without_dependencies"])

    once(folder, json.dumps(told), install)


def command_of(program: Program, options: argparse.Namespace, meeting: Path) -> list[str]:
    """Return the command line of one process."""
    if program.peer:
        python = str(options.peers_dir / program.peer / "bin" / "python")
        script = PEERS / ENVIRONMENTS[program.peer]["program"]
        command = [python, *program.launcher, str(script)]
    else:
        command = [*program.launcher, sys.executable, str(HERE / "ours.py")]
        command += ["--compile"] if options.compile else []
        command += ["--meet", str(meeting)] if program.copies > 1 else []
    command += ["--data", str(options.work_dir / program.data)] if program.data else []
    return [*command, *program.arguments, "--seconds", str(options.seconds)]


@contextlib.contextmanager
def started(command: Sequence[str], threads: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in its own session until the context ends, with its output in `log`.*."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment.get('PATH', '')}"
    with log.with_suffix(".out").open("wb") as out, log.with_suffix(".err").open("wb") as err:
        process = subprocess.Popen(
            command, stdout=out, stderr=err, env=environment, start_new_session=True
        )
    try:
        yield process
    finally:
        for name in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, name)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)


def measure(program: Program, options: argparse.Namespace) -> dict[str, Any]:
    """Run a program once and return its figures; raises Failed."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        meeting = Path(folder, "meeting")
        meeting.mkdir()
        command = command_of(program, options, meeting)
        threads = CORES if program.processes == 1 else 1
        logs = [Path(folder, f"log{number}") for number in range(program.copies)]
        processes = [running.enter_context(started(command, threads, log)) for log in logs]
        results = []
        for process, log in zip(processes, logs, strict=True):
            try:
                code = process.wait(SETUP_SECONDS + options.seconds)
            except subprocess.TimeoutExpired:
                raise Failed(f"no end after {SETUP_SECONDS + options.seconds:g} s") from None
            out = log.with_suffix(".out").read_text(errors="replace").splitlines()
            # horovodrun writes the rank before each line.
            found = [line[line.index("{") :] for line in out if f'{{"{SPEED}"' in line]
            if code or not found:
                said = last_line(log.with_suffix(".err").read_text(errors="replace"))
                raise Failed(f"exit code {code}: {said}")
            results.append(json.loads(found[-1]))
    if len(results) == 1:
        return dict(results[0])
    together = {
        SPEED: sum(result[SPEED] for result in results),
        MEMORY: max(result[MEMORY] for result in results),
        "each": [{k: v for k, v in result.items() if k != "versions"} for result in results],
    }
    return {**together, "versions": results[0]["versions"]}


def idle_share(seconds: float = 1.0) -> float:
    """Return the fraction of CPU time that was idle."""

    def read() -> tuple[int, int]:
        with open("/proc/stat") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
        return ticks[3] + ticks[4], sum(ticks)  # idle and waiting for a disk

    idle, total = read()
    time.sleep(seconds)
    idle_after, total_after = read()
    return (idle_after - idle) / max(1, total_after - total)


def wait_for_idle(longest: float = 60.0) -> float:
    """Wait until 90% of the machine is idle, or print that it is not; return the idle fraction."""
    end = time.monotonic() + longest
    while (share := idle_share()) < 0.9:
        if time.monotonic() > end:
            say(f"the machine is still busy after {longest:g} s ({share:.0%} idle); going on")
            break
    return share


@dataclass
class Figures:
    """The results of all turns and the failures, by program."""

    raw: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)

    def values(self, name: str, figure: str) -> list[float]:
        """Return one figure of a program for each turn.

        None if the program failed in any of them.
        """
        return [] if name in self.failed else [one[figure] for one in self.raw[name]]

    def of(self, ratio: Ratio) -> float | None:
        """Return a ratio of medians, or None if a program failed."""
        above = self.values(ratio.above, ratio.figure)
        below = self.values(ratio.below, ratio.figure) if ratio.below else [1.0]
        return statistics.median(above) / statistics.median(below) if above and below else None


def take_turns(chosen: dict[str, Program], options: argparse.Namespace, into: Figures) -> None:
    """Measure A, B, C, A, B, C, ...; a program that fails is not tried again."""
    total = options.turns * len(chosen)
    with tqdm(total=total, unit="run", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        for turn in range(options.turns):
            for name, program in chosen.items():
                bar.set_description(name)
                if name not in into.failed:
                    idle = wait_for_idle()
                    try:
                        result = measure(program, options)
                    except Failed as error:
                        into.failed[name] = str(error)
                        say(f"{name} FAILED: {error}")
                    else:
                        into.versions[program.peer or "hvdrec"] = result.pop("versions")
                        into.raw.setdefault(name, []).append({**result, "idle_before": idle})
                        say(f"turn {turn + 1}/{options.turns}  {name:22} {result[SPEED]:>11,.0f}/s")
                bar.update()


def machine(versions: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Describe the machine and the versions that the figures were measured on."""
    names = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": CORES,
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "system": platform.platform(terse=True),
        "versions": versions,
    }


def table(figures: Figures, wanted: Sequence[Ratio]) -> str:
    """Format the figures as text."""
    lines = [f"{'':24}{'samples/s: min':>15}{'median':>12}{'max':>12}{'peak MB':>10}"]
    for name in figures.raw:
        if speeds := figures.values(name, SPEED):
            shown = (min(speeds), statistics.median(speeds), max(speeds))
            memory = statistics.median(figures.values(name, MEMORY))
            row = "".join(f"{value:>{w},.0f}" for value, w in zip(shown, (15, 12, 12), strict=True))
            lines.append(f"{name:24}{row}{memory:>10,.0f}")
    lines += [f"{name:24}FAILED: {reason}" for name, reason in figures.failed.items()]
    lines += ["", f"{'ratio of medians':36}"]
    for ratio in wanted:
        value = figures.of(ratio)
        # A share of time says most in more digits.
        lines.append(f"{ratio.key:36}{'null' if value is None else f'{value:.4g}':>10}")
    return "\n".join(lines)


def nested(values: dict[str, float | None]) -> dict[str, Any]:
    """Turn dotted keys into nested objects."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        *levels, last = key.split(".")
        place = result
        for level in levels:
            place = place.setdefault(level, {})
        place[last] = value
    return result


def default_work() -> Path:
    """Return the default directory of data and environments."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "hvdrec" / "benchmarks"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark_training",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--only",
        action="append",
        metavar="NAME",
        choices=ONLY,
        help="run one measurement (see --list)",
    )
    add("--list", action="store_true", help="list the measurements and exit")
    add("--turns", type=int, default=5, help="how often each program runs (default: 5)")
    add(
        "--seconds",
        type=float,
        default=5,
        help="seconds to time per run, after warm-up (default: 5)",
    )
    add("--json", action="store_true", help="print one JSON object on stdout")
    add("--compile", action="store_true", help="use torch.compile for the MLP without tables")
    add(
        "--work-dir",
        type=Path,
        default=default_work(),
        help="directory of data and environments (default: %(default)s)",
    )
    add(
        "--peers-dir",
        type=Path,
        help="directory of the peers' virtual environments; existing ones are used "
        "(default: WORK_DIR/peers, renewed when environments.toml changes)",
    )
    options = parser.parse_args()
    if options.turns < 1 or options.seconds <= 0:
        parser.error("--turns must be at least 1, --seconds greater than 0")
    options.work_dir = options.work_dir.absolute()
    options.own_environments = options.peers_dir is not None
    options.peers_dir = (options.peers_dir or options.work_dir / "peers").absolute()
    return options


def main() -> int:
    options = arguments()
    if options.list:
        for name, text in ONLY.items():
            print(f"{name:12}{text}")
            print(*(f"{'':14}{ratio.key}" for ratio in ratios() if ratio.only == name), sep="\n")
        return 0
    wanted = [ratio for ratio in ratios() if ratio.only in (options.only or ONLY)]
    names = {name for ratio in wanted for name in (ratio.above, ratio.below)}
    chosen = {name: program for name, program in programs().items() if name in names}
    figures = Figures()
    for data in dict.fromkeys(program.data for program in chosen.values() if program.data):
        try:
            make_data(options.work_dir, data)
        except Failed as error:
            say(f"{data} FAILED: {error}")
            figures.failed |= {n: str(error) for n, p in chosen.items() if p.data == data}
    for peer in dict.fromkeys(program.peer for program in chosen.values() if program.peer):
        folder = options.peers_dir / peer
        if options.own_environments and (folder / "bin" / "python").exists():
            continue
        try:
            make_environment(folder, peer)
        except Failed as error:
            say(f"{peer} FAILED: {error}")
            figures.failed |= {n: str(error) for n, p in chosen.items() if p.peer == peer}
    take_turns(chosen, options, figures)
    print(table(figures, wanted), file=sys.stderr if options.json else sys.stdout)
    if options.json:
        result = nested({ratio.key: figures.of(ratio) for ratio in wanted})
        settings = {"turns": options.turns, "seconds": options.seconds, "compile": options.compile}
        about = {"raw": figures.raw, "failed": figures.failed, "settings": settings}
        print(json.dumps({**result, **about, "machine": machine(figures.versions)}))
    return 1 if figures.failed else 0


if __name__ == "__main__":
    sys.exit(main())
