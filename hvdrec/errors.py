"""Errors that a user can fix. Each message is one line with the field, the value and the remedy."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

WRITE_REMEDIES = {
    errno.ENOSPC: "free some space, or choose a directory on another disk",
    errno.EDQUOT: "free some space, or choose a directory on another disk",
    errno.EROFS: "choose a directory on a writable disk",
    errno.EACCES: "change its permissions, or choose another directory",
    errno.EPERM: "change its permissions, or choose another directory",
}
"""System error of a failed write -> what the user can do about it."""


class UserError(ValueError):
    """A mistake in the configuration, the data or the command line.

    The message is one line: what is wrong, what is allowed and what to do. ``hvdrec`` prints it and
    exits with code 2.

    Attributes:
        field: The file, configuration field or option at fault; empty if the error has none.
        value: The refused value; None if the error is not about a value.
    """

    def __init__(self, text: str, *, field: str = "", value: object = None) -> None:
        super().__init__(text)
        self.field = field
        self.value = value


class SharedError(UserError):
    """A mistake that every rank of a job has detected, so that only rank 0 prints it."""


def invalid_value(field: str, value: object, problem: str, remedy: str = "") -> UserError:
    """Build the error for a value that is not allowed: ``field = value: problem; remedy``."""
    text = f"{field} = {shown(value)}: {problem}" + (f"; {remedy}" if remedy else "")
    return UserError(text, field=field, value=value)


def invalid_file(path: object, problem: str, remedy: str = "") -> UserError:
    """Build the error for a file or directory that cannot be used: ``path: problem; remedy``."""
    text = f"{path}: {problem}" + (f"; {remedy}" if remedy else "")
    return UserError(text, field=str(path))


def unknown_name(field: str, name: object, known: Iterable[object]) -> UserError:
    """Build the error for a name that does not exist; the message lists the known names."""
    text = f"{field} = {shown(name)}: unknown; {_known(name, known)}"
    return UserError(text, field=field, value=name)


def unknown_key(field: str, known: Iterable[object]) -> UserError:
    """Build the error for an unknown key; `field` is the dotted name, such as ``train.epoch``."""
    name = field.rpartition(".")[2]
    return UserError(f"{field}: unknown key; {_known(name, known)}", field=field)


def _known(name: object, known: Iterable[object]) -> str:
    names = [str(each) for each in known]
    near = nearest(str(name), names)
    return f"known: {choices(names)}" + (f"; did you mean '{near}'?" if near else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is most similar to `name`; "" if none is similar."""
    return next(iter(difflib.get_close_matches(name, [*known], n=1)), "")


def choices(names: Iterable[object]) -> str:
    """Format the allowed names for an error message: ``[a, b, c]``."""
    return "[" + ", ".join(str(name) for name in names) + "]"


def shown(value: object, limit: int = 60) -> str:
    """Format a value for an error message, with booleans as in TOML; at most `limit` characters."""
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextmanager
def write_errors_named(path: object) -> Iterator[None]:
    """Convert a failed write in the ``with`` body to an error that names `path` and the remedy.

    Raises:
        UserError: The disk is full or read-only, or the permissions do not allow the write; see
            `WRITE_REMEDIES`. Other errors are not converted.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in WRITE_REMEDIES:
            raise
        reason = os.strerror(error.errno)
        remedy = WRITE_REMEDIES[error.errno]
        raise invalid_file(path, f"cannot be written ({reason})", remedy) from error
