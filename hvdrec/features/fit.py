"""Fit features: learn vocabularies and statistics from the training split; save and load them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvdrec.config.names import file_name
from hvdrec.config.schema import FIRST_CODE, Schema
from hvdrec.config.structure import from_dict, to_dict
from hvdrec.errors import UserError, invalid_file, invalid_value
from hvdrec.features.duckdb_split import open_duckdb_split
from hvdrec.features.kinds.kind import FittedFeature, kind_of
from hvdrec.features.kinds.training_split import TrainingSplit
from hvdrec.features.raw import ARROW_TYPES
from hvdrec.features.sample_checks import check_columns, damaged
from hvdrec.features.vocabulary import COUNT, DAY, VALUE, Vocabulary
from hvdrec.storage.checksums import sealed, unsealed
from hvdrec.storage.parquet import read_checksums, read_table, write_checksums
from hvdrec.storage.urls import Location

FITTED_FILE = "fitted.json"
VOCABULARY, WAITING = "vocabulary", "waiting"
_NO_STATISTICS = {"mean": 0.0, "deviation": 1.0, "boundaries": None}
"""Statistics of a feature that has none; the file lists these for every feature."""
LARGEST_CARRIED = 2**24
"""A float32 holds integers below this number exactly. If a scene feature combines the codes of
users or items, a bundle stores these codes beside the embeddings as float32, so they must be
smaller."""


@dataclass(frozen=True)
class Fitted:
    """The schema, and what fitting learned about each feature.

    Features that share a vocabulary refer to the same object.

    Attributes:
        schema: The features.
        features: Name of a feature -> what was learned.
        generation: Number of times that features went on from earlier ones; see
            `features.vocabulary`.
        newest_day: Day of the newest row so far, in days since 1970; None without times.
    """

    schema: Schema
    features: Mapping[str, FittedFeature]
    generation: int = 0
    newest_day: float | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Name of the feature that owns an embedding table -> number of its codes."""
        return {
            name: fitted.size
            for name, fitted in self.features.items()
            if fitted.size and self.schema.vocabulary_of(fitted.feature) == name
        }

    def changed_in(self, table: str) -> NDArray[np.int32]:
        """Return the generation in which each row of an embedding table got a new meaning [rows].

        A run that was trained before this generation has learned nothing about the new meaning, so
        training must not go on from its values in this row.
        """
        fitted = self.features[table]
        generations = np.full(fitted.size, fitted.since, np.int32)
        if fitted.vocabulary is not None:
            own = generations[FIRST_CODE:]
            np.maximum(own, fitted.vocabulary.since, out=own)
        return generations

    def save(self, directory: Path) -> None:
        """Write ``fitted.json``, ``vocabulary/`` and ``waiting/`` into a directory.

        ``vocabulary/NAME.parquet`` has the values of a feature that have codes, and
        ``waiting/NAME.parquet`` the values that are still too rare for a code.
        """
        for folder in (VOCABULARY, WAITING):
            (directory / folder).mkdir(parents=True, exist_ok=True)
        facts = {}
        for name, fitted in self.features.items():
            facts[name] = {"size": fitted.size, **_NO_STATISTICS, **fitted.statistics}
            if fitted.since:
                facts[name]["since"] = fitted.since
            if fitted.values is not None and self.schema.vocabulary_of(fitted.feature) == name:
                _save_vocabulary(directory, fitted)
        state = {"generation": self.generation, "newest_day": self.newest_day}
        text = sealed({"schema": to_dict(self.schema), "fitted": facts, **state})
        (directory / FITTED_FILE).write_text(text)
        for folder in (VOCABULARY, WAITING):
            write_checksums(directory / folder)

    @staticmethod
    def load(directory: Location, *, to_grow: bool = False) -> Fitted:
        """Load the files that `save` wrote; with `to_grow`, also the values without codes.

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
                since = statistics.pop("since", 0)
                values = vocabulary = None
                if feature.has_vocabulary:
                    vocabulary = _read_vocabulary(directory, owner, to_grow=to_grow)
                    values = vocabulary.values
                features[feature.name] = FittedFeature(
                    feature, size, values, statistics, vocabulary, since
                )
        except FileNotFoundError:
            raise invalid_file(file, "is missing", "run hvdrec prepare") from None
        except UserError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(file, error, "run hvdrec prepare with --overwrite") from None
        return Fitted(schema, features, raw.get("generation", 0), raw.get("newest_day"))


OpenSplit = Callable[[Path, Schema], AbstractContextManager[TrainingSplit]]
"""Function of the directory of samples and the schema that opens the training split."""


def fit(samples: Path, schema: Schema, open_split: OpenSplit = open_duckdb_split) -> Fitted:
    """Learn vocabularies and statistics from the training split.

    If the rows are the same, the result is the same, bit for bit.

    Args:
        samples: Directory that `hvdrec samples` wrote.
        schema: The features.
        open_split: Opens the training split.

    Raises:
        UserError: There are no files, a column is missing or has a wrong type, or its values
            cannot be used.
    """
    check_columns(samples / "train", schema)
    learned: dict[str, FittedFeature] = {}
    with open_split(samples, schema) as split:
        for feature in schema.features:
            if schema.vocabulary_of(feature) == feature.name:
                learned[feature.name] = kind_of(feature).fit(feature, split)
        newest_day = split.newest_day
    return checked(Fitted(schema, shared(schema, learned), newest_day=newest_day))


def shared(schema: Schema, learned: Mapping[str, FittedFeature]) -> dict[str, FittedFeature]:
    """Return all features; each gets the result of the owner of its vocabulary and table."""
    return {
        feature.name: replace(learned[schema.vocabulary_of(feature)], feature=feature)
        for feature in schema.features
    }


def checked(fitted: Fitted) -> Fitted:
    """Check the numbers of codes; return the fitted features unchanged.

    Raises:
        UserError: A scene feature combines the codes of a user or item feature that has more codes
            than a bundle can store (see `LARGEST_CARRIED`).
    """
    features, schema = fitted.features, fitted.schema
    for feature in (*schema.carried("user"), *schema.carried("item")):
        if features[feature.name].size > LARGEST_CARRIED:
            problem = (
                f"has {features[feature.name].size} codes; a scene feature can combine at most "
                f"{LARGEST_CARRIED} codes of a user or item feature"
            )
            raise invalid_value("features.name", feature.name, problem, "raise its min_count")
    return fitted


def _save_vocabulary(directory: Path, fitted: FittedFeature) -> None:
    assert fitted.values is not None
    name, dtype = file_name(fitted.feature.name), ARROW_TYPES[fitted.feature.dtype]
    codes = pa.array(range(FIRST_CODE, FIRST_CODE + len(fitted.values)), pa.int64())
    columns = {"code": codes, VALUE: pa.array(fitted.values, dtype)}
    vocabulary = fitted.vocabulary
    if vocabulary is not None:
        day = pa.array(vocabulary.day, pa.float64(), from_pandas=True)
        columns |= {"since": pa.array(vocabulary.since, pa.int32()), DAY: day}
    pq.write_table(pa.table(columns), directory / VOCABULARY / f"{name}.parquet")
    if vocabulary is not None and vocabulary.waiting is not None and len(vocabulary.waiting):
        pq.write_table(vocabulary.waiting, directory / WAITING / f"{name}.parquet")


def _read_vocabulary(directory: Location, owner: str, *, to_grow: bool) -> Vocabulary:
    """Read a vocabulary; files of earlier versions of hvdrec hold only the values."""
    name = f"{file_name(owner)}.parquet"
    file = directory / VOCABULARY / name
    try:
        table = read_table(file)
        values = table[VALUE].to_pylist()
        since, day = np.zeros(len(values), np.int32), np.full(len(values), np.nan)
        if "since" in table.column_names:
            since = table["since"].to_numpy()
            day = table[DAY].to_numpy(zero_copy_only=False)
        waiting = None
        if to_grow and name in (read_checksums(directory / WAITING) or {}):
            file = directory / WAITING / name
            waiting = read_table(file).select([VALUE, COUNT, DAY])
    except FileNotFoundError:
        raise invalid_file(file, "is missing", "run hvdrec prepare") from None
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise damaged(file, error, "run hvdrec prepare with --overwrite") from None
    return Vocabulary(values, since, day, waiting)
