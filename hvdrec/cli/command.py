"""What a command declares, and what it answers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvdrec.config import Config


@dataclass(frozen=True)
class Answer:
    """The result of a command."""

    facts: Any
    """What --json prints."""
    text: str
    """What is printed otherwise."""
    status: int = 0
    """The exit status."""


@dataclass(frozen=True)
class Command:
    """One command of the command line."""

    name: str
    run: Callable[[argparse.Namespace], Answer]
    text: str
    """What it does, for --help."""
    example: str
    """Command lines that --help ends in."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    fields: tuple[str, ...] = ()
    """Fields of the configuration that it takes as options: prefixes of their dotted names."""
    notes: str = ""
    """Further text of --help, before the example."""


ALL_FIELDS = ("",)


def load_config(options: argparse.Namespace) -> Config:
    """Load the configuration of a command, with the overrides of the command line."""
    from hvdrec import config

    return config.load_config(options.config, options.overrides)


def load_config_on_all(options: argparse.Namespace) -> Config:
    """Load the configuration on every rank of a job; all ranks fail if one does."""
    from hvdrec.parallel.environment import is_launched

    if not is_launched():
        return load_config(options)
    from hvdrec.parallel import ranks

    ranks.init()
    return ranks.run_on_all(lambda: load_config(options))


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """Add the TOML file of a run."""
    parser.add_argument("config", type=Path, help="TOML file of the run")


def add_overwrite_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--overwrite``."""
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")


def add_workers_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--workers``."""
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that share the work, except under mpirun (default: one per core, at most "
        "8); the output does not depend on their number",
    )
