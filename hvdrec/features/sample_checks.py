"""Checks of samples before features are fitted on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hvdrec.config.data_sections import Task
from hvdrec.config.schema import Column, Schema
from hvdrec.errors import UserError, choices, invalid_file
from hvdrec.features.raw import arrow_type
from hvdrec.storage.artifacts import Manifest
from hvdrec.storage.urls import Location

REMEDY = "make the samples again"


def check_columns(folder: Path, schema: Schema, others: Iterable[str] = ()) -> None:
    """Raise UserError unless a directory of Parquet files has all columns in their types."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise invalid_file(folder, "has no Parquet files", REMEDY)
    for file in files:
        check_file(file, schema.columns(), others)


def check_file(file: Path, columns: Iterable[Column], others: Iterable[str] = ()) -> None:
    """Raise UserError unless a Parquet file has raw columns in their types, and other columns.

    Args:
        file: The file.
        columns: Raw columns of features.
        others: Names of further columns, of any type.
    """
    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise invalid_file(
            file, f"is not readable as Parquet ({one_line(error)})", REMEDY
        ) from None
    expected = {column.name: arrow_type(column) for column in columns}
    for name in (*expected, *others):
        if name not in schema.names:
            problem = f"column '{name}' is missing; the file has {choices(schema.names)}"
            raise invalid_file(file, problem, REMEDY)
    for name, wanted in expected.items():
        actual = schema.field(name).type
        plain = pa.list_(actual.value_type) if pa.types.is_list(actual) else actual
        if plain != wanted:
            problem = f"column '{name}' is {actual}, its feature needs {wanted}"
            raise invalid_file(file, problem, f"{REMEDY} or change the feature's dtype")


def check_task_labels(
    directory: Location, manifest: Manifest, tasks: Sequence[Task], remedy: str
) -> None:
    """Raise UserError unless an artifact has the labels of the tasks; it may have more.

    Args:
        directory: The artifact, for the message.
        manifest: Its manifest.
        tasks: ``config.tasks``.
        remedy: Command that writes the artifact.
    """
    stored = {t["name"]: t["label"] for t in manifest.meta.get("config", {}).get("tasks", ())}
    for task in tasks:
        if stored.get(task.name) != task.label:
            known = f"label '{stored[task.name]}'" if task.name in stored else "no label"
            problem = f"has {known} for task '{task.name}', the configuration has '{task.label}'"
            raise invalid_file(directory, problem, f"run {remedy} again")


def one_line(error: Exception) -> str:
    """Return a library's error message, which may have several lines, as one line."""
    return " ".join(str(error).split())


def damaged(file: object, error: Exception, remedy: str = REMEDY) -> UserError:
    """Build the error for a file whose contents cannot be read."""
    return invalid_file(file, f"is damaged ({one_line(error)})", remedy)
