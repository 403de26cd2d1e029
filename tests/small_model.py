"""A small model and batch that hold every kind of feature, for tests."""

from __future__ import annotations

import numpy as np
import torch

from hvdrec.config import Config, Model, Ranker, Samples, Tower, Train
from hvdrec.loader import Batch
from hvdrec.models.recommender import Recommender
from hvdrec.schema import Feature

SIZES = {"user_id": 9, "item_id": 11, "genres": 6, "price": 7, "hour": 5, "shop": 8}


def small_config(objective: str = "joint", **train: object) -> Config:
    return Config(
        name="small",
        features=(
            Feature("user_id"),
            Feature("history", kind="sequence", max_length=4),
            Feature("age", kind="numeric", dtype="float"),
            Feature("item_id", side="item"),
            Feature("genres", side="item", kind="categorical_list", max_length=3),
            Feature("price", side="item", kind="numeric", dtype="float", transform="quantile"),
            Feature("hour", side="scene", dtype="int"),
            Feature("shop", side="scene", kind="hashed", dtype="int"),
        ),
        samples=Samples(user="user_id", item="item_id"),
        model=Model(
            dimension=4,
            tower=Tower(hidden=(7,), output=5, normalize=True),
            ranker=Ranker(hidden=(6,), cross_layers=2, direct=("user_id", "genres")),
        ),
        train=Train(objective=objective, embedding_l2=0.03, temperature=0.2, **train),  # type: ignore[arg-type]
    )


def small_model(config: Config, seed: int = 0) -> Recommender:
    torch.manual_seed(seed)
    model = Recommender(config, SIZES).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for table in model.tables.tables.values():
        with torch.no_grad():
            table.weight[0] = 0.0  # type: ignore[index, operator]
    return model


def small_batch(rows: int, padding: int = 0, seed: int = 0) -> Batch:
    """Return random rows with unequal weights, and padding of weight zero behind them."""
    random = np.random.default_rng(seed)

    def padded(drawn: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(
            np.concatenate([drawn, np.zeros_like(drawn[:1]).repeat(padding, 0)])
        )

    def codes(name: str, *shape: int, low: int = 0) -> torch.Tensor:
        return padded(random.integers(low, SIZES[name], (rows, *shape)))

    items = random.integers(0, 9, rows)
    return Batch(
        features={
            "user_id": codes("user_id", low=1),
            "history": codes("item_id", 4),
            "age": padded(random.normal(size=rows)),
            "item_id": padded(items + 2),
            "genres": codes("genres", 3),
            "price": codes("price"),
            "hour": codes("hour"),
            "shop": codes("shop"),
        },
        user_index=padded(random.integers(0, 7, rows)),
        item_index=padded(items),
        label=padded(random.integers(0, 2, rows).astype(np.float64)),
        weight=padded(random.uniform(0.5, 2.0, rows)),
        rows=rows,
    )
