"""Train FuxiCTR's DNN or LightGBM on shards that hvdrec encoded and print one line of metrics.

They get every feature except histories, stop early on the validation split, and see the test split
once. FuxiCTR: embeddings of width 16, an MLP of 400-400-400, an L2 penalty of 1e-3 on embeddings,
dropout 0.2. LightGBM: codes as categories, 127 leaves; of a list, which it cannot take, the first
entry.
"""

import argparse
import json
import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

Array = np.ndarray[Any, Any]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Data:
    """splits: split -> name -> codes; sizes: name -> codes; lists: name -> longest list."""

    splits: dict[str, dict[str, Array]]
    sizes: dict[str, int]
    lists: dict[str, int]


def read(folder: Path, split: str, lists: dict[str, int], names: list[str]) -> dict[str, Array]:
    """Return codes by name, [n] or for lists [n, longest] padded with 0, and the label."""
    table = pq.read_table(folder / split, columns=[*names, "label"])
    found = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if name in lists:
            lengths = np.diff(column.offsets.to_numpy())
            found[name] = np.zeros((len(lengths), lists[name]), np.int32)
            kept = np.minimum(lengths, lists[name])
            place = np.arange(lists[name]) < kept[:, None]
            starts = column.offsets.to_numpy()[:-1, None] + np.arange(lists[name])
            found[name][place] = column.values.to_numpy()[starts[place]]
        else:
            found[name] = column.to_numpy(zero_copy_only=False).copy()
    return found


def fuxictr(data: Data, seed: int, rounds: int) -> tuple[float, float]:
    """Return the AUC on validation and test."""
    import torch
    from fuxictr.pytorch.dataloaders import RankDataLoader
    from fuxictr_peer import DNN, feature_map

    torch.manual_seed(seed)
    np.random.seed(seed)
    features: dict[str, dict[str, Any]] = {
        name: {"type": "categorical", "vocab_size": size} for name, size in data.sizes.items()
    }
    for name, longest in data.lists.items():
        features[name] |= {
            "type": "sequence",
            "max_len": longest,
            "padding_idx": 0,
            "feature_encoder": "layers.MaskedAveragePooling()",
        }
    made = feature_map(features)
    model = DNN(made, 16, 16 * len(features), (400, 400, 400), 0.2, "plain")
    model._embedding_regularizer, model._eval_steps = 1e-3, None
    with tempfile.TemporaryDirectory() as folder:
        model.checkpoint = str(Path(folder, "model"))
        model.model_dir = folder
        loaders = []
        for split, columns in data.splits.items():
            path = Path(folder, f"{split}.npz")
            np.savez(path, **columns)
            loader, _ = RankDataLoader(
                made,
                stage="train",
                train_data=str(path),
                batch_size=4096,
                shuffle=split == "train",
            )
            loaders.append(loader)
        model.fit(loaders[0], epochs=rounds, validation_data=loaders[1])
        model.load_weights(model.checkpoint)
        found = [model.evaluate(loader)["AUC"] for loader in loaders[1:]]
    return float(found[0]), float(found[1])


def lightgbm(data: Data, seed: int, rounds: int) -> tuple[float, float]:
    """Return the AUC on validation and test."""
    import lightgbm as lgb
    from sklearn.metrics import roc_auc_score

    def matrix(columns: dict[str, Array]) -> Array:
        first = [columns[n][:, 0] if n in data.lists else columns[n] for n in data.sizes]
        return np.stack(first, axis=1).astype(np.float32)

    train, validation, test = (matrix(data.splits[name]) for name in SPLITS)
    categories = list(range(len(data.sizes)))
    rows = lgb.Dataset(train, data.splits["train"]["label"], categorical_feature=categories)
    watched = rows.create_valid(validation, data.splits["validation"]["label"])
    settings = {
        "objective": "binary",
        "metric": "auc",
        "num_leaves": 127,
        "learning_rate": 0.1,
        "seed": seed,
        "verbosity": -1,
    }
    stop = lgb.early_stopping(20, verbose=False)
    model = lgb.train(settings, rows, rounds, valid_sets=[watched], callbacks=[stop])
    found = [
        roc_auc_score(data.splits[name]["label"], model.predict(codes))
        for name, codes in (("validation", validation), ("test", test))
    ]
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("features", type=Path, help="directory that `hvdrec prepare` wrote")
    parser.add_argument("--model", choices=("fuxictr", "lightgbm"), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, help="at most (default: 20 epochs, 1000 trees)")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    declared = json.loads((given.features / "manifest.json").read_text())["meta"]["config"]
    kinds = {f["name"]: f for f in declared["features"] if f["kind"] != "sequence"}
    lists = {n: f["max_length"] for n, f in kinds.items() if f["kind"] == "categorical_list"}
    splits = {name: read(given.features, name, lists, list(kinds)) for name in SPLITS}
    # A code that training never met would have no row.
    sizes = {n: 1 + max(int(splits[s][n].max()) for s in SPLITS) for n in kinds}
    began = time.monotonic()
    run, most = {"fuxictr": (fuxictr, 20), "lightgbm": (lightgbm, 1000)}[given.model]
    validation, test = run(Data(splits, sizes, lists), given.seed, given.rounds or most)
    minutes = (time.monotonic() - began) / 60
    print(json.dumps({"auc": test, "validation_auc": validation, "minutes": minutes}))


if __name__ == "__main__":
    main()
