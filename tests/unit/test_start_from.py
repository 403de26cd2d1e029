"""Weights and table rows that move to a model with other features, sizes and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdrec.config import Config, Feature
from hvdrec.embeddings.files import carry_tables, table_meta, write_tables
from hvdrec.embeddings.initialization import initial_rows
from hvdrec.embeddings.setup import row_optimizer, table_groups
from hvdrec.embeddings.sharded import DistributedTables
from hvdrec.models.input_columns import input_axes, moved
from hvdrec.models.recommender import Recommender
from hvdrec.parallel.ranks import World
from hvdrec.storage.artifacts import StoredFiles, read_manifest, write_manifest
from hvdrec.training.build import build_model
from tests.small_model import SIZES, small_batch, small_config, small_model, with_tasks

SEED, WIDTH = 3, 4


def world(rank: int, ranks: int) -> World:
    return World(rank=rank, size=ranks, local_rank=rank, local_size=ranks)


def tables(
    sizes: Mapping[str, int], rank: int, ranks: int, optimizer: str = "adam"
) -> DistributedTables:
    config = small_config("ranking", embedding_optimizer=optimizer)
    parallel = replace(config.parallel, placement="sharded")
    groups = table_groups(config.schema, WIDTH, {**SIZES, **sizes}, ranks, parallel)
    return DistributedTables(
        config.schema,
        groups,
        row_optimizer(config.train),
        world(rank, ranks),
        kernels={group.width: "torch" for group in groups},
        seed=SEED,
    )


@given(
    before=st.integers(1, 4),
    now=st.integers(1, 4),
    size=st.integers(3, 14),
    grown=st.integers(0, 9),
    changed=st.sets(st.integers(0, 22)),
)
@settings(max_examples=12, deadline=None)
def test_rows_move_to_any_number_of_ranks_and_changed_rows_start_from_their_initial_values(
    tmp_path_factory: pytest.TempPathFactory,
    before: int,
    now: int,
    size: int,
    grown: int,
    changed: set[int],
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    random = np.random.default_rng(size)
    stored = {key: random.normal(size=(size, WIDTH)).astype("f4") for key in ("weight", "mean")}
    meta = {}
    for rank in range(before):
        own = tables({"item_id": size}, rank, before)
        weight, state = own.table("item_id")
        weight[:] = torch.from_numpy(
            stored["weight"][rank::before] if before > 1 else stored["weight"]
        )
        state["mean"][:] = torch.from_numpy(
            stored["mean"][rank::before] if before > 1 else stored["mean"]
        )
        own.step = 7
        write_tables(folder, own)
        meta = table_meta(own)
    write_manifest(folder, "checkpoint", {})
    files = StoredFiles(folder, read_manifest(folder, "checkpoint"))
    is_changed = np.isin(np.arange(size + grown), [*changed])
    all_changed = {name: np.zeros(rows, bool) for name, rows in SIZES.items()}
    all_changed["item_id"] = is_changed
    fresh = initial_rows("item_id", np.arange(size + grown), WIDTH, SEED, 0.01).astype("f4")
    recorded = {key: value for key, value in meta.items() if key != "sizes"}
    for known in (meta, recorded):  # earlier versions did not record the sizes
        for rank in range(now):
            grown_tables = tables({"item_id": size + grown}, rank, now)
            carry_tables(files, known, grown_tables, all_changed)
            weight, state = grown_tables.table("item_id")
            ids = np.arange(size + grown)[rank::now] if now > 1 else np.arange(size + grown)
            for row, each in enumerate(ids):
                is_kept = each < size and not is_changed[each]
                expected = stored["weight"][each] if is_kept else fresh[each]
                np.testing.assert_array_equal(weight[row].numpy(), expected)
                mean = stored["mean"][each] if is_kept else np.zeros(WIDTH)
                np.testing.assert_array_equal(state["mean"][row].numpy(), mean)
            assert grown_tables.step == 7


def test_a_table_that_the_checkpoint_lacks_keeps_its_initial_values(tmp_path: Path) -> None:
    own = tables({}, 0, 1)
    write_tables(tmp_path, own)
    meta = table_meta(own)
    write_manifest(tmp_path, "checkpoint", {})
    files = StoredFiles(tmp_path, read_manifest(tmp_path, "checkpoint"))
    config = small_config("ranking", embedding_optimizer="adam")
    config = replace(config, features=(*config.features, Feature("town")))
    groups = table_groups(config.schema, WIDTH, {**SIZES, "town": 5}, 1, config.parallel)
    more = DistributedTables(
        config.schema,
        groups,
        row_optimizer(config.train),
        world(0, 1),
        kernels={WIDTH: "torch"},
        seed=SEED,
    )
    before = more.table("town")[0].clone()
    changed = {name: np.zeros(rows, bool) for name, rows in SIZES.items()}
    carry_tables(files, meta, more, changed | {"town": np.ones(5, bool)})
    assert before.any()
    torch.testing.assert_close(more.table("town")[0], before, rtol=0, atol=0)


def with_features(config: Config) -> Config:
    """Add a feature on each side, before the others, and read two of them directly."""
    added = (
        Feature("town"),
        Feature("income", kind="numeric", dtype="float"),
        Feature("brand", side="item"),
        Feature("likes", kind="categorical_list", shares="genres", max_length=3),
        Feature("weather", side="scene"),
    )
    ranker = replace(config.model.ranker, direct=("town", "brand", "likes", "user_id", "genres"))
    model = replace(config.model, ranker=ranker)
    return replace(config, features=(*added, *config.features), model=model)


def move(old: Recommender, new: Recommender) -> None:
    """Move all dense weights of a model to another one, as a continued run does."""
    before, now = input_axes(old), input_axes(new)
    weights = dict(new.named_parameters())
    for name, value in old.named_parameters():
        if name.startswith("tables."):
            weights[name].data.copy_(value)
            continue
        tensor = value.detach()
        if name in now:
            tensor = moved(tensor, before[name], now[name])
        assert tensor.shape == weights[name].shape, name
        weights[name].data.copy_(tensor)


SHAPES = {
    "one label": lambda config: config,
    "matches and heads": lambda config: replace(
        config,
        model=replace(
            config.model,
            ranker=replace(
                config.model.ranker,
                matches=True,
                heads=5,
                direct=("user_id", "genres", "item_id", "history"),
            ),
        ),
    ),
    "no hidden layers": lambda config: replace(
        config,
        model=replace(
            config.model,
            tower=replace(config.model.tower, hidden=()),
            ranker=replace(config.model.ranker, hidden=()),
        ),
    ),
    "bottom": lambda config: with_tasks(config, sharing="bottom"),
    "mmoe": lambda config: with_tasks(config, sharing="mmoe", experts=2, task_hidden=(3,)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_with_added_features_gives_the_same_outputs_at_first(shape: str) -> None:
    config = SHAPES[shape](small_config("joint"))
    old = small_model(config).eval()
    wider = with_features(config)
    direct = dict.fromkeys((*wider.model.ranker.direct, *config.model.ranker.direct))
    ranker = replace(wider.model.ranker, direct=tuple(direct))
    wider = replace(wider, model=replace(wider.model, ranker=ranker))
    sizes = {**SIZES, "town": 5, "brand": 6, "weather": 4}
    new = build_model(wider, sizes, with_tables=True).double().eval()
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.normal_()
    move(old, new)
    batch = small_batch(6)
    random = torch.Generator().manual_seed(0)

    def codes(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(1, high, (6, *shape), generator=random)

    added = {"town": codes(5), "brand": codes(6), "weather": codes(4), "likes": codes(6, 3)}
    features = {**batch.features, **added, "income": torch.rand(6, generator=random).double()}
    with torch.no_grad():
        expected, found = old(batch.features), new(features)
    for one, other in ((expected.user, found.user), (expected.item, found.item)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    torch.testing.assert_close(expected.logit, found.logit, rtol=0, atol=1e-12)
    # The other way round: a removed feature leaves the weights of the others where they were.
    back = small_model(config, seed=1).eval()
    move_back = {
        name: value
        for name, value in new.named_parameters()
        if name in dict(back.named_parameters())
    }
    before, now = input_axes(new), input_axes(back)
    for name, value in back.named_parameters():
        tensor = move_back[name].detach()
        value.data.copy_(moved(tensor, before[name], now[name]) if name in now else tensor)
    with torch.no_grad():
        torch.testing.assert_close(back(batch.features).logit, expected.logit, rtol=0, atol=1e-12)
