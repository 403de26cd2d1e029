"""Check samples before features are fitted on them."""

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
    """Check that all Parquet files of a directory have the raw columns of a schema.

    Args:
        folder: The directory.
        schema: The features.
        others: Names of other columns that must be there, of any type.

    Raises:
        UserError: There are no files, or `check_file` refuses one.
    """
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise invalid_file(folder, "has no Parquet files", REMEDY)
    for file in files:
        check_file(file, schema.columns(), others)


def check_file(file: Path, columns: Iterable[Column], others: Iterable[str] = ()) -> None:
    """Check that a Parquet file has certain columns.

    Args:
        file: The file.
        columns: Raw columns of features, whose types are checked as well.
        others: Names of other columns that must be there, of any type.

    Raises:
        UserError: The file cannot be read, a column is missing, or a raw column has the wrong type.
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
    """Check that samples or features were made with the labels of all tasks.

    Args:
        directory: Directory of the artifact, for the error message.
        manifest: Manifest of the artifact; it may list more tasks.
        tasks: ``config.tasks``.
        remedy: Command that writes the artifact, for the error message.

    Raises:
        UserError: The label of a task is missing or was another expression.
    """
    stored = {t["name"]: t["label"] for t in manifest.meta.get("config", {}).get("tasks", ())}
    for task in tasks:
        if stored.get(task.name) != task.label:
            known = f"label '{stored[task.name]}'" if task.name in stored else "no label"
            problem = f"has {known} for task '{task.name}', the configuration has '{task.label}'"
            raise invalid_file(directory, problem, f"run {remedy} again")


def one_line(error: Exception) -> str:
    """Return an error message of a library on one line."""
    return " ".join(str(error).split())


def damaged(file: object, error: Exception, remedy: str = REMEDY) -> UserError:
    """Build the error for a file whose contents cannot be read."""
    return invalid_file(file, f"is damaged ({one_line(error)})", remedy)
