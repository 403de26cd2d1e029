"""Tests on two hosts: the short form, for every change."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.hosts.machines import HVDREC, LIMIT, TROUBLE, Hosts
from tests.parallel.launch import BIN, launch
from tests.parallel.test_training import flat


def report(text: str) -> dict[str, float]:
    """Return the numbers of the JSON object that evaluate printed."""
    line = next(line for line in text.splitlines() if '{"run"' in line)
    return flat(json.loads(line[line.index("{") :]))


def test_hosts_are_checked_before_a_launch(hosts: Hosts, small: Path) -> None:
    features, keys = small.parent / "work/features", hosts.folder / "ssh/authorized_keys"
    hosts_of = ["-H", "hv1:1,hv2:1"]
    usable = hosts.run(1, [HVDREC, "hosts", *hosts_of, str(small), "--json"])
    assert (usable.status, json.loads(usable.output)["ok"]) == (0, True)

    with hosts.mounted(2, Path("/dev/null"), keys), hosts.mounted(3, None, features):
        checked = hosts.run(
            1, [HVDREC, "hosts", "-H", "hv1,hv2,hv3,10.78.0.99", str(small), "--json"]
        )
    assert checked.status == 2
    checks = {check["host"]: check["problems"] for check in json.loads(checked.output)["hosts"]}
    assert checks["hv1"] == []
    assert [p[:27] for p in checks["hv2"]] == ["ssh asks for a password (ro"]
    assert len(checks["hv3"]) == 1
    assert checks["hv3"][0].startswith(f"{features}: differs from hv1 (a directory, here")
    assert len(checks["10.78.0.99"]) == 1
    assert checks["10.78.0.99"][0].startswith("cannot be reached by ssh (ssh: connect to host")


def test_two_hosts_train_and_evaluate_like_one_process(
    hosts: Hosts, small: Path, tmp_path: Path
) -> None:
    run = str(tmp_path / "run")
    command = [HVDREC, "train", str(small), "--paths.run", run, "--parallel.placement", "sharded"]
    trained = hosts.launch("horovodrun --gloo", 2, command)
    assert trained.status == 0, trained.output
    assert "20 steps on 2 ranks" in trained.output
    evaluated = hosts.launch("mpirun", 2, [HVDREC, "evaluate", run, "--json"])
    assert evaluated.status == 0, evaluated.output
    alone = report(launch([str(BIN / HVDREC), "evaluate", run, "--json"], 1).stdout)
    together = report(evaluated.output)
    assert together.keys() == alone.keys()
    assert together == pytest.approx(alone, abs=1e-9)


@pytest.mark.parametrize(
    ("launcher", "kind", "message"),
    [
        ("horovodrun --gloo", "fail", "rank 1 on hv2: RuntimeError: the sky has fallen"),
        ("mpirun", "stopped", "rank 1 on hv2: no sign of life for 6 s; it is stopped, or its host"),
    ],
)
def test_one_rank_in_trouble_ends_the_job(
    hosts: Hosts, small: Path, tmp_path: Path, launcher: str, kind: str, message: str
) -> None:
    note = tmp_path / "note"
    run = ["train", str(small), "--paths.run", str(tmp_path / "run")]
    silence = ["env", "HVDREC_SILENCE_SECONDS=6"]
    done = hosts.launch(
        launcher, 2, [*silence, str(BIN / "python"), TROUBLE, kind, "1", str(note), *run]
    )
    assert done.status != 0
    assert done.ended - float(note.read_text()) < LIMIT
    assert len(done.complaints) == 1
    assert done.complaints[0].startswith(message)


LOOKING = """
import os, pathlib
seen = any("not-to-be-" + "seen" in path.read_text(errors="replace")
           for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"))
print("has", os.environ.get("SECRET") == "not-to-be-" + "seen", "shown", seen, flush=True)
"""


@pytest.mark.parametrize("launcher", ["horovodrun --gloo", "horovodrun --mpi"])
def test_no_command_line_shows_the_environment(
    launcher: str, hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "looking.py"
    program.write_text(LOOKING)
    monkeypatch.setenv("SECRET", "not-to-be-seen")
    done = hosts.launch(launcher, 2, [str(BIN / "python"), str(program)])
    assert done.status == 0, done.output
    # Open MPI prefixes each part of a line.
    output = re.sub(r"\[\d+,\d+\]<stdout>:", "", done.output)
    assert output.count("has True shown False") == 2, done.output
