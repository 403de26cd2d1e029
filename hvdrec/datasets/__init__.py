"""Real public data sets as plain Parquet tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hvdrec.datasets import complete_journey, movielens
from hvdrec.datasets.download import Source, cache_directory, fetch_first
from hvdrec.datasets.registry import Dataset
from hvdrec.errors import UserError, choices
from hvdrec.storage.artifacts import write_artifact

DATASETS: dict[str, Dataset] = {
    dataset.name: dataset for dataset in (movielens.DATASET, complete_journey.DATASET)
}
NAMES = tuple(DATASETS)


def describe() -> list[dict[str, Any]]:
    """Return name, description, owner, licence, citation and rows per table of every data set."""
    return [{"name": d.name, "description": d.description, **_facts(d)} for d in DATASETS.values()]


def prepare(
    name: str,
    out: Path,
    *,
    overwrite: bool = False,
    cache: Path | None = None,
    notify: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Download a data set and write its tables; return whose it is, its source and its rows.

    The licence is told through `notify` before anything is downloaded. Downloads are kept in
    `cache` (default ``$HVDREC_CACHE/downloads``) once their checksum is right. Raises UserError
    for an unknown name, a place that is taken, or a download that fails or is altered.
    """
    if name not in DATASETS:
        raise UserError(f"data set '{name}' is not known; there are {choices(NAMES)}")
    dataset = DATASETS[name]
    meta: dict[str, Any] = {"name": name, **_facts(dataset)}
    with write_artifact(out, "raw", meta, overwrite=overwrite) as draft:
        notify(f"{name}, by {dataset.owner}: {dataset.licence}; cite {dataset.citation}")
        source, file = fetch_first(dataset.sources, cache or cache_directory(), notify)
        meta |= {"source": source.name, "sha256": source.sha256, "note": source.note}
        notify("writing tables")
        meta["rows"] = source.read(file, draft)
    for table, rows in meta["rows"].items():
        notify(f"{table}: {rows} rows")
    return meta


def _facts(dataset: Dataset) -> dict[str, Any]:
    return {
        "owner": dataset.owner,
        "licence": dataset.licence,
        "citation": dataset.citation,
        "rows": dict(dataset.rows),
    }


__all__ = ["DATASETS", "NAMES", "Dataset", "Source", "describe", "prepare"]
