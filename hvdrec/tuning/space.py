"""The search space: the fields that a search varies, each with a range or a list of choices."""

from __future__ import annotations

import json
import math
import shlex
import tomllib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from hvdrec.config import Config, with_fields
from hvdrec.config.structure import from_text, to_dict, type_of
from hvdrec.errors import UserError, choices, invalid_value, unknown_name

Distribution = FloatDistribution | IntDistribution | CategoricalDistribution
Space = Mapping[str, Distribution]
"""Searched field -> Optuna's distribution of its values; choices are JSON texts."""
Values = Mapping[str, Any]
"""Plain values of fields, by dotted name: {"train.learning_rate": 0.001}."""

TABLES = ("model", "train")
"""Tables of the configuration whose fields can be searched."""
FIELDS = ("loader.shuffle_rows", "parallel.synchronization", "parallel.average_every")
"""Fields of other tables of the configuration that can be searched."""
FIXED = {
    "train.objective": "decides which metric compares trials",
    "train.metric": "decides which metric compares trials",
    "train.log_every": "does not change the result",
    "train.trackers": "does not change the result",
    "train.checkpoint_every": "does not change the result",
    "train.keep": "does not change the result",
    "train.device": "belongs to the machine",
    "train.threads": "belongs to the machine",
    "train.cpu_layers": "belongs to the machine",
}
"""Fields of `TABLES` that cannot be searched, and why."""
SHARED = ("features", "samples", "encode", "tasks", "paths")
"""Tables of the configuration that determine the training data, which all trials share."""
EXAMPLE = "train.learning_rate=log:1e-4:1e-2"
DIGITS = 4
"""A value from a range without steps is rounded to this many significant digits, to be easy to
copy.
"""


def parse_space(texts: Sequence[str], config: Config) -> dict[str, Distribution]:
    """Parse fields to search, written as ``train.learning_rate=log:1e-4:1e-2``.

    The field name is followed by a range of numbers (``LOW:HIGH``, ``LOW:HIGH:STEP`` or
    ``log:LOW:HIGH``) or choices (``A,B,C``). The choices of a list field are lists:
    ``[256,128],[400]``. In field names, dashes count as underscores.

    Raises:
        UserError: A field does not exist or cannot be searched, or a value is not allowed.
    """
    space: dict[str, Distribution] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        field = name.strip().removeprefix("--").replace("-", "_")
        if not equals or not values.strip():
            raise invalid_value("search", text, "must be FIELD=RANGE or FIELD=A,B,C", EXAMPLE)
        if field in space:
            raise invalid_value("search", text, f"'{field}' is given twice", "give one range")
        kind = _field_type(field, config)
        try:
            distribution = _distribution(field, values.strip(), kind)
            for value in _examples(distribution):
                with_fields(config, {field: value})
        except UserError as error:
            raise UserError(f"search {text}: {error}", field="search", value=text) from None
        space[field] = distribution
    return space


def value_of(distribution: Distribution, parameter: Any) -> Any:
    """Convert a parameter that Optuna proposes to the plain value of the field."""
    if isinstance(distribution, CategoricalDistribution):
        return json.loads(parameter)
    if isinstance(distribution, IntDistribution):
        return int(parameter)
    digits = DIGITS if distribution.step is None else 12
    return min(max(float(f"{parameter:.{digits}g}"), distribution.low), distribution.high)


def values_of(config: Config, fields: Iterable[str]) -> dict[str, Any]:
    """Return the plain values that some fields have in a configuration."""
    values = flatten(to_dict(config))
    return {field: values[field] for field in fields}


def flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables to a dict: dotted name -> value."""
    values: dict[str, Any] = {}
    for key, value in tables.items():
        name = f"{prefix}{key}"
        values |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return values


def size(space: Space) -> float:
    """Return the number of combinations of values; infinity if a range is continuous."""

    def count(distribution: Distribution) -> float:
        if isinstance(distribution, CategoricalDistribution):
            return len(distribution.choices)
        if distribution.step is None:
            return math.inf
        return math.floor((distribution.high - distribution.low) / distribution.step + 1e-9) + 1

    return math.prod(count(each) for each in space.values())


def as_overrides(values: Values) -> str:
    """Format values as options of ``hvdrec train``, quoted for a shell."""
    words = []
    for field, value in values.items():
        words.append(f"--{field.replace('_', '-')}")
        words += [str(each) for each in (value if isinstance(value, list) else [value])]
    return shlex.join(words)


def as_toml(values: Values) -> str:
    """Format values as TOML to paste into a configuration."""
    tables: dict[str, list[str]] = {}
    for field, value in values.items():
        table, _, name = field.rpartition(".")
        tables.setdefault(table, []).append(f"{name} = {json.dumps(value)}")
    return "\n\n".join("\n".join([f"[{table}]", *lines]) for table, lines in tables.items())


def _field_type(field: str, config: Config) -> Any:
    """Return the type of a field; raise UserError if it cannot be searched."""
    table, allowed = field.partition(".")[0], choices([*(f"{each}.*" for each in TABLES), *FIELDS])
    if field in FIXED:
        raise invalid_value("search", field, FIXED[field], "set it in the configuration")
    if table in SHARED:
        problem = "decides what the samples and features are, which all trials share"
        raise invalid_value("search", field, problem, f"allowed: {allowed}")
    known = flatten(to_dict(config))
    inner = [each for each in known if each.startswith(f"{field}.")]
    if inner:
        raise invalid_value(
            "search", field, "is a table", f"name one of its fields: {choices(inner)}"
        )
    if field in known and (table in TABLES or field in FIELDS):
        return type_of(Config, field.split("."))
    if field in known:
        problem = "does not change the metric that compares trials"
        raise invalid_value("search", field, problem, f"allowed: {allowed}")
    searchable = [each for each in known if each.partition(".")[0] in TABLES or each in FIELDS]
    raise unknown_name("search", field, [each for each in searchable if each not in FIXED])


def _distribution(field: str, values: str, kind: Any) -> Distribution:
    """Return the range or the choices that a text gives for a field of type `kind`."""
    number = next((each for each in (int, float) if each in _plain_types(kind)), None)
    if number is not None and ":" in values:
        return _range(field, values, number)
    parsed = [_choice(field, text, kind) for text in _split(values)]
    if len(parsed) < 2 or any(value in parsed[:i] for i, value in enumerate(parsed)):
        raise invalid_value(field, values, "give a range, or two different values")
    return CategoricalDistribution([json.dumps(value) for value in parsed])


def _plain_types(kind: Any) -> tuple[Any, ...]:
    """Return a type, or the types of a union, without their constraints."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return tuple(get_args(k)[0] if get_origin(k) is Annotated else k for k in kinds)


def _range(field: str, values: str, kind: Any) -> Distribution:
    is_log = values.startswith("log:")
    numbers = [from_text(kind, each, field) for each in values.removeprefix("log:").split(":")]
    if not 2 <= len(numbers) <= 3 - is_log:
        raise invalid_value(field, values, "a range is LOW:HIGH, LOW:HIGH:STEP or log:LOW:HIGH")
    low, high, *step = numbers
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna lowers a high end that no step reaches
            distribution: IntDistribution | FloatDistribution = (
                IntDistribution(low, high, log=is_log, step=step[0] if step else 1)
                if kind is int
                else FloatDistribution(low, high, log=is_log, step=step[0] if step else None)
            )
    except ValueError as error:
        raise invalid_value(field, values, str(error)) from None
    if distribution.single():
        raise invalid_value(field, values, "holds one value", "give a wider range")
    return distribution


def _choice(field: str, text: str, kind: Any) -> Any:
    if get_origin(kind) is not tuple:
        return from_text(kind, text, field)
    try:
        return list(tomllib.loads(f"x = {text}")["x"])
    except (TypeError, ValueError):
        raise invalid_value(field, text, "must be a list such as [256,128]") from None


def _examples(distribution: Distribution) -> tuple[Any, ...]:
    """Return some values of a distribution; if these are allowed, all its values are allowed."""
    if isinstance(distribution, CategoricalDistribution):
        return tuple(json.loads(str(choice)) for choice in distribution.choices)
    return value_of(distribution, distribution.low), value_of(distribution, distribution.high)


def _split(values: str) -> list[str]:
    """Split a text at the commas that are not inside brackets."""
    parts, depth = [""], 0
    for character in values:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]
