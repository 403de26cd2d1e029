"""The entry point of ``hvdrec``: parse the command line, run the command, print the result."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from hvdrec.cli.command import Answer
from hvdrec.cli.parser import parse
from hvdrec.errors import WRITE_REMEDIES, SharedError, UserError
from hvdrec.parallel.progress import is_first_rank
from hvdrec.scoring.errors import ScoringError
from hvdrec.storage.json_text import json_text


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: status 0 if all is well, 1 if a check failed, 2 for wrong input."""
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        answer: Answer = options.command.run(options)
    except (UserError, ScoringError) as error:
        _fail(str(error), is_shared=isinstance(error, SharedError))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "hvdrec":
            raise
        _fail(
            f"{error.name}: not installed; this command needs the extra 'train' (scripts/install)"
        )
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        if error.errno not in WRITE_REMEDIES:
            raise
        file = f"{error.filename}: " if error.filename else ""
        _fail(f"{file}{error.strerror}; {WRITE_REMEDIES[error.errno]}")
    except KeyboardInterrupt:
        sys.exit(130)
    if is_first_rank():
        print(json_text(answer.facts) if options.json else answer.text)
    sys.exit(answer.status)


def _fail(text: str, *, is_shared: bool = False) -> NoReturn:
    """Print an error message in one line and exit.

    Args:
        text: The error message.
        is_shared: True if all ranks have the same error; then only the first rank prints it.
    """
    line = " ".join(text.splitlines())
    if is_first_rank():
        print(f"hvdrec: error: {line}", file=sys.stderr, flush=True)
    elif not is_shared:
        rank = sys.modules["hvdrec.parallel.ranks"].current().rank
        print(f"hvdrec: error: rank {rank}: {line}", file=sys.stderr, flush=True)
    sys.exit(2)
