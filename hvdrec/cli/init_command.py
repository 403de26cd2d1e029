"""The command that writes a first configuration: init."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hvdrec.cli.command import OVERWRITE, Answer, argument, command
from hvdrec.cli.text_table import table
from hvdrec.errors import UserError, choices

QUESTIONS = {
    "user": "Which column identifies the user?",
    "item": "Which column identifies the item?",
    "time": "Which column holds the time ('-' for none)?",
    "label": "Which SQL condition makes a row positive?",
}


@command(
    argument("files", nargs="+", metavar="FILE", help="the log, and tables of users and items"),
    argument("--to", default="", metavar="TOML", help="file to write (default: LOG.toml)"),
    argument("--user", default="", metavar="COLUMN", help="column of the user key"),
    argument("--item", default="", metavar="COLUMN", help="column of the item key"),
    argument("--time", default="", metavar="COLUMN", help="column of the time"),
    argument("--label", default="", metavar="SQL", help="condition of a positive row"),
    argument("--yes", action="store_true", help="accept all guesses; ask nothing"),
    OVERWRITE,
    notes="Tables may be CSV (any delimiter and encoding, with or without header), JSON lines or\n"
    "Parquet: files, directories or globs in quotes. Of each, at most a million rows are read.\n\n",
    example="hvdrec init data/ratings.csv data/movies.csv --to movies.toml --yes",
)
def init(options: argparse.Namespace) -> Answer:
    """Look at tables and write a commented configuration that runs on them."""
    from hvdrec.start.init_run import init as write_config

    given = {field: getattr(options, field) for field in QUESTIONS}
    remote = next((file for file in options.files if "://" in file), "")
    if remote:
        problem = "must be local; copy a part of it, then set paths.raw to the URL"
        raise UserError(f"{remote}: {problem}", field="files", value=remote)
    ask = None if options.yes else ask_on_terminal
    result = write_config(
        options.files, to=options.to, given=given, ask=ask, overwrite=options.overwrite
    )
    chosen = [[field, each["value"], each["why"]] for field, each in result.choices.items()]
    features = [[n, f["side"], f["kind"], f["why"]] for n, f in result.features.items()]
    lines = [
        table(["field", "guess", "why"], chosen),
        "",
        table(["feature", "side", "kind", "why"], features),
    ]
    if result.skipped:
        lines += ["", table(["not a feature", "why"], [*map(list, result.skipped.items())])]
    path = result.path
    lines += ["", f"wrote {path}", "Check it, then run:", *_next(path)]
    return Answer(result.to_dict(), "\n".join(lines))


def _next(path: str) -> Sequence[str]:
    work = f"runs/{Path(path).stem}/run"
    verbs = (f"samples {path}", f"check {path}", f"prepare {path}", f"train {path}")
    return [f"  hvdrec {verb}" for verb in (*verbs, f"evaluate {work}")]


def ask_on_terminal(field: str, guess: str, why: str, allowed: Sequence[str]) -> str:
    """Ask a question until the answer is allowed; an empty answer accepts the guess.

    Raises:
        UserError: Standard input ends before the answer.
    """
    if allowed:
        print(f"\n{QUESTIONS[field]} {choices(filter(None, allowed))}", file=sys.stderr)
    else:
        print(f"\n{QUESTIONS[field]}", file=sys.stderr)
    while True:
        print(f"  {guess or '-'} ({why}) > ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            problem = f"no answer for '{field}'; add --yes to accept the guesses, or --{field}"
            raise UserError(problem, field=field)
        text = line.strip()
        answer = guess if not text else "" if text == "-" else text
        if not allowed or answer in allowed:
            return answer
        print(f"  no such column: {answer or '-'}", file=sys.stderr)
