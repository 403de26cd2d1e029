"""Fitting features: vocabularies and statistics of the training split."""

from __future__ import annotations

import glob
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvdrec.config import Config
from hvdrec.config.schema import FIRST_CODE, MISSING_INT, Feature, Schema
from hvdrec.config.structure import from_dict, to_dict
from hvdrec.errors import UserError, choices
from hvdrec.storage.artifacts import Manifest
from hvdrec.storage.urls import Location, read_table

if TYPE_CHECKING:
    import duckdb

HASH_PRIME = 2**31 - 1
FITTED_FILE = "fitted.json"

ARROW_TYPES = {"string": pa.string(), "int": pa.int64(), "float": pa.float64()}


@dataclass(frozen=True)
class FittedFeature:
    """What was learned of one feature.

    size: number of codes (0 for a plain number). values: the vocabulary in the order of its codes,
    which begin at FIRST_CODE. mean, deviation: of the (log-)values, population deviation.
    boundaries: float64, ascending and distinct: the lower ends of the quantile buckets but the
    first. A value falls into the bucket whose number is how many boundaries are not above it.
    """

    feature: Feature
    size: int = 0
    values: list[Any] | None = None
    mean: float = 0.0
    deviation: float = 1.0
    boundaries: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Fitted:
    """All features with what was learned of them; those that share a vocabulary hold the same."""

    schema: Schema
    features: Mapping[str, FittedFeature]

    @property
    def sizes(self) -> dict[str, int]:
        """Return the number of codes of each table, by the name of the feature that owns it."""
        return {
            name: fitted.size
            for name, fitted in self.features.items()
            if fitted.size and self.schema.vocabulary_of(fitted.feature) == name
        }

    def save(self, directory: Path) -> None:
        """Write ``fitted.json`` and ``vocabulary/NAME.parquet`` into a directory."""
        (directory / "vocabulary").mkdir(parents=True, exist_ok=True)
        facts = {}
        for name, fitted in self.features.items():
            facts[name] = {
                "size": fitted.size,
                "mean": fitted.mean,
                "deviation": fitted.deviation,
                "boundaries": None if fitted.boundaries is None else fitted.boundaries.tolist(),
            }
            if fitted.values is not None and self.schema.vocabulary_of(fitted.feature) == name:
                values = pa.array(fitted.values, ARROW_TYPES[fitted.feature.dtype])
                codes = pa.array(range(FIRST_CODE, FIRST_CODE + len(values)), pa.int64())
                table = pa.table({"code": codes, "value": values})
                pq.write_table(table, directory / "vocabulary" / f"{name}.parquet")
        schema = {
            "features": to_dict(self.schema.features),
            "user_key": self.schema.user_key,
            "item_key": self.schema.item_key,
        }
        text = json.dumps({"schema": schema, "fitted": facts}, indent=1)
        (directory / FITTED_FILE).write_text(text + "\n")

    @staticmethod
    def load(directory: Location) -> Fitted:
        """Read what `save` wrote; UserError if it is missing or damaged."""
        file = directory / FITTED_FILE
        try:
            raw = json.loads(file.read_text())
            schema = from_dict(Schema, raw["schema"])
            facts = raw["fitted"]
            features = {}
            for feature in schema.features:
                fact, owner = facts[feature.name], schema.vocabulary_of(feature)
                values = None
                if feature.has_vocabulary:
                    values = _read_vocabulary(directory / "vocabulary" / f"{owner}.parquet")
                boundaries = fact["boundaries"]
                features[feature.name] = FittedFeature(
                    feature,
                    fact["size"],
                    values,
                    fact["mean"],
                    fact["deviation"],
                    None if boundaries is None else np.array(boundaries, np.float64),
                )
        except FileNotFoundError:
            raise UserError(f"{file}: is missing; run hvdrec prepare") from None
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise UserError(f"{file}: damaged ({error}); run hvdrec prepare again") from None
        return Fitted(schema, features)


def fit(samples: Path, schema: Schema) -> Fitted:
    """Learn vocabularies and statistics from the training split of samples.

    Vocabularies are sorted by falling count, then by value (strings bytewise), and sums are taken
    in the order of the rows, so that the same data gives the same codes. DuckDB streams the files;
    what is held is the distinct values of one feature, and for quantiles 8 bytes a row.
    Raises UserError for no files, a missing column, a wrong type, or numbers without a mean.
    """
    import duckdb  # slow to import, and every rank would wait for it

    check_columns(samples / "train", schema)
    # A directory's own name may hold what a pattern reads as a wildcard.
    pattern = glob.escape(str(samples / "train")) + "/*.parquet"
    learned: dict[str, FittedFeature] = {}
    with duckdb.connect() as connection:
        connection.execute("SET enable_progress_bar = false")
        source = connection.read_parquet(pattern)
        for feature in schema.features:
            if schema.vocabulary_of(feature) == feature.name:
                # Threads would add floats in another order each time.
                moments = feature.kind == "numeric" and feature.transform != "quantile"
                connection.execute("SET threads = 1" if moments else "RESET threads")
                learned[feature.name] = _fit_one(source, feature)
    features = {}
    for feature in schema.features:
        owner = learned[schema.vocabulary_of(feature)]
        features[feature.name] = FittedFeature(
            feature, owner.size, owner.values, owner.mean, owner.deviation, owner.boundaries
        )
    return Fitted(schema, features)


def check_columns(folder: Path, schema: Schema) -> None:
    """Raise UserError if a folder holds no Parquet, or a file lacks a feature in its type."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise UserError(f"{folder}: no Parquet files here; make the samples again")
    for file in files:
        check_file(file, schema.features)


def check_file(file: Path, features: Iterable[Feature], others: Iterable[str] = ()) -> None:
    """Raise UserError unless a file is Parquet with the features in their types and the others."""
    try:
        found = pq.read_schema(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"{file}: no readable Parquet ({one_line(error)}); make the samples again"
        ) from None
    expected = {feature.name: raw_arrow_type(feature) for feature in features}
    for name in (*expected, *others):
        if name not in found.names:
            raise UserError(
                f"{file}: column '{name}' is missing; the file has {choices(found.names)}; "
                "make the samples again"
            )
    for name, kind in expected.items():
        actual = found.field(name).type
        plain = pa.list_(actual.value_type) if pa.types.is_list(actual) else actual
        if plain != kind:
            raise UserError(
                f"{file}: column '{name}' is {actual}, its feature needs {kind}; "
                "make the samples again or change its dtype"
            )


def check_task_labels(directory: Location, manifest: Manifest, config: Config, remedy: str) -> None:
    """Raise UserError unless an artifact holds the labels of the configuration's tasks.

    It may hold more of them; remedy: the verb that makes the artifact anew.
    """
    made = {
        task["name"]: task["label"] for task in manifest.meta.get("config", {}).get("tasks", ())
    }
    for task in config.tasks:
        if made.get(task.name) != task.label:
            before = f"as '{made[task.name]}'" if task.name in made else "not at all"
            raise UserError(
                f"{directory}: holds the label of task '{task.name}' {before}, the configuration "
                f"has '{task.label}'; run {remedy} again"
            )


def raw_arrow_type(feature: Feature) -> pa.DataType:
    """Return the Arrow type of a feature's raw column."""
    scalar = ARROW_TYPES[feature.dtype]
    return pa.list_(scalar) if feature.is_list else scalar


def one_line(error: Exception) -> str:
    """Return a library's message, which may have several lines, as one."""
    return " ".join(str(error).split())


def hash_coefficients(name: str) -> tuple[int, int, int]:
    """Return a, c in [1, p) and b in [0, p) of a feature's hash, drawn from its name.

    With low = x mod p and high = floor(x / p) mod p, an int64 x is hashed to
    ((a * low + c * high + b) mod p) mod buckets, which stays below 2^63: universal hashing after
    Carter and Wegman, 1979. Only integers a multiple of p^2 (about 2^62) apart always collide.
    """
    digest = hashlib.sha256(name.encode()).digest()
    a, c, b = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8, 16))
    return 1 + a % (HASH_PRIME - 1), 1 + c % (HASH_PRIME - 1), b % HASH_PRIME


def _fit_one(source: duckdb.DuckDBPyRelation, feature: Feature) -> FittedFeature:
    if feature.has_vocabulary:
        values = _vocabulary(source, feature)
        return FittedFeature(feature, FIRST_CODE + len(values), values)
    if feature.kind == "hashed":
        return FittedFeature(feature, FIRST_CODE + feature.buckets)
    numbers = _present(source, feature).project("CAST(v AS DOUBLE) AS v").filter("isfinite(v)")
    if feature.transform == "quantile":
        boundaries = _quantiles(numbers, feature.buckets)
        return FittedFeature(feature, FIRST_CODE + len(boundaries) + 1, boundaries=boundaries)
    mean, deviation = _moments(numbers, feature)
    return FittedFeature(feature, mean=mean, deviation=deviation)


def _read_vocabulary(file: Location) -> list[Any]:
    try:
        values: list[Any] = read_table(file)["value"].to_pylist()
    except FileNotFoundError:
        raise UserError(f"{file}: is missing; run hvdrec prepare") from None
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise UserError(f"{file}: damaged ({one_line(error)}); run hvdrec prepare again") from None
    return values


def _present(source: duckdb.DuckDBPyRelation, feature: Feature) -> duckdb.DuckDBPyRelation:
    """Return a feature's values that are not missing, lists one after the other, as column v."""
    column = f'"{feature.name}"'
    missing = {"string": "''", "int": f"CAST('{MISSING_INT}' AS BIGINT)", "float": "NULL"}
    values = source.project(f"{f'unnest({column})' if feature.is_list else column} AS v")
    return values.filter(f"v IS NOT NULL AND v IS DISTINCT FROM {missing[feature.dtype]}")


def _vocabulary(source: duckdb.DuckDBPyRelation, feature: Feature) -> list[Any]:
    counted = _present(source, feature).aggregate("v, count(*) AS n", "v")
    frequent = counted.filter(f"n >= {feature.min_count}").order("n DESC, v").project("v")
    values: list[Any] = frequent.to_arrow_table()["v"].to_pylist()
    return values


def _quantiles(numbers: duckdb.DuckDBPyRelation, buckets: int) -> NDArray[np.float64]:
    """Return the distinct values at shares 1/buckets, 2/buckets ... of the sorted numbers.

    Share q of n numbers is the one at place ceil(q * n), counted from 1: always one that occurs.
    """
    values: NDArray[np.float64] = numbers.to_arrow_table()["v"].to_numpy()
    # In whole numbers: a share in floats may round to the next place.
    places = [-(-share * len(values) // buckets) - 1 for share in range(1, buckets)]
    places = sorted({max(0, place) for place in places})
    if not places or not len(values):
        return np.empty(0)
    boundaries: NDArray[np.float64] = np.unique(np.partition(values, places)[places])
    return boundaries


def _moments(numbers: duckdb.DuckDBPyRelation, feature: Feature) -> tuple[float, float]:
    """Return mean and population deviation; 0 and 1 of no numbers, 1 for a deviation of 0."""
    value = "sign(v) * ln(1 + abs(v))" if feature.transform == "log" else "v"
    [(mean, deviation)] = numbers.aggregate(
        f"avg({value}) AS m, stddev_pop({value}) AS d"
    ).fetchall()
    mean, deviation = mean or 0.0, deviation or 1.0
    if not (math.isfinite(mean) and math.isfinite(deviation)):
        raise UserError(
            f"feature '{feature.name}': its training values have mean {mean} and deviation "
            f"{deviation}, both must be finite; use transform 'log' or 'quantile'"
        )
    return mean, deviation
