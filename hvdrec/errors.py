"""The error that a user can mend."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: configuration, data or command line.

    The text is one line that names the file or field, the value, what is allowed and what to do.
    The command line prints it and exits with code 2; library callers catch this type.
    """


class SharedError(UserError):
    """A mistake that every rank of a job has heard of; the first rank tells the user."""


def choices(names: Iterable[object]) -> str:
    """Return the legal choices as they stand in an error's line: ``[a, b, c]``."""
    return "[" + ", ".join(str(name) for name in names) + "]"
