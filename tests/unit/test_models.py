"""Tables, towers and ranker: shapes, padding, and which inputs affect which outputs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hvdrec.config.sections import Ranker
from hvdrec.models.embedding import EmbeddingTables, pooled
from hvdrec.models.layers import AttentionPooling, CrossNetwork, SelfAttentionPooling, head_products
from hvdrec.parallel.ranks import World
from tests.small_model import (
    SIZES,
    Setting,
    small_batch,
    small_config,
    small_model,
    small_tables,
)


def test_pooling_ignores_padding() -> None:
    weight = torch.tensor([[9.0], [1.0], [3.0]])
    codes = torch.tensor([[0, 1, 2], [0, 0, 2], [0, 0, 0]])
    assert pooled(codes, weight).tolist() == [[2.0], [3.0], [0.0]]


def test_pooling_gives_the_same_result_in_an_exported_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.randn(9, 4)
    codes = torch.randint(0, 9, (20, 5))
    fast = pooled(codes, weight)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert torch.allclose(pooled(codes, weight), fast, atol=1e-6)


@pytest.mark.parametrize("exporting", [False, True])
def test_sqrt_pooling_divides_by_the_root_of_the_length(
    monkeypatch: pytest.MonkeyPatch, exporting: bool
) -> None:
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: exporting)
    weight = torch.tensor([[0.0], [1.0], [2.0], [4.0]])
    codes = torch.tensor([[0, 2, 2, 3, 3], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]])
    # (2 + 2 + 4 + 4) / sqrt(4), 1 / sqrt(1), and an empty list
    assert pooled(codes, weight, root=True).tolist() == [[6.0], [1.0], [0.0]]


def test_head_products_by_hand() -> None:
    user, item = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[1.0, 0.0, 2.0, -1.0]])
    # The user's heads (1, 2) and (3, 4) with the item's heads (1, 0) and (2, -1).
    assert head_products(user, item, 2).tolist() == [[1.0, 0.0, 3.0, 2.0]]


def test_attention_by_hand() -> None:
    layer = AttentionPooling(2, 4)
    with torch.no_grad():
        layer.project.weight.copy_(torch.eye(2))
        layer.project.bias.zero_()
        layer.place.copy_(torch.tensor([[9.0, 9.0], [9.0, 9.0], [9.0, 9.0], [1.0, 0.0]]))
        layer.place[1:3] = 0.0
        layer.query.weight.copy_(torch.tensor([[2.0, 0.0]]))
    entries = torch.tensor([[[0.0, 0.0], [1.0, 3.0], [0.5, 5.0]], [[0.0, 0.0]] * 3])
    # Scores 2 tanh(1) and, in the last position, 2 tanh(0.5 + 1); the first entry is padding.
    weights = [math.exp(2 * math.tanh(1.0)), math.exp(2 * math.tanh(1.5))]
    share = weights[1] / sum(weights)
    expected = [(1 - share) * 1 + share * 0.5, (1 - share) * 3 + share * 5]
    assert layer(entries)[0].tolist() == pytest.approx(expected)
    assert layer(entries)[1].tolist() == [0.0, 0.0]


def test_self_attention_ignores_padding() -> None:
    layer = SelfAttentionPooling(3, 5)
    entry = torch.tensor([0.5, -1.0, 2.0])
    alone, among_padding = torch.zeros(1, 1, 3), torch.zeros(1, 4, 3)
    alone[0, 0] = among_padding[0, 3] = entry
    value = layer.inputs(entry)[6:]
    expected = entry + layer.output(value)
    assert torch.allclose(layer(alone)[0], expected, atol=1e-6)
    assert torch.allclose(layer(among_padding)[0], expected, atol=1e-6)
    assert layer(torch.zeros(1, 2, 3)).abs().max() == 0


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


def test_batch_rows_give_the_same_outputs_as_the_models_tables() -> None:
    codes = small_batch(12, padding=3).features
    for setting in (
        Setting(placement="replicated"),
        Setting(kernel="torch"),
        Setting(pooling="sqrt"),
        Setting(pooling="attention"),
        Setting(pooling="self-attention"),
    ):
        config = setting.config()
        whole, bare = small_model(config), small_model(config, with_tables=False)
        rows = small_tables(config, whole, World(), setting).fetch_rows(codes)
        expected, got = whole(codes), bare(codes, rows)
        # Not bit for bit: on some CPUs, numpy and torch compute other square roots.
        torch.testing.assert_close(got.logit, expected.logit, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(got.user, expected.user, rtol=1e-12, atol=1e-14)
        subset = {name: codes[name] for name in ("user_id", "history", "age")}
        tables = small_tables(config, whole, World(), setting)
        torch.testing.assert_close(
            bare.represent_users(subset, tables.fetch_rows(subset)),
            whole.represent_users(codes),
            rtol=1e-12,
            atol=1e-14,
        )


def test_without_towers_the_ranker_reads_every_feature() -> None:
    config = small_config("ranking")
    shape = replace(config.model.tower, output=0)
    everything = tuple(f.name for f in config.features if f.side != "scene")
    ranker = replace(config.model.ranker, direct=everything)
    config = replace(config, model=replace(config.model, tower=shape, ranker=ranker))
    model = small_model(config).eval()
    codes = dict(small_batch(12).features)
    assert model.user_width() == 4 + 4 + 1
    output = model(codes)
    assert output.user.shape == (12, 0)
    user, item = model.represent_users(codes), model.represent_items(codes)
    assert torch.equal(model.rank(user, item, codes), output.logit)
    for name, values in codes.items():
        changed = {**codes, name: values.flip(0)}
        assert (model(changed).logit != output.logit).any(), name


def test_ranking_representations_equals_the_forward_pass() -> None:
    model = small_model(small_config()).eval()
    codes = small_batch(12).features
    user, item = model.represent_users(codes), model.represent_items(codes)
    assert user.shape == (12, model.user_width()) == (12, 5 + 4)
    assert item.shape == (12, model.item_width()) == (12, 5 + 4)
    output = model(codes)
    assert torch.allclose(user[:, :5].norm(dim=1), torch.ones(12, dtype=torch.float64))
    assert torch.allclose(model.rank(user, item, codes), output.logit)


def test_matches_are_inner_products_of_features_that_share_a_table() -> None:
    config = small_config("ranking")
    shape = Ranker(hidden=(), direct=("user_id", "history", "item_id", "genres"), matches=True)
    config = replace(config, model=replace(config.model, ranker=shape))
    model = small_model(config).eval()
    codes = small_batch(12).features
    user, item = model.represent_users(codes), model.represent_items(codes)
    history = model.tables(config.schema.side("user"), codes)["history"]
    item_id = model.tables(config.schema.side("item"), codes)["item_id"]
    before = model.rank(user, item, codes)
    assert torch.allclose(before, model(codes).logit)
    # The column of the match follows the representations and the product of the towers.
    assert model.ranker is not None
    weight = model.ranker.head.weight
    with torch.no_grad():
        weight[0, model.user_width() + model.item_width() + model.output_width] += 2.0
    assert torch.allclose(model.rank(user, item, codes), before + 2 * (history * item_id).sum(1))


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
