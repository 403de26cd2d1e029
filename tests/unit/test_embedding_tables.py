"""Tests of tables outside the model: initial values, unique rows, memory and errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hvdrec.config.sections import Parallel
from hvdrec.embeddings import setup
from hvdrec.embeddings.initialization import initial_rows
from hvdrec.embeddings.kernels import RowOptimizer
from hvdrec.embeddings.lookup import drop_to_unknown
from hvdrec.embeddings.placement import group_tables
from hvdrec.embeddings.setup import check_memory, free_memory, make_tables
from hvdrec.embeddings.sharded import DistributedTables
from hvdrec.errors import UserError
from hvdrec.parallel.ranks import World
from tests.small_model import SIZES, Setting, small_config, small_model, small_tables

CPU = torch.device("cpu")


def test_initial_values_do_not_depend_on_the_number_of_ranks() -> None:
    config = small_config()
    whole = make_tables(config, SIZES, World(), CPU)
    shards = replace(config, parallel=Parallel(placement="sharded"))
    for rank in range(3):
        part = make_tables(shards, SIZES, World(rank, 3, rank, 3), CPU)
        for group in part.groups:
            for table in group.sizes:
                ids = torch.from_numpy(group.local_ids(table, rank))
                assert torch.equal(part.table(table)[0], whole.table(table)[0][ids])
                assert len(ids) == len(part.table(table)[0])


def test_initial_values_are_uniform_with_the_given_deviation() -> None:
    values = initial_rows("user_id", np.arange(20_000), 16, seed=0, deviation=0.05)
    assert not values[:2].any()  # MISSING and UNKNOWN
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
    (lookup,) = tables.look_up(drop_to_unknown(config.schema, codes, 0.999999, random))
    weight = tables.table("user_id")[0]
    rows = tables.kernels[0].fetch(lookup.rows.long())[lookup.values[0].indices]
    assert torch.equal(rows, torch.stack([weight[0], weight[1], weight[1]]))
    (untouched,) = tables.look_up(codes)
    rows = tables.kernels[0].fetch(untouched.rows.long())[untouched.values[0].indices]
    assert torch.equal(rows, weight[[0, 5, 6]])
    assert len(lookup.rows) == 1 + 1 + 3  # MISSING, UNKNOWN, three genres


def test_a_batch_looks_up_each_row_once() -> None:
    config = small_config()
    tables = small_tables(config, small_model(config), World(), Setting())
    codes = {"user_id": torch.tensor([5, 5, 6, 5]), "hour": torch.tensor([0, 3, 3, 0])}
    (lookup,) = tables.look_up(codes)
    assert len(lookup.rows) == 1 + 2 + 1
    whole = lookup.values[0].indices
    (in_parts,) = tables.look_up(codes, parts=2)
    assert [values.indices.tolist() for values in in_parts.values] == [
        whole[:4].tolist(),
        whole[4:].tolist(),
    ]


def test_a_code_outside_its_table_is_refused() -> None:
    config = small_config()
    tables = small_tables(config, small_model(config), World(), Setting())
    codes = {"history": torch.tensor([[0, 11, 3]])}
    with pytest.raises(UserError, match="code 11 is outside table 'item_id' of 11 rows") as error:
        tables.look_up(codes)
    assert (error.value.field, error.value.value) == ("history", 11)
    with pytest.raises(UserError, match="code -3 is outside table 'hour' of 5") as error:
        tables.look_up({"hour": torch.tensor([1, -3])})
    assert (error.value.field, error.value.value) == ("hour", -3)


def test_tables_too_large_for_memory_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = group_tables({"user": 10**6, "item": 10**5}, {"user": 16, "item": 16}, 1)
    monkeypatch.setattr(setup, "free_memory", lambda: 10**7)
    with pytest.raises(UserError, match="train on more ranks") as error:
        check_memory(groups, RowOptimizer(), World(), CPU)
    assert (error.value.field, error.value.value) == ("user", 10**6)
    for words in ("replicated-16", "0.07 GB on each of 1 ranks", "this host has 0.01 GB free"):
        assert words in str(error.value)
    sharded = group_tables({"user": 10**6}, {"user": 16}, 8, "sharded")
    with pytest.raises(UserError, match=r"sharded.*add hosts, or reduce"):
        check_memory(sharded, RowOptimizer(), World(0, 8, 0, 8), CPU)
    # Eight hosts with one rank each have eight times the memory.
    check_memory(sharded, RowOptimizer(), World(0, 8, 0, 1), CPU)


def test_free_memory_is_plausible() -> None:
    assert 10**7 < free_memory() < 10**13


def test_a_kernel_that_cannot_hold_a_table_is_refused() -> None:
    config = small_config(embedding_optimizer="adam")
    with_fbgemm = replace(config, parallel=Parallel(kernel="fbgemm"))
    with pytest.raises(UserError, match=r"table 'user_id': .*'adam'") as error:
        make_tables(with_fbgemm, SIZES, World(), CPU)
    assert (error.value.field, error.value.value) == ("parallel.kernel", "fbgemm")
    assert make_tables(config, SIZES, World(), CPU).kernels[0].name == "torch"


def test_a_resumed_run_keeps_its_kernels() -> None:
    for kernel in ("torch", "fbgemm"):
        tables = make_tables(small_config(), SIZES, World(), CPU, kernels={4: kernel})  # type: ignore[dict-item]
        assert [k.name for k in tables.kernels] == [kernel]


def test_without_a_seed_tables_are_zero() -> None:
    groups = group_tables({"user_id": 9}, {"user_id": 4}, 1)
    tables = DistributedTables(
        small_config().schema, groups, RowOptimizer(), World(), kernels={4: "torch"}, seed=None
    )
    assert not tables.table("user_id")[0].any()
    with pytest.raises(KeyError):
        tables.table("item_id")
