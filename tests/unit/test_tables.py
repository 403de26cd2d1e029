"""Tables outside the model: first values, a batch's rows, memory, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hvdrec.config.sections import Parallel
from hvdrec.embeddings import setup
from hvdrec.embeddings.kernels import RowOptimizer
from hvdrec.embeddings.placement import arrange
from hvdrec.embeddings.setup import check_memory, free_memory, make_tables
from hvdrec.embeddings.sharded import DistributedTables, initial_rows
from hvdrec.errors import UserError
from hvdrec.parallel.ranks import World
from tests.small_model import SIZES, Setting, small_config, small_model, small_tables

CPU = torch.device("cpu")


def test_first_values_do_not_depend_on_the_ranks() -> None:
    config = small_config()
    whole = make_tables(config, SIZES, World(), CPU)
    shards = replace(config, parallel=Parallel(placement="sharded"))
    for rank in range(3):
        part = make_tables(shards, SIZES, World(rank, 3, rank, 3), CPU)
        for group in part.groups:
            for table in group.rows:
                ids = torch.from_numpy(group.ids(table, rank))
                assert torch.equal(part.table(table)[0], whole.table(table)[0][ids])
                assert len(ids) == len(part.table(table)[0])


def test_first_values_are_spread_as_told() -> None:
    values = initial_rows("user_id", np.arange(20_000), 16, seed=0, deviation=0.05)
    assert not values[:2].any()  # missing and unknown say nothing
    rest = values[2:]
    assert rest.std() == pytest.approx(0.05, rel=0.01)
    assert abs(rest.mean()) < 0.0005
    assert abs(rest).max() <= 0.05 * 3**0.5
    assert np.abs(np.corrcoef(rest.T) - np.eye(16)).max() < 0.04
    assert len(np.unique(rest)) == rest.size
    for other in (
        initial_rows("item_id", np.arange(20_000), 16, seed=0, deviation=0.05),
        initial_rows("user_id", np.arange(20_000), 16, seed=1, deviation=0.05),
    ):
        assert abs(np.corrcoef(other[2:].ravel(), rest.ravel())[0, 1]) < 0.01


def test_unknown_rate_replaces_only_known_single_values() -> None:
    config = small_config()
    tables = small_tables(config, small_model(config), World(), Setting())
    codes = {"user_id": torch.tensor([0, 5, 6]), "genres": torch.tensor([[2, 3], [0, 0], [4, 0]])}
    random = np.random.default_rng(0)
    (found,) = tables.find(codes, unknown_rate=0.999999, random=random)
    weight = tables.table("user_id")[0]
    rows = tables.kernels[0].fetch(found.rows.long())[found.values[0].places]
    assert torch.equal(rows, torch.stack([weight[0], weight[1], weight[1]]))
    (untouched,) = tables.find(codes)
    rows = tables.kernels[0].fetch(untouched.rows.long())[untouched.values[0].places]
    assert torch.equal(rows, weight[[0, 5, 6]])
    assert len(found.rows) == 1 + 1 + 3  # missing, unknown, three genres


def test_the_cost_of_a_batch_is_its_distinct_rows() -> None:
    config = small_config()
    tables = small_tables(config, small_model(config), World(), Setting())
    codes = {"user_id": torch.tensor([5, 5, 6, 5]), "hour": torch.tensor([0, 3, 3, 0])}
    (found,) = tables.find(codes)
    assert len(found.rows) == 1 + 2 + 1
    whole = found.values[0].places
    (cut,) = tables.find(codes, parts=2)
    assert [values.places.tolist() for values in cut.values] == [
        whole[:4].tolist(),
        whole[4:].tolist(),
    ]


def test_a_code_outside_its_table_is_told_with_both_names() -> None:
    config = small_config()
    tables = small_tables(config, small_model(config), World(), Setting())
    codes = {"history": torch.tensor([[0, 11, 3]])}
    with pytest.raises(
        UserError, match="feature 'history': code 11 is outside table 'item_id' of 11 rows"
    ):
        tables.find(codes)
    with pytest.raises(UserError, match="feature 'hour': code -3 is outside table 'hour' of 5"):
        tables.find({"hour": torch.tensor([1, -3])})


def test_tables_too_large_for_memory_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = arrange({"user": 10**6, "item": 10**5}, {"user": 16, "item": 16}, 1)
    monkeypatch.setattr(setup, "free_memory", lambda: 10**7)
    with pytest.raises(
        UserError,
        match=r"table 'user' \(1000000 rows of width 16, replicated\): the tables take 0.07 GB on "
        r"each of 1 ranks, this host has 0.01 GB free; train on more ranks with",
    ):
        check_memory(groups, RowOptimizer(), World(), CPU)
    sharded = arrange({"user": 10**6}, {"user": 16}, 8, "sharded")
    with pytest.raises(UserError, match=r"sharded.*add hosts or narrow it"):
        check_memory(sharded, RowOptimizer(), World(0, 8, 0, 8), CPU)
    # Eight hosts with one rank each have eight times as much.
    check_memory(sharded, RowOptimizer(), World(0, 8, 0, 1), CPU)


def test_free_memory_is_that_of_this_machine() -> None:
    assert 10**7 < free_memory() < 10**13


def test_a_kernel_that_cannot_is_refused_with_the_tables_name() -> None:
    config = small_config(embedding_optimizer="adam")
    wished = replace(config, parallel=Parallel(kernel="fbgemm"))
    with pytest.raises(
        UserError, match=r"parallel.kernel = 'fbgemm': cannot hold table 'user_id': .*no 'adam'"
    ):
        make_tables(wished, SIZES, World(), CPU)
    assert make_tables(config, SIZES, World(), CPU).kernels[0].name == "torch"


def test_an_interrupted_run_keeps_its_kernels() -> None:
    for kernel in ("torch", "fbgemm"):
        tables = make_tables(small_config(), SIZES, World(), CPU, kernels={4: kernel})  # type: ignore[dict-item]
        assert [k.name for k in tables.kernels] == [kernel]


def test_without_a_seed_tables_are_zero() -> None:
    groups = arrange({"user_id": 9}, {"user_id": 4}, 1)
    tables = DistributedTables(
        small_config().schema, groups, RowOptimizer(), World(), kernels={4: "torch"}, seed=None
    )
    assert not tables.table("user_id")[0].any()
    with pytest.raises(KeyError):
        tables.table("item_id")
