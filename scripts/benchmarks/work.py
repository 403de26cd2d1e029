"""The measured work: its data, its shards, and hvdrec's configuration for it.

As a program it writes the data: random data for work (a), encoded MovieLens-1M for work (b).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvdrec.config import Config, load_config
from hvdrec.config.data_sections import Encode, Loader, Paths
from hvdrec.config.schema import FIRST_CODE, Feature
from hvdrec.config.sections import Model, Parallel, Ranker, Tower, Train
from hvdrec.features.fit import Fitted
from hvdrec.features.shards import parquet_writer, shard_types

FEATURES = 8
NUMBERS = 13
WIDTH = 16
BATCH = 4096
BATCHES = 64
GROUP_ROWS = 16_384
EXPONENT = 1.05

CONFIG_B = Path(__file__).parents[2] / "configs" / "movielens-1m-ranking.toml"
BATCH_B = 8192
WIDTH_B = 32
HIDDEN_B = (256, 128)
DROPOUT_B = 0.1

Ids = NDArray[np.int64]


def zipf_ids(random: np.random.Generator, rows: int, shape: tuple[int, ...]) -> Ids:
    """Draw ids in 0..rows-1 with Zipf frequencies; which ids are frequent is random, too."""
    weights = np.arange(1, rows + 1, dtype=np.float64) ** -EXPONENT
    ends = np.cumsum(weights) / weights.sum()
    places = np.minimum(np.searchsorted(ends, random.random(shape)), rows - 1)
    ids: Ids = random.permutation(rows)[places]
    return ids


def write_work_a(folder: Path, rows: int = 1_000_000, distinct_of: int = 0) -> None:
    """Write work (a): arrays for the peers, encoded shards for hvdrec.

    distinct_of: if given, ids are drawn as if the tables had this many rows, then spread over all
    rows at random. So tables of any size see the same number of distinct ids.
    """
    random = np.random.default_rng(0)
    shape = (BATCHES, BATCH)
    columns = [zipf_ids(random, distinct_of or rows, shape) for _ in range(FEATURES)]
    if distinct_of:
        columns = [random.choice(rows, distinct_of, replace=False)[ids] for ids in columns]
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
    zeros = np.zeros(len(flat_ids), np.int64)
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
        with parquet_writer(
            shards / f"part-{number}.parquet", shard_types(config_a(folder).schema)
        ) as write:
            for start in range(number * half, (number + 1) * half, GROUP_ROWS):
                write(table.slice(start, GROUP_ROWS))
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


def config_b(folder: Path) -> Config:
    """Return hvdrec's model of work (b): a DNN over MovieLens-1M's features without histories."""
    features = tuple(f for f in load_config(CONFIG_B).features if f.kind != "sequence")
    return Config(
        name="work-b",
        features=features,
        paths=Paths(work=str(folder), features=str(folder / "features")),
        model=Model(
            dimension=WIDTH_B,
            tower=Tower(output=0),
            ranker=Ranker(
                hidden=HIDDEN_B,
                dropout=DROPOUT_B,
                direct=tuple(f.name for f in features if f.side != "scene"),
            ),
        ),
        train=Train(objective="ranking", batch_size=BATCH_B, warmup_steps=0, epochs=10**6),
    )


def table_sizes(folder: Path) -> dict[str, int]:
    """Return the number of codes of each table in a folder's shards."""
    told = folder / "features" / "sizes.json"
    if told.is_file():
        sizes: dict[str, int] = json.loads(told.read_text())
        return sizes
    return Fitted.load(folder / "features").sizes


def write_work_b(folder: Path) -> None:
    """Write the encoded training rows of ``folder/features`` in the format of the peers."""
    names = [feature.name for feature in config_b(folder).features]
    shards = sorted((folder / "features" / "train").glob("*.parquet"))
    tables = [pq.read_table(shard, columns=[*names, "label"]) for shard in shards]
    pq.write_table(pa.concat_tables(tables), folder / "work_b.parquet")
    sizes = table_sizes(folder)
    text = json.dumps({"sizes": {name: sizes[name] for name in names}})
    (folder / "work_b.json").write_text(text)


def with_options(
    config: Config, *, precision: str, placement: str, kernel: str, batch: int
) -> Config:
    """Return a configuration with a benchmark's options."""
    options: dict[str, Any] = {"precision": precision, "batch_size": batch}
    parallel: dict[str, Any] = {"placement": placement, "kernel": kernel}
    return replace(
        config,
        train=replace(config.train, **options),
        parallel=replace(config.parallel, **parallel),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=["a", "b"])
    parser.add_argument("folder", type=Path, help="directory to write; for b it contains features/")
    parser.add_argument("--rows", type=int, default=1_000_000, help="work a: rows of each table")
    parser.add_argument("--distinct-of", type=int, default=0, help="work a: ids in use; 0: all")
    options = parser.parse_args()
    if options.work == "a":
        write_work_a(options.folder, options.rows, options.distinct_of)
    else:
        write_work_b(options.folder)


if __name__ == "__main__":
    main()
