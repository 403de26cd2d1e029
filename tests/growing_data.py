"""A log that grows by days: every day new items appear and old ones vanish."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DAY = 86_400
START = 1_700_000_000 // DAY * DAY

TOML = """
name = "growing"

[paths]
raw = "{raw}"
work = "{work}"

[samples]
interactions = "day.parquet"
user = "user_id"
item = "item_id"
time = "shown_at"
label = "clicked"

[grow]
evict_days = 2.5

[encode]
shard_rows = 400
row_group_rows = 100

[[features]]
name = "user_id"

[[features]]
name = "item_id"
side = "item"
min_count = 3

[[features]]
name = "price"
side = "scene"
kind = "numeric"
dtype = "float"

[model]
dimension = 4
tower.hidden = [6]
tower.output = 4
ranker.hidden = [5]
ranker.cross_layers = 1
ranker.direct = ["user_id"]

[train]
batch_size = 128
epochs = 1
embedding_optimizer = "adam"
embedding_learning_rate = 0.05
learning_rate = 0.01
checkpoint_every = 1
keep = 20
log_every = 1
cpu_layers = "fused"

[parallel]
placement = "sharded"
kernel = "torch"
"""


def write_day(
    folder: Path, day: int, items: Sequence[int], rows: int = 600, *, shuffled: bool = False
) -> Path:
    """Write the log of a day, in which given items are shown; return its TOML file.

    Users like items of their own parity. `shuffled` breaks this: labels are drawn at random.
    """
    random = np.random.default_rng(day)
    raw = folder / f"day{day}" / "raw"
    raw.mkdir(parents=True)
    user, item = random.integers(0, 20, rows), random.choice(items, rows)
    liked = (user % 2 == item % 2) ^ (random.random(rows) < 0.1)
    if shuffled:
        random.shuffle(liked)
    times = START + day * DAY + np.sort(random.integers(0, DAY, rows))
    table = pa.table(
        {
            "user_id": [f"u{u}" for u in user],
            "item_id": [f"i{i}" for i in item],
            "shown_at": times,
            "price": random.random(rows),
            "clicked": liked.astype(np.int64),
        }
    )
    pq.write_table(table, raw / "day.parquet")
    config = folder / f"day{day}" / "run.toml"
    config.write_text(TOML.format(raw=raw, work=folder / f"day{day}" / "work"))
    return config
