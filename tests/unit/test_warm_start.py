"""Warm start: towers from a linear autoencoder in closed form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import sparse

from hvdrec.config import Config
from hvdrec.config.sections import Tower, WarmStart
from hvdrec.errors import UserError
from hvdrec.parallel.ranks import World
from hvdrec.training.warm_start import check_size, factors, item_item_weights, warm_start
from tests.small_model import Setting, small_config, small_model, small_tables

USERS, ITEMS = 30, 9


def taken_items(seed: int = 0) -> sparse.csr_matrix:
    random = np.random.default_rng(seed)
    chosen = random.random((USERS, ITEMS)) < np.linspace(0.2, 0.7, ITEMS)
    return sparse.csr_matrix(chosen.astype(np.float32))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("user_power", [0.0, 1.0])
def test_weights_solve_least_squares_over_a_users_other_items(
    dropout: float, user_power: float
) -> None:
    taken, l2 = taken_items(), 3.0
    found = item_item_weights(taken, WarmStart(l2=l2, dropout=dropout, user_power=user_power))
    dense = taken.toarray().astype(np.float64)
    sizes = np.maximum(dense.sum(1), 1)
    weight = sizes**-user_power
    weight *= dense.sum() / (weight * sizes).sum()
    for item in range(ITEMS):
        others = np.delete(np.arange(ITEMS), item)
        inputs, target = dense[:, others], dense[:, item]
        gram = inputs.T @ (weight[:, None] * inputs)
        penalty = l2 + dropout / (1 - dropout) * np.diag(gram)
        expected = np.linalg.solve(gram + np.diag(penalty), inputs.T @ (weight * target))
        np.testing.assert_allclose(found[others, item], expected, atol=1e-5)
        assert found[item, item] == 0


def test_factors_of_full_rank_are_exact() -> None:
    taken = taken_items()
    weights = item_item_weights(taken, WarmStart(l2=1.0))
    user, item = factors(taken, weights, ITEMS, seed=0)
    np.testing.assert_allclose((taken @ user) @ item.T, taken @ weights, atol=1e-4)


def test_factors_of_low_rank_are_the_best_approximation() -> None:
    taken = taken_items()
    weights = item_item_weights(taken, WarmStart(l2=1.0))
    scaled = sparse.diags(1 / np.sqrt(np.maximum(taken.sum(1).A1, 1))) @ taken
    target = scaled @ weights
    user, item = factors(taken, weights, 3, seed=0)
    left = np.linalg.norm(target - (scaled @ user) @ item.T)
    singular = np.linalg.svd(target, compute_uv=False)
    assert left == pytest.approx(np.sqrt((singular[3:] ** 2).sum()), rel=1e-3)


def configured(features: Path, **warm: object) -> Config:
    config = small_config("joint")
    model = replace(
        config.model, tower=Tower(hidden=(), output=3), dimension=6, pooling={"history": "mean"}
    )
    train = replace(config.train, warm_start=WarmStart("history", **warm))  # type: ignore[arg-type]
    paths = replace(config.paths, features=str(features))
    return replace(config, model=model, train=train, paths=paths)


def write_features(directory: Path) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Write training rows and items; return the user-item matrix and the code of each item."""
    taken = taken_items(1)
    rows = taken.tocoo()
    codes = np.arange(ITEMS)[::-1] + 2
    (directory / "train").mkdir(parents=True)
    ones = np.ones(len(rows.row), np.float32)
    table = {"user_index": rows.row, "item_index": rows.col, "label": ones, "weight": ones}
    # A row of weight 0 and a negative row add no positive.
    more = {"user_index": [0, 1], "item_index": [0, 1], "label": [1.0, 0.0], "weight": [0.0, 1.0]}
    joined = {name: np.concatenate([table[name], more[name]]) for name in table}
    joined = {name: a.astype(table[name].dtype) for name, a in joined.items()}
    pq.write_table(pa.table(joined), directory / "train" / "shard-00000.parquet")
    pq.write_table(pa.table({"item_id": codes}), directory / "items.parquet")
    return taken, codes


def test_warm_started_towers_rank_like_the_closed_form(tmp_path: Path) -> None:
    taken, codes = write_features(tmp_path)
    config = configured(tmp_path, l2=1.0)
    model = small_model(config)
    tables = small_tables(config, model, World(), Setting())
    warm_start(config, ITEMS + 2, model, tables)
    model.tables.weight("item_id").data.copy_(tables.table("item_id")[0])
    ours = config.train.warm_start
    user, item = factors(taken, item_item_weights(taken, ours), 3, config.seed)
    expected = (taken @ user) @ item.T / np.maximum(taken.sum(1).A1, 1)[:, None]
    histories = np.zeros((USERS, ITEMS), np.int64)
    for row in range(USERS):
        items = taken.indices[taken.indptr[row] : taken.indptr[row + 1]]
        histories[row, : len(items)] = codes[items]
    user_codes = {
        "user_id": torch.zeros(USERS, dtype=torch.int64),
        "history": torch.from_numpy(histories),
        "age": torch.randn(USERS, dtype=torch.float64),
    }
    item_codes = {
        "item_id": torch.from_numpy(codes),
        "genres": torch.ones(ITEMS, 3, dtype=torch.int64),
        "price": torch.ones(ITEMS, dtype=torch.int64),
    }
    with torch.no_grad():
        users = model.represent_users(user_codes)[:, :3]
        scores = (users @ model.represent_items(item_codes)[:, :3].T).numpy()
    ratio = np.linalg.norm(scores) / np.linalg.norm(expected)
    assert ratio > 0
    np.testing.assert_allclose(scores, ratio * expected, atol=1e-5 * np.abs(scores).max())


def test_a_vocabulary_that_is_too_large_is_refused(tmp_path: Path) -> None:
    config = configured(tmp_path, max_items=100)
    with pytest.raises(UserError) as raised:
        check_size(config, 101)
    assert (raised.value.field, raised.value.value) == ("train.warm_start.max_items", 100)
    assert "'item_id' has 101 codes" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tower": Tower(hidden=(4,), output=3)}, "needs linear towers"),
        ({"tower": Tower(hidden=(), output=3, normalize=True)}, "needs linear towers"),
        ({"pooling": {"history": "attention"}}, "needs model.pooling.history = 'mean' or 'sqrt'"),
        ({"dimension": 5}, "dimension of 'item_id' must be at least 6, not 5"),
    ],
)
def test_models_that_cannot_be_warm_started_are_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    config = configured(tmp_path)
    with pytest.raises(UserError) as raised:
        replace(config, model=replace(config.model, **change))  # type: ignore[arg-type]
    assert str(raised.value).startswith("train.warm_start.history = 'history': ")
    assert message in str(raised.value)
