"""Fit features: learn vocabularies and statistics from the training split; save and load them."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hvdrec.config.names import file_name
from hvdrec.config.schema import FIRST_CODE, Schema
from hvdrec.config.structure import from_dict, to_dict
from hvdrec.errors import UserError, invalid_file, invalid_value
from hvdrec.features.kinds.kind import FittedFeature, TrainingSplit, kind_of
from hvdrec.features.raw import ARROW_TYPES
from hvdrec.features.sample_checks import check_columns, damaged
from hvdrec.storage.checksums import sealed, unsealed
from hvdrec.storage.parquet import read_table, write_checksums
from hvdrec.storage.urls import Location

FITTED_FILE = "fitted.json"
_NO_STATISTICS = {"mean": 0.0, "deviation": 1.0, "boundaries": None}
"""Statistics of a feature that has none; the file lists these for every feature."""
LARGEST_CARRIED = 2**24
"""A float32 holds integers below this number exactly. Codes that are stored in a bundle's float32
embeddings, for features that combine user or item with scene, must be below it."""


@dataclass(frozen=True)
class Fitted:
    """The schema, and what fitting learned about each feature.

    Features that share a vocabulary refer to the same object.
    """

    schema: Schema
    features: Mapping[str, FittedFeature]

    @property
    def sizes(self) -> dict[str, int]:
        """Name of the feature that owns an embedding table -> number of its codes."""
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
            facts[name] = {"size": fitted.size, **_NO_STATISTICS, **fitted.statistics}
            if fitted.values is not None and self.schema.vocabulary_of(fitted.feature) == name:
                values = pa.array(fitted.values, ARROW_TYPES[fitted.feature.dtype])
                codes = pa.array(range(FIRST_CODE, FIRST_CODE + len(values)), pa.int64())
                table = pa.table({"code": codes, "value": values})
                pq.write_table(table, _vocabulary_file(directory, name))
        text = sealed({"schema": to_dict(self.schema), "fitted": facts})
        (directory / FITTED_FILE).write_text(text)
        write_checksums(directory / "vocabulary")

    @staticmethod
    def load(directory: Location) -> Fitted:
        """Load the files that `save` wrote.

        Raises:
            UserError: A file is missing or damaged.
        """
        file = directory / FITTED_FILE
        try:
            raw = unsealed(file.read_bytes())
            schema = from_dict(Schema, raw["schema"])
            features = {}
            for feature in schema.features:
                statistics = dict(raw["fitted"][feature.name])
                size, owner = statistics.pop("size"), schema.vocabulary_of(feature)
                values = None
                if feature.has_vocabulary:
                    values = _read_vocabulary(_vocabulary_file(directory, owner))
                features[feature.name] = FittedFeature(feature, size, values, statistics)
        except FileNotFoundError:
            raise invalid_file(file, "is missing", "run hvdrec prepare") from None
        except UserError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(file, error, "run hvdrec prepare with --overwrite") from None
        return Fitted(schema, features)


def fit(samples: Path, schema: Schema) -> Fitted:
    """Learn vocabularies and statistics from the training split.

    If the rows are the same, the result is the same, bit for bit.

    Args:
        samples: Directory that `hvdrec samples` wrote.
        schema: The features.

    Raises:
        UserError: There are no files, a column is missing or has a wrong type, or its values
            cannot be used.
    """
    import duckdb  # slow to import, so not at the top, where every rank would import it

    check_columns(samples / "train", schema)
    # Escape the path, since it may contain wildcards.
    pattern = glob.escape(str(samples / "train")) + "/*.parquet"
    learned: dict[str, FittedFeature] = {}
    with duckdb.connect() as connection:
        connection.execute("SET enable_progress_bar = false")
        split = TrainingSplit(connection, pattern)
        for feature in schema.features:
            if schema.vocabulary_of(feature) == feature.name:
                learned[feature.name] = kind_of(feature).fit(feature, split)
    features = {
        feature.name: replace(learned[schema.vocabulary_of(feature)], feature=feature)
        for feature in schema.features
    }
    for feature in (*schema.carried("user"), *schema.carried("item")):
        if features[feature.name].size > LARGEST_CARRIED:
            problem = (
                f"has {features[feature.name].size} codes; a scene feature can combine at most "
                f"{LARGEST_CARRIED} codes of a user or item feature"
            )
            raise invalid_value("features.name", feature.name, problem, "raise its min_count")
    return Fitted(schema, features)


def _vocabulary_file(directory: Location, name: str) -> Any:
    """Return the path of the vocabulary of the feature `name`."""
    return directory / "vocabulary" / f"{file_name(name)}.parquet"


def _read_vocabulary(file: Location) -> list[Any]:
    try:
        values: list[Any] = read_table(file)["value"].to_pylist()
    except FileNotFoundError:
        raise invalid_file(file, "is missing", "run hvdrec prepare") from None
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise damaged(file, error, "run hvdrec prepare with --overwrite") from None
    return values
