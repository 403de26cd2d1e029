"""The command line: parse, call the public API, print."""

from hvdrec.cli.main import main

__all__ = ["main"]
