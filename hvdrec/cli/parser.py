"""The argument parser of the command line."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from hvdrec import __version__
from hvdrec.cli import (
    check_command,
    data_commands,
    host_commands,
    init_command,
    model_commands,
    promote_command,
    run_commands,
    serve_commands,
    verify_command,
)
from hvdrec.cli.command import ALL_FIELDS, Command
from hvdrec.errors import UserError

MODULES = (
    init_command,
    data_commands,
    check_command,
    model_commands,
    promote_command,
    run_commands,
    serve_commands,
    verify_command,
    host_commands,
)
COMMANDS = tuple(
    each for module in MODULES for each in vars(module).values() if isinstance(each, Command)
)
EPILOG = """\
Every command takes --json and then prints one JSON object on standard output.
Any field of a configuration is an option: hvdrec train CONFIG --train.batch-size 4096
(hvdrec train CONFIG --help lists all of them).

examples, from a log to ranked items:
  hvdrec init data/log.csv data/items.csv                     # a configuration for your own tables
  hvdrec data movielens-1m                                    # raw tables
  hvdrec samples configs/movielens-1m.toml                    # labelled, split samples
  hvdrec check configs/movielens-1m.toml                      # label rates, leaks, unseen ids
  hvdrec prepare configs/movielens-1m.toml                    # fitted features, encoded shards
  horovodrun -np 2 hvdrec train configs/movielens-1m.toml
  hvdrec evaluate runs/movielens-1m/run                       # metrics beside the baselines
  hvdrec export runs/movielens-1m/run                         # the bundle to serve
  hvdrec recommend runs/movielens-1m/bundle --user 1 --scene hour=21 weekday=4 -k 10"""


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError with one line, instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError with this message.

        Raises:
            UserError: Always.
        """
        raise UserError(f"{message}; see {self.prog} --help")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line.

    Returns:
        The parsed options. `command` is the command to run; `overrides` maps dotted fields of the
        configuration to their new values.

    Raises:
        UserError: An argument is unknown, missing or wrong.
    """
    options = make_parser(arguments).parse_args(arguments)
    options.overrides = {}
    if options.command.fields and any(argument.startswith("--") for argument in arguments):
        from hvdrec.cli.fields import read_fields

        options.overrides = read_fields(options)
    _refuse_urls(options)
    return options


def make_parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Build the parser.

    Args:
        arguments: The command line to parse. There are hundreds of options for fields of the
            configuration. Only those that occur here are added; --help adds all of them.
    """
    parser = Parser(
        prog="hvdrec",
        description="Train, export and serve recommenders.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hvdrec {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, dest="command_name")
    for command in COMMANDS:
        sub = subparsers.add_parser(
            command.name,
            help=command.text.partition("\n")[0],
            description=command.text,
            epilog=f"{command.notes}example:\n{textwrap.indent(command.example, '  ')}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(command=command)
        for add_argument in command.arguments:
            add_argument(sub)
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        if command.fields and command.name in arguments[:1]:
            _add_fields(sub, command, arguments[1:])
    return parser


def _add_fields(
    parser: argparse.ArgumentParser, command: Command, arguments: Sequence[str]
) -> None:
    if any(argument in ("-h", "--help") for argument in arguments):
        with suppress(ModuleNotFoundError):  # a scoring-only install has no configurations
            from hvdrec.cli.fields import describe_fields
            from hvdrec.config import load_config

            files = [Path(text) for text in arguments if text.endswith(".toml")]
            config = load_config(files[0]) if files else None
            if config or command.fields != ALL_FIELDS:
                describe_fields(parser, config, command.fields)
    elif any(argument.startswith("--") for argument in arguments):
        from hvdrec.cli.fields import add_field_options

        add_field_options(parser, arguments, command.fields)


def _refuse_urls(options: argparse.Namespace) -> None:
    """Raise UserError if a directory is given as a URL, of which `Path` has removed one slash."""
    for name in ("bundle", "run"):
        scheme, separator, rest = str(getattr(options, name, "")).partition(":/")
        if separator and scheme.isalnum():
            remedy = "hvdrec fetch copies a bundle" if name == "bundle" else "copy it"
            raise UserError(
                f"{scheme}://{rest}: must be a directory of this machine; {remedy} to one",
                field=name,
                value=f"{scheme}://{rest}",
            )
