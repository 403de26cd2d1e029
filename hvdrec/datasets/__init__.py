"""Public data sets as Parquet tables. To add one, write a module with a `Dataset`; list it here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hvdrec.datasets import complete_journey, movielens
from hvdrec.datasets.download import cache_directory, fetch_first
from hvdrec.datasets.registry import Dataset, DatasetSource
from hvdrec.errors import unknown_name
from hvdrec.parallel.progress import print_line
from hvdrec.storage.artifacts import write_artifact

DATASETS: dict[str, Dataset] = {
    dataset.name: dataset for dataset in (movielens.DATASET, complete_journey.DATASET)
}
NAMES = tuple(DATASETS)


def describe() -> list[dict[str, Any]]:
    """Return name, description, owner, licence, citation and number of rows of each data set."""
    return [{"name": d.name, "description": d.description, **d.facts} for d in DATASETS.values()]


def download_dataset(
    name: str,
    out: Path,
    *,
    overwrite: bool = False,
    cache: Path | None = None,
    notify: Callable[[str], None] = print_line,
) -> dict[str, Any]:
    """Download a data set and write its tables to the directory `out`.

    `notify` is called with the licence and then with lines about the progress. Verified downloads
    are kept in `cache`, by default ``$HVDREC_CACHE/downloads``.

    Returns:
        Owner, licence, citation, source and checksum of the data, and the rows of each table.

    Raises:
        UserError: The name is unknown, `out` exists, the download fails, or its checksum is wrong.
    """
    if name not in DATASETS:
        raise unknown_name("data set", name, NAMES)
    dataset = DATASETS[name]
    meta: dict[str, Any] = {"name": name, **dataset.facts}
    with write_artifact(out, "raw", meta, overwrite=overwrite) as draft:
        notify(f"{name}, by {dataset.owner}: {dataset.licence}; cite {dataset.citation}")
        source, file = fetch_first(dataset.sources, cache or cache_directory(), notify)
        meta |= {"source": source.name, "sha256": source.sha256, "note": source.note}
        notify("writing tables")
        meta["rows"] = source.read(file, draft)
    for table, rows in meta["rows"].items():
        notify(f"{table}: {rows} rows")
    return meta


__all__ = ["DATASETS", "NAMES", "Dataset", "DatasetSource", "describe", "download_dataset"]
