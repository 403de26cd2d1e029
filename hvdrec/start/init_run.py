"""`init`: write a first configuration for tables that were never seen before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hvdrec.config import load_config
from hvdrec.errors import UserError, choices, invalid_file, write_errors_named
from hvdrec.start.draft import Draft, make_draft
from hvdrec.start.look import look_at
from hvdrec.start.roles import Choice
from hvdrec.start.toml_text import toml_text

Ask = Callable[[str, str, str, Sequence[str]], str]
"""Function of a field, the guess, its reason and the allowed values that returns an answer."""
FIELDS = ("user", "item", "time", "label")


@dataclass(frozen=True)
class InitResult:
    """The configuration that `init` wrote.

    Attributes:
        path: The TOML file.
        interactions: The table of interactions, relative to ``paths.raw``.
        choices: "user", "item", "time" and "label" -> "value", "why" and "is_sure".
        features: Name of each feature -> "side", "kind" and "why".
        skipped: Column that is not used -> the reason.
    """

    path: str
    interactions: str
    choices: dict[str, dict[str, Any]]
    features: dict[str, dict[str, str]]
    skipped: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return asdict(self)


def init(
    files: Sequence[str | Path],
    *,
    to: str | Path = "",
    given: dict[str, str] | None = None,
    ask: Ask | None = None,
    overwrite: bool = False,
) -> InitResult:
    """Look at tables and write a commented TOML file that runs on them.

    At most a million rows of each table, and 64 MiB of each text file, are read.

    Args:
        files: The tables: a log, and tables of users and items if there are any.
        to: The TOML file; by default, it is in the current directory and has the name of the log.
        given: Known values of "user", "item", "time" and "label", which are not guessed.
        ask: Function that asks for these values; None keeps the guesses.
        overwrite: Replace an existing file.

    Raises:
        UserError: A table cannot be read, a column does not exist, or the file exists.
    """
    if to and Path(to).exists() and not overwrite:
        raise _exists(Path(to))
    known = {field: value for field, value in (given or {}).items() if value}
    with look_at([Path(file) for file in files]) as look:

        def answer(field: str, guess: Choice, allowed: Sequence[str]) -> Choice:
            value = known.get(field)
            if value is None and ask:
                value = ask(field, guess.value, guess.why, allowed)
                if value == guess.value:
                    return replace(guess, is_sure=True)
            if value is None:
                return guess
            if allowed and value not in allowed:
                problem = (
                    f"--{field} {value}: no such column; known: {choices(filter(None, allowed))}"
                )
                raise UserError(problem, field=field, value=value)
            return Choice(value, "as given")

        draft = make_draft(look, answer)
        name = Path(draft.log.path.split("*")[0].rstrip("/") or "run").name.split(".")[0] or "run"
        path = Path(to or f"{name}.toml")
        if path.exists() and not overwrite:
            raise _exists(path)
        text = toml_text(draft, path.stem, str(look.raw), f"runs/{path.stem}")
    with write_errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    load_config(path)  # if init wrote an invalid file, fail here and not in the next command
    return _result(path, draft)


def _exists(path: Path) -> UserError:
    return invalid_file(path, "already exists", "add --overwrite, or name another file with --to")


def _result(path: Path, draft: Draft) -> InitResult:
    return InitResult(
        str(path),
        draft.log.path,
        {field: asdict(getattr(draft, field)) for field in FIELDS},
        {f.name: {"side": f.side, "kind": f.kind, "why": f.why} for f in draft.features},
        {each.name: each.why for each in draft.skipped},
    )
