"""Fitting features: vocabularies and statistics of the training split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvdrec.config import from_dict, to_dict
from hvdrec.errors import UserError, choices
from hvdrec.schema import FIRST_CODE, Feature, Schema

HASH_PRIME = 2**31 - 1
FITTED_FILE = "fitted.json"

ARROW_TYPES = {"string": pa.string(), "int": pa.int64(), "float": pa.float64()}


@dataclass(frozen=True)
class FittedFeature:
    """What was learned of one feature.

    size: number of codes (0 for a plain number). values: the vocabulary in the order of its codes,
    which begin at FIRST_CODE. mean, deviation: of the (log-)values, population deviation.
    boundaries: float64, the quantile buckets' lower ends but the first's.
    """

    feature: Feature
    size: int = 0
    values: list[Any] | None = None
    mean: float = 0.0
    deviation: float = 1.0
    boundaries: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Fitted:
    """All features with what was learned of them; features that share a vocabulary hold the same."""

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
    def load(directory: Path) -> Fitted:
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
                    table = pq.read_table(directory / "vocabulary" / f"{owner}.parquet")
                    values = table["value"].to_pylist()
                boundaries = fact["boundaries"]
                features[feature.name] = FittedFeature(
                    feature,
                    fact["size"],
                    values,
                    fact["mean"],
                    fact["deviation"],
                    None if boundaries is None else np.array(boundaries, np.float64),
                )
        except FileNotFoundError as error:
            raise UserError(f"{error.filename}: is missing; run hvdrec prepare") from None
        except (KeyError, TypeError, json.JSONDecodeError, pa.ArrowInvalid) as error:
            raise UserError(f"{file}: damaged ({error}); run hvdrec prepare again") from None
        return Fitted(schema, features)


def fit(samples: Path, schema: Schema) -> Fitted:
    """Learn vocabularies and statistics from the training split of samples.

    Vocabularies are sorted by falling count, then by value, so that the same data gives the same
    codes. Raises UserError for a missing column or a wrong type.
    """
    check_columns(samples / "train", schema)
    pattern = str(samples / "train" / "*.parquet")
    learned: dict[str, FittedFeature] = {}
    with duckdb.connect() as connection:
        connection.execute("SET enable_progress_bar = false")
        source = connection.read_parquet(pattern)
        for feature in schema.features:
            if schema.vocabulary_of(feature) == feature.name:
                learned[feature.name] = _fit_one(source, feature)
    features = {}
    for feature in schema.features:
        owner = learned[schema.vocabulary_of(feature)]
        features[feature.name] = FittedFeature(
            feature, owner.size, owner.values, owner.mean, owner.deviation, owner.boundaries
        )
    return Fitted(schema, features)


def check_columns(folder: Path, schema: Schema) -> None:
    """Raise UserError if a Parquet file of a folder lacks a feature or has it in another type."""
    for file in sorted(folder.glob("*.parquet")):
        try:
            found = pq.read_schema(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"{file}: no readable Parquet ({error}); make the samples again"
            ) from None
        for feature in schema.features:
            check_type(file, found, feature)


def check_type(file: Path, found: pa.Schema, feature: Feature) -> None:
    """Raise UserError if a feature's column is missing or not of its declared type."""
    if feature.name not in found.names:
        raise UserError(
            f"{file}: column '{feature.name}' is missing; the file has {choices(found.names)}; "
            "make the samples again"
        )
    expected = raw_arrow_type(feature)
    actual = found.field(feature.name).type
    plain = pa.list_(actual.value_type) if pa.types.is_list(actual) else actual
    if plain != expected:
        raise UserError(
            f"{file}: column '{feature.name}' is {actual}, its feature needs {expected}; "
            "make the samples again or change its dtype"
        )


def raw_arrow_type(feature: Feature) -> pa.DataType:
    """Return the Arrow type of a feature's raw column."""
    scalar = ARROW_TYPES[feature.dtype]
    return pa.list_(scalar) if feature.is_list else scalar


def hash_coefficients(name: str) -> tuple[int, int, int]:
    """Return a, c in [1, p) and b in [0, p) of a feature's hash, drawn from its name.

    An int64 x = high * p + low is hashed to ((a * low + c * high + b) mod p) mod buckets, which
    stays below 2^63: universal hashing after Carter and Wegman, 1979.
    """
    digest = hashlib.sha256(name.encode()).digest()
    a, c, b = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8, 16))
    return 1 + a % (HASH_PRIME - 1), 1 + c % (HASH_PRIME - 1), b % HASH_PRIME


def _fit_one(source: duckdb.DuckDBPyRelation, feature: Feature) -> FittedFeature:
    column = f'"{feature.name}"'
    if feature.has_vocabulary:
        value = f"unnest({column})" if feature.is_list else column
        present = "v IS NOT NULL" + (" AND v <> ''" if feature.dtype == "string" else "")
        rows = source.project(f"{value} AS v").filter(present)
        counted = rows.aggregate("v, count(*) AS n", "v").filter(f"n >= {feature.min_count}")
        table = counted.order("n DESC, v").to_arrow_table()
        values = table["v"].to_pylist()
        return FittedFeature(feature, FIRST_CODE + len(values), values)
    if feature.kind == "hashed":
        return FittedFeature(feature, FIRST_CODE + feature.buckets)
    numbers = source.project(f"CAST({column} AS DOUBLE) AS v").filter(
        "v IS NOT NULL AND isfinite(v)"
    )
    if feature.transform == "quantile":
        shares = [bucket / feature.buckets for bucket in range(1, feature.buckets)]
        found = numbers.aggregate(f"quantile_disc(v, {shares}) AS q").fetchall() if shares else []
        distinct = sorted(set(found[0][0] or [])) if found else []
        return FittedFeature(
            feature,
            FIRST_CODE + len(distinct) + 1,
            boundaries=np.array(distinct, dtype=np.float64),
        )
    value = "sign(v) * ln(1 + abs(v))" if feature.transform == "log" else "v"
    [(mean, deviation)] = numbers.aggregate(
        f"avg({value}) AS m, stddev_pop({value}) AS d"
    ).fetchall()
    return FittedFeature(feature, mean=mean or 0.0, deviation=deviation or 1.0)
