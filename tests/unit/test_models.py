"""Tables, towers and ranker: shapes, padding, and what depends on what."""

from __future__ import annotations

import pytest
import torch

from hvdrec.models.layers import CrossNetwork
from hvdrec.models.tables import EmbeddingTables, pooled
from tests.small_model import SIZES, small_batch, small_config, small_model


def test_pooling_leaves_padding_out() -> None:
    weight = torch.tensor([[9.0], [1.0], [3.0]])
    codes = torch.tensor([[0, 1, 2], [0, 0, 2], [0, 0, 0]])
    assert pooled(codes, weight).tolist() == [[2.0], [3.0], [0.0]]


def test_pooling_is_the_same_when_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(9, 4)
    codes = torch.randint(0, 9, (20, 5))
    fast = pooled(codes, weight)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert torch.allclose(pooled(codes, weight), fast, atol=1e-6)


def test_cross_layer_by_hand() -> None:
    network = CrossNetwork(2, 1)
    with torch.no_grad():
        network.layers[0].weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))  # type: ignore[union-attr, operator]
        network.layers[0].bias.copy_(torch.tensor([0.5, -1.0]))  # type: ignore[union-attr, operator]
    # W x + b = (1 + 4 + 0.5, 2 - 1) = (5.5, 1); x * that + x = (6.5, 4)
    assert network(torch.tensor([[1.0, 2.0]])).tolist() == [[6.5, 4.0]]


def test_history_shares_the_items_table() -> None:
    tables = EmbeddingTables(small_config().schema, SIZES, 4)
    assert set(tables.tables) == set(SIZES)
    assert tables.width(small_config().schema["history"]) == 4


def test_missing_rows_stay_zero_and_get_no_gradient() -> None:
    model = small_model(small_config())
    output = model(small_batch(12).features)
    (output.logit.sum() + output.user.sum()).backward()
    for table in model.tables.tables.values():
        assert not table.weight[0].any()  # type: ignore[index, union-attr]
        assert not table.weight.grad[0].any()  # type: ignore[index, union-attr]


def test_unknown_rate_replaces_only_known_values_and_only_in_training() -> None:
    config = small_config()
    tables = EmbeddingTables(config.schema, SIZES, 4, unknown_rate=0.999999)
    feature = config.schema["user_id"]
    codes = {"user_id": torch.tensor([0, 5, 6])}
    trained = tables([feature], codes)["user_id"]
    weight = tables.tables["user_id"].weight
    assert torch.equal(trained, torch.stack([weight[0], weight[1], weight[1]]))  # type: ignore[index]
    tables.eval()
    served = tables([feature], codes)["user_id"]
    assert torch.equal(served, torch.stack([weight[0], weight[5], weight[6]]))  # type: ignore[index]


def test_representations_and_rank_are_the_forward_pass() -> None:
    model = small_model(small_config()).eval()
    codes = small_batch(12).features
    user, item = model.represent_users(codes), model.represent_items(codes)
    assert user.shape == (12, model.user_width()) == (12, 5 + 4)
    assert item.shape == (12, model.item_width()) == (12, 5 + 4)
    output = model(codes)
    assert torch.allclose(user[:, :5].norm(dim=1), torch.ones(12, dtype=torch.float64))
    assert torch.allclose(model.rank(user, item, codes), output.logit)


def test_without_a_ranker_the_logit_is_the_scaled_inner_product() -> None:
    config = small_config("retrieval")
    model = small_model(config).eval()
    output = model(small_batch(12).features)
    assert torch.allclose(output.logit, (output.user * output.item).sum(1) / 0.2)


def test_scene_changes_the_score() -> None:
    model = small_model(small_config()).eval()
    codes = dict(small_batch(12).features)
    before = model(codes).logit
    codes["hour"] = (codes["hour"] + 1) % 5
    assert (model(codes).logit != before).all()
