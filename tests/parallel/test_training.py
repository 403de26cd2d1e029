"""Tests that training on several ranks equals training on one, also after an interruption."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvdrec.storage.artifacts import read_manifest
from tests.parallel.conftest import HVDREC
from tests.parallel.launch import launch, run_program

Train = Callable[..., Path]
SHARDED = ("--parallel.placement", "sharded")
AVERAGED = (*SHARDED, "--train.average-decay", "0.9", "--train.average-steps", "2")
BY_HAND = ("--parallel.kernel", "torch", "--train.cpu-layers", "fused")
"""Choices that timings make otherwise: two runs with them are equal bit for bit."""
FAILING_SCRIPT = """
import sys
import hvdrec
from hvdrec.parallel import ranks

def stop(epoch, value):
    if ranks.current().rank == 1:
        raise hvdrec.UserError("a shard is damaged; write it again")
    return False

config = hvdrec.load_config(sys.argv[1], {"paths.run": sys.argv[2]})
hvdrec.train(config, stop=stop)
"""


def log(run: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.mark.parametrize(
    ("ranks", "launcher"),
    [(2, "horovodrun"), (2, "mpirun"), pytest.param(4, "horovodrun", marks=pytest.mark.slow)],
)
def test_ranks_train_like_one_rank(train: Train, ranks: int, launcher: str) -> None:
    alone = log(train(1, ""), "validation")[-1]
    run = train(ranks, launcher)
    assert log(run, "start")[0]["world_size"] == ranks
    together = log(run, "validation")[-1]
    assert together["step"] == alone["step"] == 20
    assert together["rows"] == alone["rows"] == 600
    # The order of rows and dropout differ, so results are similar but not equal.
    assert abs(together["log_loss"] - alone["log_loss"]) < 0.03


@pytest.mark.slow
def test_a_users_script_trains_like_the_command_line(
    train: Train, small: Path, tmp_path: Path
) -> None:
    expected = train(2, "horovodrun", *BY_HAND, "--train.epochs", "1")
    config = small.with_name("script.toml")
    text = small.read_text().replace("\n[train]\n", '\n[train]\ncpu_layers = "fused"\n')
    config.write_text(text + '\n[parallel]\nkernel = "torch"\n')
    done = run_program("my_train.py", [str(config), str(tmp_path / "run")], 2, "mpirun")
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == 2 and results[0] == results[1]
    best = max(line["auc"] for line in log(expected, "validation"))
    validation = results[0]["train"]["validation"]
    assert validation["auc"] == best
    assert results[0]["report"]["ranking"]["auc"] == pytest.approx(best, abs=1e-6)
    for file in ("model.safetensors", "optimizer.safetensors", "tables.safetensors"):
        path = Path("checkpoints/step-00000010", file)
        assert (tmp_path / "run" / path).read_bytes() == (expected / path).read_bytes()


def test_a_failing_rank_of_a_users_script_ends_the_job(small: Path, tmp_path: Path) -> None:
    program = tmp_path / "fails.py"
    program.write_text(FAILING_SCRIPT)
    command = [sys.executable, str(program), str(small), str(tmp_path / "run")]
    done = launch(command, 2, "mpirun")
    assert done.returncode == 2
    assert done.stderr.count("hvdrec: error: rank 1 on") == 1
    assert "a shard is damaged" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_placement_does_not_change_results(train: Train) -> None:
    """Sharded and replicated tables hold the same rows: only the last digits differ."""
    seen = [
        log(train(2, "horovodrun", "--parallel.placement", placement, *more), "validation")[-1]
        for placement, more in (
            ("replicated", ()),
            ("sharded", ()),
            ("auto", ("--parallel.shard-from-mb", "0.002")),
        )
    ]
    assert abs(seen[1]["log_loss"] - seen[0]["log_loss"]) < 1e-5
    assert abs(seen[2]["log_loss"] - seen[0]["log_loss"]) < 1e-5


@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ("mpirun", ("--parallel.synchronization", "adasum")),
        ("horovodrun", ("--parallel.synchronization", "average", "--parallel.average-every", "3")),
        pytest.param("horovodrun", ("--train.accumulate", "4"), marks=pytest.mark.slow),
        ("horovodrun", ("--train.clip-norm", "0.1", *SHARDED)),
    ],
)
def test_other_synchronizations_learn_as_well(
    train: Train, launcher: str, options: tuple[str, ...]
) -> None:
    usual = log(train(1, ""), "validation")[-1]
    other = log(train(2, launcher, *options), "validation")[-1]
    assert other["step"] == usual["step"]
    assert other["log_loss"] != usual["log_loss"]
    assert abs(other["log_loss"] - usual["log_loss"]) < 0.05
    assert other["auc"] > 0.6


def test_bf16_trains_like_fp32(train: Train) -> None:
    full = log(train(1, ""), "validation")[-1]
    half = log(train(1, "", "--train.precision", "bf16"), "validation")[-1]
    assert half["log_loss"] != full["log_loss"]
    assert abs(half["log_loss"] - full["log_loss"]) < 0.01


@pytest.mark.parametrize(
    ("ranks", "launcher", "more"),
    [
        (1, "", ()),
        pytest.param(3, "horovodrun", SHARDED, marks=pytest.mark.slow),
        (2, "horovodrun", AVERAGED),
        (2, "mpirun", ("--parallel.synchronization", "average", "--parallel.average-every", "4")),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_run_bit_for_bit(
    train: Train, ranks: int, launcher: str, more: tuple[str, ...], tmp_path: Path
) -> None:
    options = ("--train.checkpoint-every", "3", "--train.keep", "99", *more)
    complete = train(ranks, launcher, *options)
    stopped = tmp_path / "stopped"
    shutil.copytree(complete, stopped)
    # As after a crash in step 13, in the second epoch: step 12 has the last complete checkpoint.
    for later in (stopped / "checkpoints").iterdir():
        if later.name > "step-00000012":
            shutil.rmtree(later)
    (stopped / "latest").write_text("step-00000012")
    (stopped / "best").write_text("step-00000010")
    resumed = train(ranks, launcher, *options, "--resume", into=stopped)
    assert log(resumed, "start")[-1]["step"] == 12
    last = "checkpoints/step-00000020"
    files = [path.name for path in (complete / last).glob("*.safetensors")]
    tables = ranks if more[: len(SHARDED)] == SHARDED else 1
    assert len(files) == 2 + tables + (more == AVERAGED)
    for file in files:
        assert (resumed / last / file).read_bytes() == (complete / last / file).read_bytes()
    expected = read_manifest(complete / last, "checkpoint").meta
    assert read_manifest(resumed / last, "checkpoint").meta == {
        **expected,
        "config": {
            **expected["config"],
            "paths": {**expected["config"]["paths"], "run": str(stopped)},
        },
    }


def test_averages_are_validated_and_evaluated(train: Train) -> None:
    options = ("--train.average-decay", "0.9", "--train.average-steps", "1")
    run, plain = train(1, "", *BY_HAND, *options), train(1, "", *BY_HAND)
    validations = log(run, "validation")
    done = launch([HVDREC, "evaluate", str(run), "--json", "--split", "validation"], 1)
    report = json.loads(done.stdout)
    best = max(line["auc"] for line in validations)
    assert report["ranking"]["auc"] == pytest.approx(best, abs=1e-6)
    assert validations[-1]["auc"] != log(plain, "validation")[-1]["auc"]
    # Training does not use the averages.
    assert [line["loss"] for line in log(run, "step")] == [
        line["loss"] for line in log(plain, "step")
    ]


def test_a_warm_start_does_not_depend_on_the_number_of_ranks(train: Train) -> None:
    options = ["--train.warm-start.history", "clicks", "--train.epochs", "0"]
    options += ["--model.tower.hidden", "--model.tower.output", "4", *SHARDED]
    alone, together = (
        log(train(*job, *options), "validation") for job in ((1, ""), (2, "horovodrun"))
    )
    assert len(alone) == len(together) == 1
    assert together[0]["epoch"] == together[0]["step"] == 0
    assert together[0]["auc"] == pytest.approx(alone[0]["auc"], abs=1e-6)


def test_a_run_learns_from_a_teacher(train: Train, small: Path) -> None:
    teacher = train(1, "")
    student = train(2, "horovodrun", "--train.teacher", str(teacher), *SHARDED)
    losses = [log(run, "step")[-1]["ranking_loss"] for run in (teacher, student)]
    assert losses[1] != pytest.approx(losses[0], rel=1e-3)
    into, nothing = teacher.with_name("into"), str(teacher.with_name("nothing"))
    command = [HVDREC, "train", str(small), "--paths.run", str(into), "--train.teacher", nothing]
    done = launch(command, 1)
    assert done.returncode == 2
    assert f"{nothing}: no run here (config.json is missing); train first" in done.stderr
    assert not into.exists()


def test_resuming_with_another_order_of_rows_is_refused(train: Train, small: Path) -> None:
    run = train(1, "")
    command = [HVDREC, "train", str(small), "--paths.run", str(run), "--resume", "--seed", "7"]
    done = launch(command, 1)
    assert done.returncode == 2
    assert "was trained with seed = 0, the configuration says 7; resume with" in done.stderr


def test_a_run_resumes_on_another_number_of_ranks(train: Train, tmp_path: Path) -> None:
    options = ("--train.checkpoint-every", "3", "--train.keep", "99", *SHARDED)
    run = train(2, "horovodrun", *options)
    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped)
    (stopped / "latest").write_text("step-00000012")
    resumed = train(3, "mpirun", "--resume", *SHARDED, into=stopped)
    assert len(list((resumed / "checkpoints/step-00000020").glob("tables-*-of-00003.*"))) == 3
    start = log(resumed, "start")[-1]
    assert (start["step"], start["world_size"]) == (12, 3)
    # 2 of the 10 steps of the second epoch were taken: 4800 - 2 * 512 rows remain, 3 * 171 a step.
    position = read_manifest(resumed / "checkpoints/step-00000020", "checkpoint").meta["position"]
    assert position["finished"]
    assert position["step"] == 12 + -(-(4800 - 1024) // 3 // 171)


def test_evaluation_does_not_depend_on_the_number_of_ranks(train: Train, small: Path) -> None:
    reports = evaluated(train(2, "horovodrun", *SHARDED), (2, "horovodrun"), (3, "mpirun"))
    assert len(reports[0]) > 80


@pytest.mark.slow
def test_tasks_on_several_ranks(small: Path, tmp_path: Path) -> None:
    validations = []
    for ranks, launcher in ((1, ""), (2, "horovodrun")):
        options = ["--paths.run", str(tmp_path / str(ranks)), "--train.precision", "bf16"]
        config = str(small.with_name("tasks.toml"))
        done = launch([HVDREC, "train", config, *options], ranks, launcher)
        assert done.returncode == 0, done.stderr
        validations.append(log(tmp_path / str(ranks), "validation")[-1]["tasks"])
    for name, alone in validations[0].items():
        together = validations[1][name]
        assert together["rows"] == alone["rows"]
        assert abs(together["log_loss"] - alone["log_loss"]) < 0.05
    reports = evaluated(tmp_path / "2", (2, "horovodrun"))
    assert reports[0]["tasks.late.rows"] < reports[0]["tasks.click.rows"]


def evaluated(run: Path, *jobs: tuple[int, str]) -> list[dict[str, float]]:
    """Return a run's reports by one rank and by each job, and check that they are equal."""
    reports = []
    for ranks, launcher in ((1, ""), *jobs):
        done = launch([HVDREC, "evaluate", str(run), "--json"], ranks, launcher)
        assert done.returncode == 0, done.stderr
        line = next(line for line in done.stdout.splitlines() if "{" in line)
        reports.append(flat(json.loads(line[line.index("{") :])))
    for report in reports[1:]:
        assert report.keys() == reports[0].keys()
        for name, value in report.items():
            assert value == pytest.approx(reports[0][name], abs=1e-9), name
    return reports


def flat(report: dict[str, Any], prefix: str = "") -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, value in report.items():
        if isinstance(value, dict):
            numbers |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            numbers[prefix + name] = value
    return numbers


def test_an_error_on_all_ranks_is_printed_once(small: Path, tmp_path: Path) -> None:
    command = [HVDREC, "train", str(small), "--paths.features", str(tmp_path / "none")]
    done = launch([*command, "--paths.run", str(tmp_path / "run")], 2)
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert output.count("no features artifact here") == 1
    assert not (tmp_path / "run").exists()


def test_an_error_on_one_rank_ends_all(tmp_path: Path) -> None:
    output = run_program("run_on_all.py", [], 3).stdout
    assert output.count(f"rank 1 on {socket.gethostname()}: a file is missing") == 3


@pytest.mark.parametrize(
    ("ranks", "launcher", "text"),
    [(2, "horovodrun", "needs MPI on CPUs"), (3, "mpirun", "needs a power of two of ranks")],
)
def test_adasum_is_refused_if_it_cannot_run(
    small: Path, tmp_path: Path, ranks: int, launcher: str, text: str
) -> None:
    command = [HVDREC, "train", str(small), "--paths.run", str(tmp_path / "run")]
    done = launch([*command, "--parallel.synchronization", "adasum"], ranks, launcher)
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count(text) == 1
