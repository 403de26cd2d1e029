"""Write a draft as a commented TOML file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from hvdrec.config.data_sections import TableFormat
from hvdrec.samples.sql import basic_string
from hvdrec.start.draft import Draft
from hvdrec.start.features import FeatureGuess
from hvdrec.start.feedback_guess import UNITS, WINDOW
from hvdrec.start.roles import Choice, epoch_unit

COMMENT = 38
"""Column at which comments begin."""


def toml_text(draft: Draft, name: str, raw: str, work: str) -> str:
    """Return the text of a configuration that runs, with a reason for each guess.

    Args:
        draft: The contents.
        name: Name of the run.
        raw: Directory of the raw tables.
        work: Directory of the run.
    """
    lines = [
        f"# Written by hvdrec init from {draft.log.rows} rows of {draft.log.path}. Each line says",
        "# why it was guessed; check those marked with a question mark.",
        "",
        f"name = {basic_string(name)}",
        "",
        "[paths]",
        f"raw = {basic_string(raw)}",
        f"work = {basic_string(work)}",
        "",
        *_samples(draft),
        *_feedback(draft),
        *_formats(draft),
        *_derived(draft),
        *_history(draft),
        *_split(draft),
        *_features(draft),
    ]
    return "\n".join(lines) + "\n"


def _samples(draft: Draft) -> Iterator[str]:
    yield "[samples]"
    yield _line("interactions", draft.log.path, "one row per item shown, or per action")
    for each in draft.sides:
        yield _line(f"{each.side}s", each.table.path, each.why)
    for path, why in draft.unused.items():
        yield f"# not used: {path}: {why}"
    yield _choice("user", draft.user)
    yield _choice("item", draft.item)
    if draft.time.value:
        yield _choice("time", draft.time)
        if unit := UNITS.get(epoch_unit(draft.log[draft.time.value])):
            yield f"time_unit = {basic_string(unit)}"
    if draft.title:
        yield _line("title", draft.title, "names of items for display")
    yield _choice("label", draft.label)
    if draft.negatives:
        yield ""
        yield "[samples.negatives]"
        line = f"per_positive = {draft.negatives}"
        yield f"{line:<{COMMENT}}# items that the user did not take, drawn at random"


def _feedback(draft: Draft) -> Iterator[str]:
    for each in draft.feedback:
        yield from ("", "[[samples.feedback]]")
        yield _line("name", each.name, f"adds {each.name}_count and {each.name}_delay to the log")
        yield f"table = {basic_string(each.table)}"
        yield f"on = [{', '.join(map(basic_string, each.on))}]"
        yield f"time = {basic_string(each.time)}"
        if each.unit:
            yield f"time_unit = {basic_string(each.unit)}"
        yield _line("window", WINDOW, "(?) hvdrec delay recommends a window")


def _formats(draft: Draft) -> Iterator[str]:
    for each in draft.formats:
        yield from ("", "[[samples.tables]]", f"path = {basic_string(each.path)}")
        default = TableFormat(path=each.path)
        for field in ("delimiter", "encoding", "header", "quote"):
            value = getattr(each, field)
            if value != getattr(default, field):
                text = str(value).lower() if isinstance(value, bool) else basic_string(value)
                yield f"{field} = {text}"
        if each.columns:
            text = ", ".join(map(basic_string, each.columns))
            yield from textwrap.wrap(f"columns = [{text}]", 100, subsequent_indent="    ")
        if each.rename:
            pairs = ", ".join(
                f"{_key(old)} = {basic_string(new)}" for old, new in each.rename.items()
            )
            yield f"rename = {{ {pairs} }}"


def _derived(draft: Draft) -> Iterator[str]:
    if draft.derive:
        yield from ("", "[samples.derive]")
        yield from (f"{_key(name)} = {basic_string(sql)}" for name, sql in draft.derive.items())


def _history(draft: Draft) -> Iterator[str]:
    if draft.history:
        yield from ("", "[[samples.history]]")
        yield _line("name", draft.history, "the user's positive items before each row")
        yield "length = 50"


def _split(draft: Draft) -> Iterator[str]:
    yield from ("", "[samples.split]")
    if draft.time.value:
        yield _line("method", "temporal", "train on the past, test on the future")
    else:
        yield _line("method", "random", "there is no time")


def _features(draft: Draft) -> Iterator[str]:
    for feature in draft.features:
        yield from _feature(feature)
        if feature.name == draft.user.value and draft.history:
            yield from ("", "[[features]]")
            yield _line("name", draft.history, "the history above; shares the items' embeddings")
            yield from ('kind = "sequence"', "max_length = 50")
    if draft.skipped:
        yield ""
    for column in draft.skipped:
        yield f"# not a feature: {column.name}: {column.why}"


def _feature(feature: FeatureGuess) -> Iterator[str]:
    yield from ("", "[[features]]")
    yield _line("name", feature.name, feature.why)
    if feature.side != "user":
        yield f'side = "{feature.side}"'
    if feature.kind != "categorical":
        yield f'kind = "{feature.kind}"'
    if feature.dtype != "string":
        yield f'dtype = "{feature.dtype}"'
    if feature.transform:
        yield f'transform = "{feature.transform}"'
    if feature.kind == "categorical_list":
        yield "max_length = 20"
    if feature.min_count > 1:
        line = f"min_count = {feature.min_count}"
        yield f"{line:<{COMMENT}}# rarer values share the code for unknown values"


def _choice(field: str, choice: Choice) -> str:
    return _line(field, choice.value, choice.why + ("" if choice.is_sure else " (?)"))


def _line(field: str, value: str, comment: str) -> str:
    line = f"{field} = {basic_string(value)}"
    return f"{line:<{COMMENT}}# {' '.join(comment.split())}" if comment else line


def _key(name: str) -> str:
    bare = name.isascii() and name.replace("_", "a").replace("-", "a").isalnum()
    return name if bare else basic_string(name)
