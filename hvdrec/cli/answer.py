"""What the command line's verbs do; the command line itself only parses and prints."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from hvdrec.errors import UserError


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
    """Load the configuration of a command, with the overrides of the command line."""
    from hvdrec import config
    from hvdrec.cli.fields import describe_fields

    if "--fields-help" in rest:
        prog = f"hvdrec {options.verb_name} {options.config}"
        parser = argparse.ArgumentParser(prog, usage=f"{prog} [--FIELD VALUE ...]")
        describe_fields(parser, config.load_config(options.config))
        parser.parse_args(["--help"])
    return config.load_config(options.config, parse_overrides(rest))


def parse_overrides(rest: list[str]) -> dict[str, object]:
    """Parse what the parser of a command left over: values for fields of the configuration."""
    from hvdrec.cli.fields import add_field_options, read_fields

    parser = argparse.ArgumentParser(exit_on_error=False, add_help=False, allow_abbrev=False)
    add_field_options(parser, rest)
    try:
        known, unknown = parser.parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    if unknown:
        raise UserError(f"unknown argument '{unknown[0]}'")
    return read_fields(known)
