"""What the command line's verbs do; the command line itself only parses and prints."""

from __future__ import annotations

import argparse
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


def load_config(options: argparse.Namespace, rest: list[str]) -> Any:
    """Return the configuration that a verb was given, with what the command line overrides."""
    from hvdrec.config import run as config

    loaded = config.load(options.config)
    if not rest:
        return loaded
    prog = f"hvdrec {options.verb_name} {options.config}"
    arguments = ["--help" if argument == "--fields-help" else argument for argument in rest]
    return config.override(loaded, arguments, prog)
