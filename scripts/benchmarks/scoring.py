"""Measure the slim module and its service: one process per part, ratios within each."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PARTS = {
    "score": ("score.py", "Scorer.score beside the bare ONNX session and torch", 1),
    "recommend": ("retrieval.py", "exact retrieval and an index over a million items", 10),
    "loading": ("loading.py", "opening a bundle of a million users and items; import; threads", 5),
    "http": ("serving.py", "the service beside a bare FastAPI handler", 3),
}
EPILOG = """\
examples:
  scripts/benchmark_scoring                        everything, as a table
  scripts/benchmark_scoring --only score           one part
  scripts/benchmark_scoring --json > result.json   one JSON object; the table goes to stderr

Ratios are of medians over the turns, within one process or in turns; a quiet machine is needed.
Exit code: 0; 1 if a part failed (its figures are null); 2 for a mistake in the arguments.
"""


@dataclass(frozen=True)
class Target:
    """A figure and its target."""

    name: str
    bound: float
    at_most: bool = True

    def row(self, found: Mapping[str, Any]) -> str:
        """Format a figure: its value, its target, and whether it holds."""
        value = lookup(found, self.name)
        wanted = f"{'<=' if self.at_most else '>='} {self.bound:g}"
        if value is None:
            return f"{self.name:32}  {'-':>10}  {wanted:>10}"
        holds = value <= self.bound if self.at_most else value >= self.bound
        return f"{self.name:32}  {value:10.4g}  {wanted:>10}  {'' if holds else 'falls short'}"


TARGETS = (
    Target("score.over_bare", 1.15),
    Target("score.over_torch", 1.5, at_most=False),
    Target("score.single_over_bare_us", 60),
    Target("recommend.exact_over_numpy", 1.1),
    Target("recommend.index_recall", 0.99, at_most=False),
    Target("recommend.index_over_exact", 0.1),
    Target("load.seconds", 0.5),
    Target("load.resident_mb", 100),
    Target("import_ratio", 1.15),
    Target("threads.p99_over_p50", 4),
    Target("http.share_of_bare", 0.5, at_most=False),
)


def lookup(found: Mapping[str, Any], name: str) -> float | None:
    """Return a figure by its dotted name, or None."""
    value: Any = found
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and print their figures."""
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark_scoring",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", action="append", choices=list(PARTS), help="run one part; repeatable"
    )
    parser.add_argument("--turns", type=int, default=5, help="runs of each part (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--list", action="store_true", help="list the parts")
    options = parser.parse_args(arguments)
    if options.turns < 1:
        parser.error(f"--turns {options.turns}: must be 1 or more")
    if options.list:
        for name, (_, what, minutes) in PARTS.items():
            print(f"{name:10} {what} (about {minutes} min)")
        return 0
    found: dict[str, Any] = {}
    failed = False
    for name in options.only or PARTS:
        program, what, minutes = PARTS[name]
        print(f"{name}: {what} (about {minutes} min)", file=sys.stderr, flush=True)
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, str(HERE / program), "--turns", str(options.turns)],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            failed = True
            print(f"{name}: failed with exit code {done.returncode}", file=sys.stderr, flush=True)
            continue
        found.update(json.loads(done.stdout))
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    wanted = {t.name for t in TARGETS if not options.only or lookup(found, t.name) is not None}
    table = "\n".join(target.row(found) for target in TARGETS if target.name in wanted)
    if options.json:
        print(table, file=sys.stderr)
        print(json.dumps(found))
    else:
        print(f"{table}\n\n{json.dumps(found, indent=1)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
