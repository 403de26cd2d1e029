"""Errors of the slim module; each text is one line that says what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Iterable


class ScoringError(ValueError):
    """Whatever a user of the slim module can mend."""


class BundleError(ScoringError):
    """A bundle that is missing, damaged or of another format."""


class ReplacedError(BundleError):
    """A bundle in whose place another one was put while it was read; loading again helps."""


class RequestError(ScoringError):
    """A request with an unknown field or a value of the wrong type."""


class StoreError(ScoringError):
    """A store that cannot answer now; the request may be tried again."""


def choices(names: Iterable[object]) -> str:
    """Return the legal choices as they stand in an error's line."""
    return "[" + ", ".join(str(name) for name in names) + "]"


def shown(value: object) -> str:
    """Return a value as it stands in an error's line: on one line, shortened."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of thousands of digits has no decimal text
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 60 else text[:57] + "..."
