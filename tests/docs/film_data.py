"""A small film data set with the tables and columns of MovieLens-1M."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

USERS, FILMS, RATINGS = 80, 120, 6000
GENRES = ("Action", "Comedy", "Drama", "Thriller")
KNOWN_FILMS = ("661", "1193", "260")
"""Films that the documentation names."""


def write_film_data(directory: Path) -> None:
    """Write ``ratings``, ``users`` and ``items``, and ``rows`` to score, as Parquet files."""
    directory.mkdir(parents=True)
    random = np.random.default_rng(0)
    film_ids = [*KNOWN_FILMS, *(str(5000 + i) for i in range(FILMS - len(KNOWN_FILMS)))]
    user, film = random.integers(0, USERS, RATINGS), random.integers(0, FILMS, RATINGS)
    # Women like the films with even numbers, men the others, so a few steps beat the baselines.
    liking = np.where(user % 2 == film % 2, 1.5, -1.5) + random.normal(size=RATINGS) / 2
    ratings = pa.table(
        {
            "user_id": [str(u + 1) for u in user],
            "item_id": [film_ids[i] for i in film],
            "rating": pa.array(np.clip(np.round(3 + liking), 1, 5).astype(np.int64)),
            "timestamp": pa.array(np.sort(random.integers(956e6, 1046e6, RATINGS))),
        }
    )
    users = pa.table(
        {
            "user_id": [str(u + 1) for u in range(USERS)],
            "gender": ["FM"[u % 2] for u in range(USERS)],
            "age": [(18, 25, 35, 45)[u % 4] for u in range(USERS)],
            "occupation": [str(u % 20) for u in range(USERS)],
            "zip_code": [f"{55000 + u % 5}" for u in range(USERS)],
        }
    )
    items = pa.table(
        {
            "item_id": film_ids,
            "title": [f"Film {i} ({1950 + i % 50})" for i in range(FILMS)],
            "year": [1950 + i % 50 for i in range(FILMS)],
            "genres": [[GENRES[i % 4], GENRES[i % 3]] for i in range(FILMS)],
        }
    )
    rows = pa.table(
        {
            "user_id": ["1", "2", "1"],
            "item_id": list(KNOWN_FILMS),
            "hour": [9, 21, 21],
            "weekday": [0, 4, 6],
        }
    )
    for name, table in (("ratings", ratings), ("users", users), ("items", items), ("rows", rows)):
        pq.write_table(table, directory / f"{name}.parquet")
