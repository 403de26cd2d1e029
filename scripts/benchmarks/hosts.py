"""Compare hvdrec with plain Horovod on two hosts with a slow network between them.

The hosts are network namespaces of this machine, so all of them share its cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from driver import CONFIG_B, Failed, default_work, last_line, make_data, say
from measurements import BIN, SPEED
from tqdm import tqdm
from work import BATCH

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from tests.hosts.machines import Done, Hosts, hosts_up  # noqa: E402

HOSTS = 2
PYTHON, HVDREC = str(BIN / "python"), str(BIN / "hvdrec")
SECONDS = 1800
RANKS = (2, 4)
LAUNCHERS = ("horovodrun --gloo", "mpirun")
TOLD_LINES = 12
"""If a program fails, so many of its last lines are shown."""
STEPS = (10, 40)
"""The numbers of steps of two runs. The difference of the bytes that they send, divided by the
difference of the steps, is what one step sends."""
ONLY = {
    "steps": "step time of work (a) on four ranks: hvdrec with sharded tables, and plain Horovod",
    "planner": "MovieLens-1M's ranking model: step times, predicted by hvdrec plan and measured",
}
EPILOG = """\
examples:
  scripts/benchmark_hosts                    everything, as tables (about 25 minutes)
  scripts/benchmark_hosts --only steps --json
  scripts/benchmark_hosts --only steps --batch 65536 --precision bf16   computes less, sends more

Needs root, iproute2 and openssh-server. MovieLens-1M is downloaded if it is not there. Ratios are
of the medians over the turns. Exit code: 0; 1 if a program failed; 2 for a mistake in the
arguments.
"""


def launch(hosts: Hosts, launcher: str, count: int, per_host: int, *command: str) -> str:
    """Run a job on the first `count` hosts and return its output; raises Failed."""
    names = ",".join(f"hv{i}:{per_host}" for i in range(1, count + 1))
    # There are more ranks than cores, which mpirun refuses without these options.
    shared = ["--oversubscribe", "--bind-to", "none"] if launcher == "mpirun" else []
    try:
        done = hosts.launch(launcher, count * per_host, [*shared, *command], names, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise Failed(f"{' '.join(command[:3])}: no end after {SECONDS} s") from None
    return _output(done, command)


def _output(done: Done, command: tuple[str, ...]) -> str:
    if done.status:
        # The last line comes from the launcher; the reason is in a line before it.
        said = [line for line in done.output.splitlines() if line.strip()][-TOLD_LINES:]
        raise Failed("\n  ".join([f"{' '.join(command[:3])}: exit code {done.status}:", *said]))
    return done.output


def facts_in(output: str, first: str) -> dict[str, Any]:
    """Return the JSON object that a job's first rank printed in one line."""
    line = next((line for line in output.splitlines() if f'{{"{first}"' in line), "")
    if not line:
        raise Failed(f"no figures; the last line was: {last_line(output)}")
    found: dict[str, Any] = json.loads(line[line.index("{") : line.rindex("}") + 1])
    return found


def cap(hosts: Hosts, rate: str) -> None:
    """Limit the rate at which each host sends, such as "1gbit" (for tc); "" removes the limit."""
    for host in range(1, HOSTS + 1):
        hosts.run(host, ["tc", "qdisc", "del", "dev", "eth0", "root"])
        if rate:
            limit = ["tbf", "rate", rate, "burst", "1mb", "latency", "50ms"]
            command = ("tc", "qdisc", "add", "dev", "eth0", "root", *limit)
            _output(hosts.run(host, command), command)


def sent(hosts: Hosts) -> int:
    """Return the number of bytes that all hosts have sent so far."""
    total = 0
    for host in range(1, HOSTS + 1):
        text = hosts.run(host, ["ip", "-s", "-j", "link", "show", "eth0"]).output
        total += json.loads(text)[0]["stats64"]["tx"]["bytes"]
    return total


def measure_steps(hosts: Hosts, options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds per step of each program, their ratios, and hvdrec's bytes."""
    data = str(options.work_dir / "work_a")
    work = ("--data", data, "--batch", str(options.batch), "--precision", options.precision)
    ours = (PYTHON, str(HERE / "ours.py"), "--work", "a", "--threads", "1", *work)
    peer = (PYTHON, str(HERE / "horovod_peer.py"), *work)
    programs = {
        "hvdrec": (*ours, "--placement", "sharded", "--steps", str(STEPS[1])),
        "sparse": (*peer, "--tables", "sparse", "--steps", "5"),
        "dense": (*peer, "--tables", "dense", "--steps", "1", "--warmup", "1"),
    }
    cap(hosts, options.rate)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(1, options.turns + 1):
        for name, command in programs.items():
            found = facts_in(launch(hosts, options.launcher, HOSTS, 2, *command), SPEED)
            seconds[name].append(found["seconds"] / found["steps"])
            say(f"turn {turn}/{options.turns}  {name:8}{1e3 * seconds[name][-1]:10,.1f} ms a step")
    few, many = (_bytes(hosts, options.launcher, *ours, count) for count in STEPS)
    must = many["must_travel"]
    a_step = (many["sent"] - few["sent"]) / (STEPS[1] - STEPS[0])
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds_per_step": {
            name: {"min": min(v), "median": middle[name], "max": max(v)}
            for name, v in seconds.items()
        },
        "ratio": {name: middle[name] / middle["hvdrec"] for name in ("dense", "sparse")},
        "bytes": {"sent": a_step, "must_travel": must, "ratio": a_step / must},
    }


def _bytes(hosts: Hosts, launcher: str, *command: Any) -> dict[str, float]:
    """Run hvdrec with one rank per host; return the bytes sent and the bytes that must be sent."""
    *start, count = command
    before = sent(hosts)
    steps = ("--placement", "sharded", "--steps", str(count))
    found = facts_in(launch(hosts, launcher, HOSTS, 1, *start, *steps), SPEED)
    return {"sent": sent(hosts) - before, "must_travel": HOSTS * found["bytes_per_step"]}


def measure_planner(hosts: Hosts, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return predicted and measured step times for all launchers, ranks, placements and rates."""
    found: list[dict[str, Any]] = []
    cases = list(itertools.product(("sharded", "replicated"), LAUNCHERS))
    for placement, launcher in tqdm(cases, "planner", leave=False, file=sys.stderr):
        with tempfile.TemporaryDirectory() as folder:
            for count in RANKS:
                for one in _measure_plan(hosts, options, Path(folder), placement, launcher, count):
                    found.append(one)
                    values = (f"{v:.4f}" if isinstance(v, float) else f"{v}" for v in one.values())
                    say("  ".join(values))
    return found


def _measure_plan(
    hosts: Hosts, options: argparse.Namespace, work: Path, placement: str, launcher: str, count: int
) -> Iterator[dict[str, Any]]:
    """Yield predictions and measurements on one host, then on two with a limited network.

    The planner's constants are measured on one host with the same number of ranks. If `work` also
    has the constants of fewer ranks, a second prediction is made from them. It needs the number of
    cores, because both hosts share the cores of this machine.
    """
    features = str(options.work_dir / "work_b" / "features")
    paths = ("--paths.work", str(work), "--paths.features", features)
    # One thread per rank: both hosts see all cores of the machine, and would use them twice.
    model = (str(CONFIG_B), *paths, "--train.threads", "1", "--parallel.placement", placement)
    # Small shuffle windows, so that rows are read in most steps, as with larger data sets.
    model += ("--loader.shuffle-rows", "65536")
    plan = (HVDREC, "plan", *model, "--ranks", str(count), "--json")
    bits = re.sub(r"([gm])bit$", lambda unit: f"{unit[1].upper()}bit", options.rate)
    on_hosts = {1: (), HOSTS: ("--ranks-per-host", str(count // HOSTS), "--bandwidth", bits)}

    def predict(host_count: int, *more: str) -> float:
        command = (*plan, *on_hosts[host_count], *more)
        return _predicted(_output(hosts.run(1, command), command))

    cap(hosts, "")
    by_fewer = {}
    if count > RANKS[0]:
        cores = len(os.sched_getaffinity(0))
        by_fewer = {used: predict(used, "--cores", str(max(1, cores // used))) for used in on_hosts}
    launch(hosts, launcher, 1, count, *plan, "--calibrate")
    predicted = {used: predict(used) for used in on_hosts}
    for used in on_hosts:
        rate = options.rate if used > 1 else ""
        cap(hosts, rate)
        run = work / f"{count}-{used}"
        # Two epochs: in the first one, much of so little data is read before the first step.
        train = (HVDREC, "train", *model, "--paths.run", str(run), "--train.epochs", "2")
        how = ("--train.log-every", "5", "--train.average-decay", "0")
        launch(hosts, launcher, used, count // used, *train, *how)
        yield {
            "launcher": launcher,
            "ranks": count,
            "placement": placement,
            "rate": rate or "one host",
            "predicted": predicted[used],
            "measured": _measured(run),
        } | ({"predicted_by_fewer": by_fewer[used]} if by_fewer else {})


def _predicted(output: str) -> float:
    plan = facts_in(output, "cluster")
    return float(plan["seconds_per_step"]["total"])


def _measured(run: Path) -> float:
    """Return the mean seconds per step from a run's log, without its first line."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    rates = [line["rows_per_second"] for line in lines if line["event"] == "step"]
    batch = json.loads((run / "config.json").read_text())["train"]["batch_size"]
    return float(statistics.mean(batch / rate for rate in rates[1:]))


def shown(figures: dict[str, Any]) -> str:
    """Format the figures as text."""
    lines = []
    if "steps" in figures:
        steps = figures["steps"]
        for name, values in steps["seconds_per_step"].items():
            spread = "  ".join(f"{key} {1e3 * value:10,.1f}" for key, value in values.items())
            lines.append(f"{name:10}ms a step: {spread}")
        lines += [f"{name} / hvdrec: {value:.3g}" for name, value in steps["ratio"].items()]
        size = steps["bytes"]
        lines.append(
            f"bytes a step: {size['sent']:,.0f} sent, {size['must_travel']:,.0f} must travel: "
            f"{size['ratio']:.3f}"
        )
    for one in figures.get("planner", []):
        lines.append(
            f"{one['launcher']:18}{one['ranks']} ranks  {one['placement']:11}{one['rate']:9}"
            f"predicted {1e3 * one['predicted']:7.1f} ms  measured {1e3 * one['measured']:7.1f} ms"
            f"  {one['predicted'] / one['measured'] - 1:+.0%}"
        )
        if "predicted_by_fewer" in one:
            seconds = one["predicted_by_fewer"]
            off = seconds / one["measured"] - 1
            lines[-1] += f"; by {RANKS[0]} ranks {1e3 * seconds:.1f} ms {off:+.0%}"
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark_hosts",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", choices=ONLY, help="; ".join(f"{k}: {v}" for k, v in ONLY.items())
    )
    parser.add_argument("--rate", default="1gbit", help="network speed (default: %(default)s)")
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default=LAUNCHERS[0], help="launcher of 'steps'"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=BATCH,
        help="rows per step of 'steps', on all ranks together (default: %(default)s)",
    )
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="precision of 'steps'"
    )
    parser.add_argument("--turns", type=int, default=5, help="runs of each program (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=default_work(),
        help="directory of the data, shared with scripts/benchmark_training (default: %(default)s)",
    )
    options = parser.parse_args()
    if options.turns < 1:
        parser.error("--turns must be at least 1")
    if options.batch < 1 or options.batch % (2 * HOSTS):
        parser.error(f"--batch must be a multiple of the {2 * HOSTS} ranks")
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?[gm]bit", options.rate):
        parser.error(f"--rate {options.rate}: must be as 1gbit or 100mbit")
    options.work_dir = options.work_dir.absolute()
    return options


def main() -> int:
    options = arguments()
    measures: dict[str, tuple[str, Callable[[Hosts, argparse.Namespace], Any]]] = {
        "steps": ("work_a", measure_steps),
        "planner": ("work_b", measure_planner),
    }
    figures: dict[str, Any] = {}
    try:
        for name, (data, measure) in measures.items():
            if options.only in (None, name):
                make_data(options.work_dir, data)
                with (
                    tempfile.TemporaryDirectory() as folder,
                    hosts_up(HOSTS, Path(folder)) as hosts,
                ):
                    figures[name] = measure(hosts, options)
    except (Failed, AssertionError) as error:
        print(f"scripts/benchmark_hosts: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures) if options.json else shown(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
