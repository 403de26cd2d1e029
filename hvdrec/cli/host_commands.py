"""The commands that check machines: doctor, hosts."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from hvdrec.cli.command import Answer, argument, command
from hvdrec.cli.reports import render_checks
from hvdrec.cli.text_table import table


@command(example="hvdrec doctor")
def doctor(options: argparse.Namespace) -> Answer:
    """Check what this machine can do, and show how to fix problems."""
    from hvdrec.cluster.doctor import diagnose

    report = diagnose()
    return Answer(report.as_dict(), render_checks(report.checks), report.exit_status)


@command(
    argument(
        "-H",
        dest="hosts",
        required=True,
        metavar="HOST:SLOTS,...",
        help="hosts in the format of horovodrun and mpirun",
    ),
    argument(
        "paths",
        nargs="*",
        type=Path,
        help="files and directories that must be the same on every host; a configuration includes "
        "its features",
    ),
    example="hvdrec hosts -H localhost:2,worker1:2 configs/movielens-1m.toml",
)
def hosts(options: argparse.Namespace) -> Answer:
    """Check hosts before a launch and print one line per problem.

    Each host must accept ssh without a password, have the same versions and files and the same
    time, and be able to connect to this host.
    """
    from hvdrec.cluster.hosts import check_hosts, parse_hosts

    checks = check_hosts(parse_hosts(options.hosts), _with_features(options.paths))
    lines = [f"{check.host}: {problem}" for check in checks for problem in check.problems]
    facts = {"ok": not lines, "hosts": [asdict(check) for check in checks]}
    if lines:
        return Answer(facts, "\n".join(lines), 2)
    rows = [[check.host, check.slots, "ok"] for check in checks]
    return Answer(facts, table(["host", "slots", ""], rows))


def _with_features(paths: list[Path]) -> list[Path]:
    """Return the paths and, for each path of a configuration, the directory of its features."""
    from hvdrec.config import load_config

    files = [path for path in paths if path.suffix == ".toml"]
    features = [load_config(file).paths.of("features") for file in files]
    return paths + [each for each in features if isinstance(each, Path) and each.exists()]
