"""The planner's formulas by hand, and what it says of bad options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hvdrec.embeddings.placement import TableGroup
from hvdrec.errors import UserError
from hvdrec.planner.plan import Cluster, Constants, Work, plan_step, smallest_cluster
from hvdrec.planner.planning import parse_quantity

SHARDED = TableGroup(16, 4, {"user": 1000})
REPLICATED = TableGroup(8, 1, {"hour": 24})
WORK = Work(
    rows=100,
    distinct={"sharded-16": 80.0, "replicated-8": 20.0},
    union={"sharded-16": 200.0, "replicated-8": 24.0},
    table_rows={"user": 79.0, "hour": 19.0},
    dense=500,
)
CONSTANTS = Constants(0.001, 1e-5, 1.0, 0.002, 1e-9)
STATE = {16: 1, 8: 8}


def test_bytes_are_those_of_the_formulas() -> None:
    plan = plan_step((REPLICATED, SHARDED), WORK, Cluster(4), CONSTANTS, STATE)
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


def test_time_is_compute_and_messages() -> None:
    whole = TableGroup(16, 1, {"user": 1000}), REPLICATED
    work = Work(100, {"replicated-16": 80, "replicated-8": 20}, {}, WORK.table_rows, 500)
    alone = plan_step(whole, work, Cluster(1), CONSTANTS, STATE)
    assert alone.seconds == {"compute": pytest.approx(0.002)}
    assert alone.total_bytes == 0
    # One host without limits: bytes cost what they do there.
    near = plan_step((REPLICATED, SHARDED), WORK, Cluster(4, 4), CONSTANTS, STATE)
    assert near.seconds["vectors (sharded-16)"] == pytest.approx(0.002 + 3840e-9)
    # 1 Mbit/s out of each of two hosts: half of a rank's neighbours' rows are over there, and two
    # ranks share the line; a ring crosses it once.
    far = plan_step((REPLICATED, SHARDED), WORK, Cluster(4, 2, bandwidth=1e6), CONSTANTS, STATE)
    assert far.seconds["vectors (sharded-16)"] == pytest.approx(
        0.002 + 8 * 3840 * 2 * (2 / 3) / 1e6
    )
    assert far.seconds["dense gradients"] == pytest.approx(0.002 + 8 * 3000 / 1e6)
    assert far.step_seconds > near.step_seconds


def test_most_dense_gradients_travel_during_the_backward_pass() -> None:
    work = replace(WORK, dense=1_000_000)  # 4 MB, in four buckets

    def dense(bandwidth: float) -> float:
        cluster = Cluster(4, 1, bandwidth=bandwidth)
        constants = replace(CONSTANTS, byte_seconds=0.0)
        plan = plan_step((REPLICATED, SHARDED), work, cluster, constants, STATE)
        return plan.seconds["dense gradients"] - constants.message_seconds

    travel = 2 * 4e6 * 3 / 4 * 8
    assert dense(travel / 0.0012) == pytest.approx(0.0012 / 4)  # the last bucket waits
    assert dense(travel / 0.1) == pytest.approx(0.1 - 0.002 / 2)  # longer than the pass


def test_ranks_that_share_cores_compute_longer() -> None:
    times = [
        plan_step((REPLICATED, SHARDED), WORK, Cluster(4, 4, cores=cores), CONSTANTS, STATE)
        for cores in (0, 8, 2)
    ]
    assert [plan.seconds["compute"] for plan in times] == pytest.approx([0.002, 0.002, 0.004])


def test_memory_decides_how_many_ranks_are_needed() -> None:
    assert not plan_step(
        (REPLICATED, SHARDED), WORK, Cluster(4, memory=10_000), CONSTANTS, STATE
    ).fits
    places = {n: (TableGroup(16, n, {"user": 1000}), REPLICATED) for n in (8, 16, 32)}
    assert smallest_cluster(places, STATE, 6_000) == 16
    assert smallest_cluster(places, STATE, 100) is None


def test_quantities_have_units() -> None:
    assert parse_quantity("80GB", {"GB": 1e9, "MB": 1e6}, "--memory") == 8e10
    assert parse_quantity("2.5 MB", {"GB": 1e9, "MB": 1e6}, "--memory") == 2.5e6
    for text in ("80", "GB", "-1GB", "80KB", "0GB", "many GB"):
        with pytest.raises(UserError, match=f"--memory {text}: must be a number above 0 with one"):
            parse_quantity(text, {"GB": 1e9, "MB": 1e6}, "--memory")


def test_constants_are_kept_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "plan.json"
    measured = Constants(1.0, 2.0, 3.0, 4.0, 5.0, is_measured=True)
    measured.save(file)
    assert Constants.load(file) == measured
    file.write_text('{"speed": 1}')
    with pytest.raises(UserError, match=r"plan.json: no measured constants .*--calibrate"):
        Constants.load(file)
