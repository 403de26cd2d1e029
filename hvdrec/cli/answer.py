"""What the command line's verbs do; the command line itself only parses and prints."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a verb came to."""

    facts: Any
    """For machines: what --json prints."""
    text: str
    """For people."""
    status: int = 0
    """The exit status."""


def is_first_rank() -> bool:
    """Return whether this process talks; asks only what is already loaded."""
    ranks = sys.modules.get("hvdrec.parallel.ranks")
    workers = sys.modules.get("hvdrec.parallel.rank_pool")
    return (ranks is None or bool(ranks.current().is_first)) and (
        workers is None or bool(workers.is_first())
    )


def notify(line: str) -> None:
    """Tell people what is being done."""
    if is_first_rank():
        print(line, file=sys.stderr, flush=True)


def load_config(options: argparse.Namespace, rest: list[str]) -> Any:
    """Return the configuration that a verb was given, with what the command line overrides."""
    from hvdrec.config import run as config

    loaded = config.load(options.config)
    if not rest:
        return loaded
    prog = f"hvdrec {options.verb_name} {options.config}"
    arguments = ["--help" if argument == "--fields-help" else argument for argument in rest]
    return config.override(loaded, arguments, prog)
