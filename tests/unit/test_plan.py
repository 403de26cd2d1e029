"""Tests of the planner: its formulas worked out by hand, and invalid options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from hvdrec.embeddings.placement import TableGroup
from hvdrec.errors import UserError
from hvdrec.planner import plan as plan_module
from hvdrec.planner.cost import Cluster, Constants, StepCost, Workload, predict_step
from hvdrec.planner.plan import parse_quantity, smallest_ranks
from tests.small_model import SIZES, small_config

SHARDED = TableGroup(16, 4, {"user": 1000})
REPLICATED = TableGroup(8, 1, {"hour": 24})
WORK = Workload(
    rows=100,
    unique={"sharded-16": 80.0, "replicated-8": 20.0},
    union={"sharded-16": 200.0, "replicated-8": 24.0},
    table_rows={"user": 79.0, "hour": 19.0},
    dense=500,
)
CONSTANTS = Constants(0.001, 1e-5, 1.0, 0.002, 1e-9)
STATE = {16: 1, 8: 8}


def test_bytes_follow_the_formulas() -> None:
    plan = predict_step((REPLICATED, SHARDED), WORK, Cluster(4), CONSTANTS, STATE)
    assert plan.bytes_sent == pytest.approx(
        {
            "row numbers (sharded-16)": 4 * 80 * 3 / 4,
            "vectors (sharded-16)": 4 * 16 * 80 * 3 / 4,
            "gradients (sharded-16)": 4 * 16 * 80 * 3 / 4,
            "row numbers (replicated-8)": 4 * 20 * 3,
            "gradients (replicated-8)": 2 * 4 * 8 * 24 * 3 / 4,
            "dense gradients": 2 * 4 * 500 * 3 / 4,
        }
    )
    assert plan.memory == 4 * 250 * 17 + 4 * 24 * 16 + 16 * 500
    assert {t.table: (t.placement, t.memory) for t in plan.tables} == {
        "user": ("sharded", 4 * 250 * 17),
        "hour": ("replicated", 4 * 24 * 16),
    }


def test_time_is_the_sum_of_compute_and_messages() -> None:
    whole = TableGroup(16, 1, {"user": 1000}), REPLICATED
    work = Workload(100, {"replicated-16": 80, "replicated-8": 20}, {}, WORK.table_rows, 500)
    alone = predict_step(whole, work, Cluster(1), CONSTANTS, STATE)
    assert alone.seconds == {"compute": pytest.approx(0.002)}
    assert not alone.bytes_sent
    # One host: bytes cost what they cost within it.
    near = predict_step((REPLICATED, SHARDED), WORK, Cluster(4, 4), CONSTANTS, STATE)
    assert near.seconds["vectors (sharded-16)"] == pytest.approx(0.002 + 3840e-9)
    # Two hosts that send 1 Mbit/s each: two of the three other ranks are on the other host, and two
    # ranks share the link; a ring crosses it once.
    far = predict_step((REPLICATED, SHARDED), WORK, Cluster(4, 2, bandwidth=1e6), CONSTANTS, STATE)
    assert far.seconds["vectors (sharded-16)"] == pytest.approx(
        0.002 + 8 * 3840 * 2 * (2 / 3) / 1e6
    )
    assert far.seconds["dense gradients"] == pytest.approx(0.002 + 8 * 3000 / 1e6)
    assert far.total_seconds > near.total_seconds


def test_most_dense_gradients_travel_during_the_backward_pass() -> None:
    work = replace(WORK, dense=1_000_000)  # 4 MB, in four buckets

    def dense(bandwidth: float) -> float:
        cluster = Cluster(4, 1, bandwidth=bandwidth)
        constants = replace(CONSTANTS, byte_seconds=0.0)
        plan = predict_step((REPLICATED, SHARDED), work, cluster, constants, STATE)
        return plan.seconds["dense gradients"] - constants.message_seconds

    travel = 2 * 4e6 * 3 / 4 * 8
    assert dense(travel / 0.0012) == pytest.approx(
        0.0012 / 4
    )  # the last bucket is sent after the pass
    assert dense(travel / 0.1) == pytest.approx(0.1 - 0.002 / 2)  # takes longer than the pass


def test_ranks_that_share_cores_compute_longer() -> None:
    times = [
        predict_step((REPLICATED, SHARDED), WORK, Cluster(4, 4, cores=cores), CONSTANTS, STATE)
        for cores in (0, 8, 2)
    ]
    assert [plan.seconds["compute"] for plan in times] == pytest.approx([0.002, 0.002, 0.004])


def test_memory_determines_the_smallest_number_of_ranks() -> None:
    groups = {n: (TableGroup(16, n, {"user": 1000}), REPLICATED) for n in (8, 16, 32)}
    assert smallest_ranks(groups, STATE, 6_000) == 16
    assert smallest_ranks(groups, STATE, 100) is None


def test_a_plan_compares_memory_and_adds_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(batch_size=8192)
    cost = StepCost((), {"a": 3.0, "b": 4.0}, {"compute": 0.25, "a": 0.25}, memory=10_000_000)
    monkeypatch.setattr(plan_module, "predict", lambda *_: cost)
    fitted = SimpleNamespace(sizes={**SIZES, "user_id": 1_000_000})
    monkeypatch.setattr(plan_module.Fitted, "load", lambda _: fitted)
    result = plan_module.plan(config, ranks=2, memory="1MB")
    assert not result.fits
    # A million rows of four values with one number of state take 20 MB, so 1.25 MB on 16 ranks.
    assert result.smallest_ranks == 32
    assert result.bytes_sent_per_step["total"] == 7
    assert result.seconds_per_step["total"] == 0.5
    assert result.rows_per_second == config.train.batch_size / 0.5
    fitting = plan_module.plan(config, ranks=2, memory="10MB")
    assert (fitting.fits, fitting.smallest_ranks) == (True, 2)
    with pytest.raises(UserError, match="negative") as error:
        plan_module.plan(config, ranks=-2)
    assert (error.value.field, error.value.value) == ("ranks", -2)


def test_quantities_have_units() -> None:
    assert parse_quantity("memory", "80GB", {"GB": 1e9, "MB": 1e6}) == 8e10
    assert parse_quantity("memory", "2.5 MB", {"GB": 1e9, "MB": 1e6}) == 2.5e6
    for text in ("80", "GB", "-1GB", "80KB", "0GB", "many GB"):
        with pytest.raises(UserError, match=r"number above 0 with one of .*GB, MB") as error:
            parse_quantity("memory", text, {"GB": 1e9, "MB": 1e6})
        assert (error.value.field, error.value.value) == ("memory", text)


def test_constants_are_saved_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "plan.json"
    measured = Constants(1.0, 2.0, 3.0, 4.0, 5.0, is_measured=True)
    measured.save(file)
    assert Constants.load(file) == measured
    file.write_text('{"speed": 1}')
    with pytest.raises(UserError, match=r"does not hold measured constants .*--calibrate") as error:
        Constants.load(file)
    assert error.value.field == str(file)
