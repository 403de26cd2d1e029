"""A small data set with a pattern to learn, as raw tables with a TOML file beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from hvdrec.config import (
    Config,
    Encode,
    Evaluate,
    Feature,
    History,
    Loader,
    Model,
    Paths,
    Ranker,
    Samples,
    Tower,
    Train,
)

USERS, ITEMS, ROWS = 60, 40, 6000

TOML = """
name = "small"

[paths]
raw = "{raw}"
work = "{work}"

[samples]
interactions = "shown.parquet"
users = "users.csv"
items = "items.parquet"
user = "user_id"
item = "item_id"
time = "shown_at"
title = "title"
label = "clicked"

[samples.derive]
hour = "shown_at // 3600 % 24"

[[samples.history]]
name = "clicks"
length = 8

[encode]
shard_rows = 1000
row_group_rows = 300

[loader]
shuffle_rows = 900

[[features]]
name = "user_id"

[[features]]
name = "clicks"
kind = "sequence"
max_length = 8

[[features]]
name = "age"
kind = "numeric"
dtype = "float"

[[features]]
name = "item_id"
side = "item"

[[features]]
name = "tags"
side = "item"
kind = "categorical_list"
max_length = 3

[[features]]
name = "price"
side = "item"
kind = "numeric"
dtype = "float"
transform = "quantile"
buckets = 4

[[features]]
name = "hour"
side = "scene"
dtype = "int"
default = 12

[[features]]
name = "shop"
side = "scene"
kind = "hashed"
dtype = "int"
buckets = 16

[model]
dimension = 8

[model.tower]
hidden = [16]
output = 8

[model.ranker]
hidden = [16]
dropout = 0.1
cross_layers = 1
direct = ["age", "price"]

[train]
batch_size = 512
epochs = 2
learning_rate = 5e-3
embedding_learning_rate = 0.5
warmup_steps = 5
log_every = 5

[evaluate]
k = [5, 10]
"""


def small_config(raw: str, work: str) -> Config:
    """Return the configuration of `TOML`, written in Python."""
    return Config(
        name="small",
        paths=Paths(raw=raw, work=work),
        samples=Samples(
            interactions="shown.parquet",
            users="users.csv",
            items="items.parquet",
            user="user_id",
            item="item_id",
            time="shown_at",
            title="title",
            label="clicked",
            derive={"hour": "shown_at // 3600 % 24"},
            history=(History(name="clicks", length=8),),
        ),
        encode=Encode(shard_rows=1000, row_group_rows=300),
        loader=Loader(shuffle_rows=900),
        features=(
            Feature("user_id"),
            Feature("clicks", kind="sequence", max_length=8),
            Feature("age", kind="numeric", dtype="float"),
            Feature("item_id", side="item"),
            Feature("tags", side="item", kind="categorical_list", max_length=3),
            Feature(
                "price",
                side="item",
                kind="numeric",
                dtype="float",
                transform="quantile",
                buckets=4,
            ),
            Feature("hour", side="scene", dtype="int", default=12),
            Feature("shop", side="scene", kind="hashed", dtype="int", buckets=16),
        ),
        model=Model(
            dimension=8,
            tower=Tower(hidden=(16,), output=8),
            ranker=Ranker(hidden=(16,), dropout=0.1, cross_layers=1, direct=("age", "price")),
        ),
        train=Train(
            batch_size=512,
            epochs=2,
            learning_rate=5e-3,
            embedding_learning_rate=0.5,
            warmup_steps=5,
            log_every=5,
        ),
        evaluate=Evaluate(k=(5, 10)),
    )


def write_small_data(folder: Path, seed: int = 0, rows: int = ROWS) -> Path:
    """Write raw tables and ``small.toml`` into a folder; return the TOML file."""
    random = np.random.default_rng(seed)
    raw = folder / "raw"
    raw.mkdir(parents=True)
    taste, style = random.normal(size=(USERS, 2)), random.normal(size=(ITEMS, 2))
    user, item = random.integers(0, USERS, rows), random.integers(0, ITEMS, rows)
    hour = random.integers(0, 24, rows)
    day = np.sort(random.integers(0, 90, rows))
    wish = (taste[user] * style[item]).sum(1) * 1.5 + np.sin(hour / 24 * 2 * np.pi)
    clicked = random.random(rows) < 1 / (1 + np.exp(-wish))
    shown = pa.table(
        {
            "user_id": pa.array([f"u{u}" for u in user]),
            "item_id": pa.array(item + 100),
            "shown_at": pa.array(day * 86400 + hour * 3600 + np.arange(rows) % 3600),
            "shop": pa.array(
                np.where(random.random(rows) < 0.1, None, item % 7).tolist(), pa.int64()
            ),
            "clicked": pa.array(clicked.astype(np.int64)),
        }
    )
    pq.write_table(shown, raw / "shown.parquet")
    age = [None if u % 9 == 0 else 20.0 + u for u in range(USERS)]
    users = pa.table({"user_id": [f"u{u}" for u in range(USERS)], "age": age})
    pa.csv.write_csv(users, raw / "users.csv")
    tags = [[f"t{i % 3}", f"t{i % 5}"] if i % 4 else [] for i in range(ITEMS)]
    items = pa.table(
        {
            "item_id": pa.array(range(100, 100 + ITEMS)),
            "title": [f"Item {i} é" for i in range(ITEMS)],
            "tags": tags,
            "price": [float(i) if i % 6 else None for i in range(ITEMS)],
        }
    )
    pq.write_table(items, raw / "items.parquet")
    file = folder / "small.toml"
    file.write_text(TOML.format(raw=raw, work=folder / "work"))
    return file
