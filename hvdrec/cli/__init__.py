"""The command line: it parses options, calls the public API and prints results."""

from hvdrec.cli.main import main

__all__ = ["main"]
