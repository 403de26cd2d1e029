"""The work that is measured: its data, its shards and hvdrec's configuration of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hvdrec.config import Config, Encode, Loader, Model, Parallel, Paths, Ranker, Tower, Train
from hvdrec.schema import FIRST_CODE, Feature

FEATURES = 8
NUMBERS = 13
WIDTH = 16
BATCH = 4096
BATCHES = 64
EXPONENT = 1.05


def zipf_ids(random: np.random.Generator, rows: int, shape: tuple[int, ...]) -> np.ndarray:
    """Draw ids in 0..rows-1 with Zipf's frequencies, which id is frequent being random, too."""
    weights = np.arange(1, rows + 1, dtype=np.float64) ** -EXPONENT
    ends = np.cumsum(weights) / weights.sum()
    places = np.minimum(np.searchsorted(ends, random.random(shape)), rows - 1)
    return random.permutation(rows)[places]


def write_work_a(folder: Path, rows: int = 1_000_000, distinct_of: int = 0) -> None:
    """Write work (a): arrays for the peers, encoded shards for hvdrec.

    distinct_of: where it is given, ids are drawn as if the tables had so many rows and then spread
    over all of them, so that tables of any size meet the same number of distinct ids.
    """
    random = np.random.default_rng(0)
    shape = (BATCHES, BATCH)
    drawn = distinct_of or rows
    columns = [zipf_ids(random, drawn, shape) * (rows // drawn) for _ in range(FEATURES)]
    ids = np.stack(columns, axis=-1)
    dense = random.normal(size=(*shape, NUMBERS)).astype(np.float32)
    wish = dense[..., 0] + ((ids % 7) / 3 - 1).sum(-1)
    label = (random.random(shape) < 1 / (1 + np.exp(-wish))).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "work_a.npz", ids=ids, dense=dense, label=label, rows=np.int64(rows))
    shards = folder / "features" / "train"
    shards.mkdir(parents=True, exist_ok=True)
    # hvdrec's codes 0 and 1 stand for missing and unknown values.
    flat_ids = (ids.reshape(-1, FEATURES) + FIRST_CODE).astype(np.int32)
    flat_dense = dense.reshape(-1, NUMBERS)
    zeros = np.zeros(len(flat_ids), np.int32)
    table = pa.table(
        {
            **{f"c{i}": flat_ids[:, i] for i in range(FEATURES)},
            **{f"n{i}": flat_dense[:, i] for i in range(NUMBERS)},
            "user_index": zeros,
            "item_index": zeros,
            "label": label.reshape(-1),
            "weight": np.ones(len(flat_ids), np.float32),
        }
    )
    half = len(flat_ids) // 2
    for number in range(2):
        pq.write_table(
            table.slice(number * half, half),
            shards / f"part-{number}.parquet",
            row_group_size=16_384,
        )
    (folder / "features" / "sizes.json").write_text(
        json.dumps({f"c{i}": rows + FIRST_CODE for i in range(FEATURES)})
    )


def config_a(folder: Path, hidden: tuple[int, ...] = (400, 400, 400), batch: int = BATCH) -> Config:
    """Return hvdrec's model of work (a): a DNN over all features, without towers."""
    names = [f"c{i}" for i in range(FEATURES)]
    features = [
        Feature(name, dtype="int", side="user" if i < FEATURES // 2 else "item")
        for i, name in enumerate(names)
    ]
    features += [
        Feature(f"n{i}", kind="numeric", dtype="float", side="scene") for i in range(NUMBERS)
    ]
    return Config(
        name="work-a",
        features=tuple(features),
        paths=Paths(work=str(folder), features=str(folder / "features")),
        encode=Encode(),
        loader=Loader(shuffle_rows=65_536),
        model=Model(
            dimension=WIDTH,
            tower=Tower(output=0),
            ranker=Ranker(hidden=hidden, direct=tuple(names)),
        ),
        train=Train(objective="ranking", batch_size=batch, warmup_steps=0, epochs=10**6),
        parallel=Parallel(),
    )


def with_options(config: Config, *, precision: str, compiled: bool, placement: str) -> Config:
    """Return a configuration with a benchmark's options."""
    train = replace(config.train, precision=precision, compile=compiled)  # type: ignore[arg-type]
    parallel = replace(config.parallel, placement=placement)  # type: ignore[arg-type]
    return replace(config, train=train, parallel=parallel)
