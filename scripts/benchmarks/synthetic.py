"""Random raw tables for speed measurements, which need no real data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

USERS, ITEMS = 6040, 3706


def write_tables(folder: Path, ratings: int = 100_000) -> None:
    """Write random tables with MovieLens-1M's columns and numbers of users and films."""
    random = np.random.default_rng(0)
    folder.mkdir()
    users, items = np.arange(1, USERS + 1).astype(str), np.arange(1, ITEMS + 1).astype(str)
    genres = np.array(["Action", "Comedy", "Drama", "Horror", "Musical", "War"])
    tables = {
        "ratings": {
            "user_id": random.choice(users, ratings),
            "item_id": np.concatenate([items, random.choice(items, ratings - ITEMS)]),
            "rating": random.choice([1, 2, 4, 5], ratings),
            "timestamp": np.sort(random.integers(956_703_932, 1_046_454_590, ratings)),
        },
        "users": {
            "user_id": users,
            "gender": random.choice(["F", "M"], USERS),
            "age": random.choice([1, 18, 25, 35, 45, 50, 56], USERS),
            "occupation": random.integers(0, 21, USERS).astype(str),
            "zip_code": random.integers(10_000, 10_400, USERS).astype(str),
        },
        "items": {
            "item_id": items,
            "title": [f"Film {item}" for item in items],
            "genres": [list(random.choice(genres, 2, replace=False)) for _ in items],
            "year": random.integers(1920, 2001, ITEMS),
        },
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
