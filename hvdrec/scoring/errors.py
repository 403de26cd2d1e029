"""Errors of `hvdrec.scoring`. Each message is one line with the field, the value and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

TYPE_WORDS: tuple[tuple[type, str], ...] = (
    (bool, "a boolean"),  # before int, its base
    (int, "an integer"),
    (float, "a number"),
    (str, "a string"),
    (list, "a list"),
    (Mapping, "an object"),
)


class ScoringError(ValueError):
    """Base class of the errors that scoring raises for wrong arguments and unusable bundles.

    Attributes:
        field: The argument, request field or file at fault, such as ``k``, ``scene.hour``,
            ``items.year`` or ``bundle/ranker.onnx``; empty if the error is about none of them.
        value: The refused value; None for an error that is not about a value.
    """

    def __init__(self, text: str, *, field: str = "", value: object = None) -> None:
        """Create an error whose message is ``text``."""
        super().__init__(text)
        self.field = field
        self.value = value


class BundleError(ScoringError):
    """The bundle is missing, damaged or has another format."""


class ReplacedError(BundleError):
    """Another bundle was moved to the path while this one was read; loading again helps."""


class RequestError(ScoringError):
    """A request has an unknown field or a value that is not allowed.

    Attributes:
        problem: The part of the message after ``field = value: ``, for callers that format the
            value themselves; empty if the message shows no value.
    """

    problem: str = ""


class StoreError(ScoringError):
    """An embedding store cannot answer now; the same request may succeed later."""


def invalid_request(field: str, value: object, problem: str, remedy: str = "") -> RequestError:
    """Build the error for a value that is not allowed: ``field = value: problem; remedy``."""
    problem = f"{problem}; {remedy}" if remedy else problem
    error = RequestError(f"{field} = {shown(value)}: {problem}", field=field, value=value)
    error.problem = problem
    return error


def unknown_field(field: str, known: Iterable[object], remedy: str = "") -> RequestError:
    """Build the error for a field that does not exist; the message lists the known fields."""
    text = f"{field}: unknown field; known: {choices(known)}" + (f"; {remedy}" if remedy else "")
    return RequestError(text, field=field)


def invalid_bundle(
    path: object, problem: str, remedy: str = "export the bundle again"
) -> BundleError:
    """Build the error for a file or directory of a bundle: ``path: problem; remedy``."""
    return BundleError(f"{path}: {problem}; {remedy}", field=str(path))


def choices(names: Iterable[object]) -> str:
    """Format the allowed names for an error message: ``[a, b, c]``."""
    return "[" + ", ".join(str(name) for name in names) + "]"


def type_words(value: object) -> str:
    """Return the type of a value in words; for JSON types, the words of JSON, such as "a list"."""
    for kind, words in TYPE_WORDS:
        if isinstance(value, kind):
            return words
    return "null" if value is None else type(value).__name__


def shown(value: object) -> str:
    """Format a value for an error message: on one line, at most 60 characters."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 60 else text[:57] + "..."


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or its type if it has no text."""
    return (str(error).splitlines() or [type(error).__name__])[0]
