"""Before a launch on several hosts."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from hvdrec.cli.answer import Answer
from hvdrec.cli.text_table import table


def hosts(options: argparse.Namespace, rest: list[str]) -> Answer:
    from hvdrec.cluster.hosts import check_hosts, parse_hosts

    named = parse_hosts(options.hosts)
    checks = check_hosts(named, _paths(options.paths))
    lines = [f"{check.host}: {problem}" for check in checks for problem in check.problems]
    facts = {"ok": not lines, "hosts": [asdict(check) for check in checks]}
    if lines:
        return Answer(facts, "\n".join(lines), 2)
    rows = [[check.host, check.slots, "fit"] for check in checks]
    return Answer(facts, table(["host", "slots", ""], rows))


def _paths(given: list[Path]) -> list[Path]:
    """Return what ranks must see: the paths, and the features that a configuration names."""
    from hvdrec.config import load_config

    found = list(given)
    for path in given:
        if path.suffix == ".toml":
            features = load_config(path).paths.of("features")
            found += [features] if isinstance(features, Path) and features.exists() else []
    return found
