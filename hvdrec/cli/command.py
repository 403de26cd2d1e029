"""What a command declares, and what it answers."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvdrec.config import Config

AddArgument = Callable[[argparse.ArgumentParser], object]


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

    run: Callable[[argparse.Namespace], Answer]
    arguments: tuple[AddArgument, ...]
    example: str
    """Command lines that --help ends in."""
    notes: str
    """Further text of --help, before the example."""
    fields: tuple[str, ...]
    """Fields of the configuration that it takes as options: prefixes of their dotted names."""

    @property
    def name(self) -> str:
        """Its name on the command line."""
        return self.run.__name__

    @property
    def text(self) -> str:
        """Its description in --help: the docstring of its function, whose first line is short."""
        return inspect.getdoc(self.run) or ""


def command(
    *arguments: AddArgument, example: str, notes: str = "", fields: tuple[str, ...] = ()
) -> Callable[[Callable[[argparse.Namespace], Answer]], Command]:
    """Declare a function to be a command of the same name; its docstring is the help text."""
    return lambda run: Command(run, arguments, example, notes, fields)


def argument(*names: str, **settings: Any) -> AddArgument:
    """Declare an argument as `argparse.ArgumentParser.add_argument` takes it."""
    return lambda parser: parser.add_argument(*names, **settings)


ALL_FIELDS = ("",)
BUNDLE = argument("bundle", type=Path, help="directory of the bundle")
CONFIG = argument("config", type=Path, help="TOML file of the run")
NO_VERIFY = argument(
    "--no-verify",
    dest="verify",
    action="store_false",
    help="do not compare the bundle's files with their checksums",
)
RUN = argument("run", type=Path, help="directory of a run (WORK/run)")
OVERWRITE = argument("--overwrite", action="store_true", help="replace existing output")
CHECKPOINT = argument(
    "--checkpoint", choices=["best", "latest"], default="best", help="default: best"
)
WORKERS = argument(
    "--workers",
    type=int,
    default=0,
    metavar="N",
    help="processes that share the work, except under mpirun (default: one per core, at most 8); "
    "the output does not depend on their number",
)


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
