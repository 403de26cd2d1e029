"""Tests that results do not depend on the hosts: the long form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hvdrec.storage.artifacts import read_manifest
from tests.hosts.machines import HVDREC, Hosts
from tests.hosts.test_two_hosts import report
from tests.parallel.launch import BIN, launch

LAUNCHERS = ("horovodrun --gloo", "horovodrun --mpi", "mpirun")
TRAIN = (
    *("--train.epochs", "6", "--train.batch-size", "1024", "--train.log-every", "50"),
    *("--model.ranker.dropout", "0", "--loader.shuffle-rows", "20000"),
)


@pytest.mark.timeout(900)
def test_the_auc_does_not_depend_on_the_number_of_hosts(
    hosts: Hosts, large: Path, tmp_path: Path
) -> None:
    auc = {}
    jobs = [("alone", 1), *((launcher, 2) for launcher in LAUNCHERS), ("horovodrun --gloo", 3)]
    for launcher, count in [*jobs, ("mpirun", 3)]:
        run = str(tmp_path / f"{launcher} on {count}")
        command = [HVDREC, "train", str(large), "--paths.run", run, *TRAIN]
        if count == 1:
            status = launch([str(BIN / HVDREC), *command[1:]], 1).returncode
        else:
            status = hosts.launch(launcher, count, command).status
        assert status == 0, run
        done = launch([str(BIN / HVDREC), "evaluate", run, "--json", "--no-baselines"], 1)
        auc[run] = report(done.stdout)["ranking.auc"]
    print(json.dumps(auc, indent=1))
    assert min(auc.values()) > 0.83
    assert max(auc.values()) - min(auc.values()) < 0.002


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_sharded_tables_are_written_by_all_hosts_and_resumed_on_fewer(
    hosts: Hosts, small: Path, tmp_path: Path, launcher: str
) -> None:
    run = tmp_path / "run"
    command = [HVDREC, "train", str(small), "--paths.run", str(run)]
    sharded = ("--parallel.placement", "sharded", "--train.checkpoint-every", "5")
    done = hosts.launch(launcher, 3, [*command, *sharded])
    assert done.status == 0, done.output
    assert len(list((run / "checkpoints/step-00000020").glob("tables-*-of-00003.*"))) == 3
    (run / "latest").write_text("step-00000015")
    done = hosts.launch(launcher, 2, [*command, *sharded, "--resume"])
    assert done.status == 0, done.output
    assert list(run.glob("checkpoints/*/tables-*-of-00002.*"))
    assert not list(run.glob(".seen-*"))


@pytest.mark.parametrize("count", [2, 3])
def test_hosts_evaluate_and_export_like_one_process(
    hosts: Hosts, small: Path, tmp_path: Path, count: int
) -> None:
    run = str(tmp_path / "run")
    trained = launch([str(BIN / HVDREC), "train", str(small), "--paths.run", run], 1)
    assert trained.returncode == 0, trained.stderr
    alone = report(launch([str(BIN / HVDREC), "evaluate", run, "--json"], 1).stdout)
    for launcher in LAUNCHERS:
        done = hosts.launch(launcher, count, [HVDREC, "evaluate", run, "--json"])
        assert done.status == 0, done.output
        assert report(done.output) == pytest.approx(alone, abs=1e-9)
    export = ["export", run, "--to"]
    done_alone = launch([str(BIN / HVDREC), *export, str(tmp_path / "alone"), "--workers", "1"], 1)
    assert done_alone.returncode == 0, done_alone.stderr
    done = hosts.launch("mpirun", count, [HVDREC, *export, str(tmp_path / "hosts")])
    assert done.status == 0, done.output
    files = [read_manifest(tmp_path / name, "bundle").files for name in ("alone", "hosts")]
    assert files[0] == files[1]
