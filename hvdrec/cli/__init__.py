"""The command line: parse, call the public API, print."""

from hvdrec.cli.entry import main

__all__ = ["main"]
