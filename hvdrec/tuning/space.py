"""What is searched: fields of a configuration, each with a range or with choices."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

from hvdrec.config import Config, with_fields
from hvdrec.config.structure import to_dict
from hvdrec.errors import UserError, choices

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Values = Mapping[str, Any]
"""Plain values of fields, by the fields' names from the root: {"train.learning_rate": 0.001}."""

TABLES = ("model", "train")
"""Tables of the configuration whose fields are searched..."""
FIELDS = ("loader.shuffle_rows", "parallel.synchronization", "parallel.average_every")
"""...and single fields of others..."""
FIXED = {
    "train.objective": "decides what trials are compared by",
    "train.metric": "decides what trials are compared by",
    "train.log_every": "changes no result",
    "train.checkpoint_every": "changes no result",
    "train.keep": "changes no result",
    "train.device": "is the machine's",
    "train.threads": "is the machine's",
}
"""...but for these."""
SHARED = ("features", "samples", "encode", "tasks", "paths")
"""Tables that decide what the trials train on."""
EXAMPLE = "train.learning_rate=log:1e-4:1e-2"
DIGITS = 4
"""Significant digits of a value from a range: enough, and short enough to be pasted."""


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included: in steps, or evenly by their logarithms."""

    low: float
    high: float
    step: float | None = None
    is_log: bool = False
    is_integer: bool = False

    def distribution(self) -> BaseDistribution:
        """Return it as Optuna has it."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.is_integer:
            step = int(self.step or 1)
            return IntDistribution(int(self.low), int(self.high), log=self.is_log, step=step)
        return FloatDistribution(self.low, self.high, log=self.is_log, step=self.step)

    def value_of(self, parameter: Any) -> Any:
        """Return the field's value for what Optuna proposes."""
        if self.is_integer:
            return int(parameter)
        digits = DIGITS if self.step is None else 12
        return min(max(float(f"{parameter:.{digits}g}"), self.low), self.high)

    def parameter_of(self, value: Any) -> Any:
        """Return what Optuna knows a value by; None if it is outside."""
        return value if self.low <= value <= self.high and self._is_step(value) else None

    def _is_step(self, value: float) -> bool:
        steps = (value - self.low) / (self.step or 1)
        return self.step is None or math.isclose(steps, round(steps), abs_tol=1e-9)

    def count(self) -> float:
        """Return how many values there are."""
        if self.is_integer or self.step is not None:
            return math.floor((self.high - self.low) / (self.step or 1) + 1e-9) + 1
        return math.inf

    def examples(self) -> tuple[Any, ...]:
        """Return values that must be allowed for all to be."""
        return (self.value_of(self.low), self.value_of(self.high))


@dataclass(frozen=True)
class Choices:
    """Some values, in no order."""

    values: tuple[Any, ...]

    def distribution(self) -> BaseDistribution:
        """Return it as Optuna has it."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution([json.dumps(value) for value in self.values])

    def value_of(self, parameter: Any) -> Any:
        """Return the field's value for what Optuna proposes."""
        return json.loads(parameter)

    def parameter_of(self, value: Any) -> Any:
        """Return what Optuna knows a value by; None if it is not among them."""
        return json.dumps(value) if value in self.values else None

    def count(self) -> float:
        """Return how many values there are."""
        return len(self.values)

    def examples(self) -> tuple[Any, ...]:
        """Return values that must be allowed for all to be."""
        return self.values


Space = Mapping[str, Range | Choices]


def parse_space(given: Sequence[str], config: Config) -> Space:
    """Return what texts such as ``train.learning_rate=log:1e-4:1e-2`` say, by field.

    LOW:HIGH, LOW:HIGH:STEP and log:LOW:HIGH are ranges of a number, A,B,C are choices (of lists:
    [256,128],[400]); dashes in names count as underscores. Raises UserError for a field that is
    none or cannot be searched, and for a value that the configuration does not allow.
    """
    space: dict[str, Range | Choices] = {}
    for text in given:
        name, mark, values = text.partition("=")
        field = name.strip().removeprefix("--").replace("-", "_")
        if not mark or not values.strip():
            raise UserError(f"--search '{text}': must be FIELD=RANGE or FIELD=A,B,C: {EXAMPLE}")
        if field in space:
            raise UserError(f"--search {text}: '{field}' is there twice; give one range")
        found = _parse(text, values.strip(), _kind_of(field))
        for value in found.examples():
            try:
                with_fields(config, {field: value})
            except UserError as error:
                raise UserError(f"--search {text}: {error}") from None
        space[field] = found
    return space


def values_of(config: Config, space: Space) -> dict[str, Any]:
    """Return the values that a configuration has for the fields of a space."""
    raw = to_dict(config)
    found = {}
    for field in space:
        value = raw
        for name in field.split("."):
            value = value[name]
        found[field] = value
    return found


def size(space: Space) -> float:
    """Return how many combinations there are."""
    return math.prod(each.count() for each in space.values())


def as_overrides(values: Values) -> str:
    """Return values as options of ``hvdrec train``, quoted for a shell."""
    words = []
    for field, value in values.items():
        words.append(f"--{field.replace('_', '-')}")
        words += [str(each) for each in (value if isinstance(value, list) else [value])]
    return shlex.join(words)


def as_toml(values: Values) -> str:
    """Return values as lines of a configuration's TOML, table by table."""
    tables: dict[str, list[str]] = {}
    for field, value in values.items():
        table, _, name = field.rpartition(".")
        tables.setdefault(table, []).append(f"{name} = {json.dumps(value)}")
    return "\n\n".join("\n".join([f"[{table}]", *lines]) for table, lines in tables.items())


def searchable() -> str:
    """Return which fields can be searched, for people."""
    return choices([*(f"{table}.*" for table in TABLES), *FIELDS])


def _kind_of(field: str) -> Any:
    """Return the type of a field that can be searched."""
    kinds = _kinds(Config)
    table = field.partition(".")[0]
    if field in FIXED:
        raise UserError(f"--search {field}: {FIXED[field]}; set it in the file instead")
    if any(each.startswith(f"{field}.") for each in kinds):
        inner = [each for each in kinds if each.startswith(f"{field}.")]
        raise UserError(f"--search {field}: is a table; name one of its fields: {choices(inner)}")
    if (table in TABLES or field in FIELDS) and field in kinds:
        return kinds[field]
    if field in kinds or table in SHARED:
        why = (
            "decides what the samples and features are, which all trials share"
            if table in SHARED
            else "changes nothing that trials are compared by"
        )
        raise UserError(f"--search {field}: {why}; fields that can be searched: {searchable()}")
    known = [each for each in kinds if each.partition(".")[0] in TABLES or each in FIELDS]
    near = difflib.get_close_matches(field, known, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise UserError(
        f"--search {field}: is no field; fields that can be searched: {searchable()}{hint}"
    )


def _kinds(kind: Any, where: str = "") -> dict[str, Any]:
    """Return the type of each field of nested dataclasses, by its name from the root."""
    hints = get_type_hints(kind)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        name, hint = f"{where}{field.name}", hints[field.name]
        found |= _kinds(hint, f"{name}.") if dataclasses.is_dataclass(hint) else {name: hint}
    return found


def _parse(text: str, values: str, kind: Any) -> Range | Choices:
    if kind in (int, float) and ":" in values:
        return _range(text, values, is_integer=kind is int)
    parts = _split(values)
    found = tuple(_value(text, part, kind) for part in parts)
    if len(found) < 2 or any(value in found[:i] for i, value in enumerate(found)):
        example = "16,32" if kind in (int, float) else "A,B"
        raise UserError(f"--search {text}: give a range, or two different values: {example}")
    return Choices(found)


def _range(text: str, values: str, *, is_integer: bool) -> Range:
    parts = values.split(":")
    is_log = parts[0] == "log"
    numbers = parts[is_log:]
    if not 2 <= len(numbers) <= 3 - is_log:
        raise UserError(f"--search {text}: a range is LOW:HIGH, LOW:HIGH:STEP or log:LOW:HIGH")
    low, high, *step = (_value(text, number, int if is_integer else float) for number in numbers)
    if not low < high:
        raise UserError(f"--search {text}: {low} must be less than {high}")
    if is_log and low <= 0:
        raise UserError(f"--search {text}: a logarithmic range must begin above 0")
    if step and not 0 < step[0] <= high - low:
        raise UserError(f"--search {text}: the step {step[0]} must be in (0, {high - low}]")
    return Range(low, high, step[0] if step else None, is_log, is_integer)


def _split(values: str) -> list[str]:
    """Split at the commas that stand in no brackets."""
    parts, depth = [""], 0
    for character in values:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _value(text: str, part: str, kind: Any) -> Any:
    """Return a choice's plain value; `from_dict` checks what it is good for."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[part.lower()]
        if kind is int:
            return int(part)
        if kind is float:
            number = float(part)
            if math.isfinite(number):
                return number
        elif get_origin(kind) is tuple:
            return list(tomllib.loads(f"x = {part}")["x"])
        else:
            return part
    except (KeyError, TypeError, ValueError):
        pass
    wanted = "a list such as [256,128]" if get_origin(kind) is tuple else f"of type {kind.__name__}"
    raise UserError(f"--search {text}: '{part}' must be {wanted}")
