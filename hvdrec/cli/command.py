"""`Command`, which declares a command of the command line, and `Answer`, which it returns."""

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
    """The JSON value that is printed with --json."""
    text: str
    """The text that is printed without --json."""
    status: int = 0
    """The exit status of the process."""


@dataclass(frozen=True)
class Command:
    """One command of the command line."""

    run: Callable[[argparse.Namespace], Answer]
    arguments: tuple[AddArgument, ...]
    example: str
    """An example of a command line, shown at the end of --help."""
    notes: str
    """Text that --help shows between the options and the example."""
    fields: tuple[str, ...]
    """Prefixes of the dotted names of the configuration fields that are options of the command."""

    @property
    def name(self) -> str:
        """The name of the command on the command line."""
        return self.run.__name__

    @property
    def text(self) -> str:
        """The description in --help, which is the docstring of the command's function."""
        return inspect.getdoc(self.run) or ""


def command(
    *arguments: AddArgument, example: str, notes: str = "", fields: tuple[str, ...] = ()
) -> Callable[[Callable[[argparse.Namespace], Answer]], Command]:
    """Declare a function as a command of the same name; its docstring is the help text."""
    return lambda run: Command(run, arguments, example, notes, fields)


def argument(*names: str, **settings: Any) -> AddArgument:
    """Declare an argument of a command, as for `argparse.ArgumentParser.add_argument`."""
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
    """Load the configuration file of a command and apply the overrides of the command line."""
    from hvdrec import config

    return config.load_config(options.config, options.overrides)


def load_config_on_all(options: argparse.Namespace) -> Config:
    """Load the configuration on every rank of a job; if this fails on one rank, all ranks fail."""
    from hvdrec.parallel.environment import is_launched

    if not is_launched():
        return load_config(options)
    from hvdrec.parallel import ranks

    ranks.init()
    return ranks.run_on_all(lambda: load_config(options))
