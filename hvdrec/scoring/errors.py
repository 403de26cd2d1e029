"""Errors of the slim module: one line that names the field, the value and the remedy."""

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
    """An error that a user of the scorer can fix; the base of all errors that scoring raises.

    Attributes:
        field: The argument, request field or file at fault, such as ``k``, ``scene.hour``,
            ``items.year`` or ``bundle/ranker.onnx``; empty if there is not one.
        value: Its value; None if there is not one.
    """

    def __init__(self, text: str, *, field: str = "", value: object = None) -> None:
        """Create an error whose message is ``text``."""
        super().__init__(text)
        self.field = field
        self.value = value


class BundleError(ScoringError):
    """The bundle is missing, damaged or of another format."""


class ReplacedError(BundleError):
    """Another bundle replaced this one while it was read; load it again."""


class RequestError(ScoringError):
    """A request has an unknown field or a value that is not allowed.

    Attributes:
        problem: The text after ``field = value: ``, for callers that show the value in another
            notation; empty if the text does not show a value.
    """

    problem: str = ""


class StoreError(ScoringError):
    """An embedding store cannot answer now; the request may be repeated."""


def invalid_request(field: str, value: object, problem: str, remedy: str = "") -> RequestError:
    """Build the error for a value that is not allowed: ``field = value: problem; remedy``."""
    problem = f"{problem}; {remedy}" if remedy else problem
    error = RequestError(f"{field} = {shown(value)}: {problem}", field=field, value=value)
    error.problem = problem
    return error


def unknown_field(field: str, known: Iterable[object], remedy: str = "") -> RequestError:
    """Build the error for a field that does not exist, with the known fields."""
    text = f"{field}: unknown field; known: {choices(known)}" + (f"; {remedy}" if remedy else "")
    return RequestError(text, field=field)


def invalid_bundle(
    path: object, problem: str, remedy: str = "export the bundle again"
) -> BundleError:
    """Build the error for a file or directory of a bundle: ``path: problem; remedy``."""
    return BundleError(f"{path}: {problem}; {remedy}", field=str(path))


def choices(names: Iterable[object]) -> str:
    """Format the allowed choices for an error message: ``[a, b, c]``."""
    return "[" + ", ".join(str(name) for name in names) + "]"


def type_words(value: object) -> str:
    """Return the type of a value in words, in those of JSON where it has one."""
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
