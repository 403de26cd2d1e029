"""Generate logs of a small shop: which items users were shown, and which they clicked."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

USERS, ITEMS, ROWS = 100, 50, 20_000


def write_shop_logs(directory: Path) -> None:
    """Write ``shown.parquet``, ``users.parquet`` and ``items.parquet``."""
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    user, item = random.integers(0, USERS, ROWS), random.integers(0, ITEMS, ROWS)
    list_price = random.uniform(10, 100, ITEMS).round(2)
    price = (list_price * random.uniform(0.4, 1, ITEMS)).round(2)
    hour = random.integers(0, 24, ROWS)
    # A user likes one kind of item, and likes discounts in the evening.
    interest = 2.0 * (user % 5 == item % 5) + 3 * (1 - price / list_price)[item] * (hour > 17)
    clicked = random.random(ROWS) < 1 / (1 + np.exp(2 - interest))
    shown = {
        "user_id": [f"u{u}" for u in user],
        "item_id": [f"i{i}" for i in item],
        "time": np.arange(ROWS),
        "hour": hour,
        "clicked": clicked.astype(np.int64),
    }
    users = {"user_id": [f"u{u}" for u in range(USERS)], "age": np.arange(USERS) % 60 + 18}
    items = {
        "item_id": [f"i{i}" for i in range(ITEMS)],
        "title": [f"Item {i}" for i in range(ITEMS)],
        "price": price,
        "list_price": list_price,
    }
    for name, columns in (("shown", shown), ("users", users), ("items", items)):
        pq.write_table(pa.table(columns), directory / f"{name}.parquet")
