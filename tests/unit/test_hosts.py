"""Tests of the check of hosts before a launch, as far as one host allows."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from hvdrec import cli
from hvdrec.cluster.hosts import check_hosts, compare_probes, explain_ssh, parse_hosts
from hvdrec.cluster.probe import probe_host
from hvdrec.errors import UserError


def test_hosts_have_the_format_of_launchers() -> None:
    assert parse_hosts("hv1:2,hv2.lan,10.0.0.3:16") == {"hv1": 2, "hv2.lan": 1, "10.0.0.3": 16}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hv1:2,,hv2:2", "'' is not a host; write host:slots,host:slots"),
        ("hv1:none", "'hv1:none' is not a host"),
        ("hv1:0", "'hv1:0' is not a host"),
        ("-oProxyCommand=reboot:1", "'-oProxyCommand=reboot:1' is not a host"),
        ("hv1:1,hv1:2", "'hv1' appears twice"),
    ],
)
def test_invalid_hosts_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse_hosts(text)
    assert (error.value.field, error.value.value) == ("-H", text)


def here(**changes: Any) -> dict[str, Any]:
    facts = {
        "host": "hv1",
        "versions": {"hvdrec": "1.0", "torch": "2.13.0"},
        "time": time.time(),
        "paths": {"/data": "abc"},
        "unreached": "",
    }
    return {**facts, **changes}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""),
        (
            {"versions": {"hvdrec": "1.0", "torch": "2.12.9"}},
            "torch 2.12.9, but 2.13.0 on hv1; install the same version",
        ),
        ({"paths": {"/data": "missing"}}, "/data: does not exist; copy it there, or share it"),
        ({"paths": {"/data": "def"}}, "/data: differs from hv1 (def, here abc)"),
        (
            {"unreached": "10.0.0.1: timed out"},
            "cannot connect to hv1 (10.0.0.1: timed out); allow",
        ),
        ({"time": time.time() + 3600}, "its clock is +3"),
    ],
)
def test_each_difference_is_a_problem(changes: dict[str, Any], problem: str) -> None:
    problems = compare_probes(here(), here(host="hv2", **changes), 1.0)
    assert len(problems) == bool(problem)
    assert "".join(problems).startswith(problem)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("me@hv2: Permission denied (publickey).\n", "ssh asks for a password (me@hv2: Permission"),
        ("Host key verification failed.", "ssh does not know this host"),
        ("ssh: connect to host hv2 port 22: No route to host", "cannot be reached by ssh (ssh: "),
        ("", "cannot be reached by ssh (no message)"),
    ],
)
def test_errors_of_ssh_are_explained(text: str, message: str) -> None:
    assert explain_ssh("hv2", text).startswith(message)


def test_this_host_is_checked_without_ssh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hvdrec.cluster.hosts.SSH", ("false",))
    (check,) = check_hosts({"localhost": 2}, [tmp_path])
    assert (check.host, check.slots, check.problems) == ("localhost", 2, ())
    with pytest.raises(SystemExit) as ended:
        cli.main(["hosts", "-H", "127.0.0.1:4", str(tmp_path), "--json"])
    assert ended.value.code == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {"ok": True, "hosts": [{"host": "127.0.0.1", "slots": 4, "problems": []}]}


def test_a_missing_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none: does not exist on .*, where this was started"):
        check_hosts({"localhost": 1}, [tmp_path / "none"])


def test_problems_are_lines_and_the_exit_code_is_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse = ("sh", "-c", "echo 'Permission denied (publickey).' >&2; exit 255", "ssh")
    monkeypatch.setattr("hvdrec.cluster.hosts.SSH", refuse)
    with pytest.raises(SystemExit) as ended:
        cli.main(["hosts", "-H", "198.51.100.1:1,localhost:1,198.51.100.2:1"])
    assert ended.value.code == 2
    problem = "ssh asks for a password (Permission denied (publickey).); ssh-copy-id"
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{host}: {problem} {host}" for host in ("198.51.100.1", "198.51.100.2")]


def test_a_host_reports_whether_it_reaches_the_asking_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "127.0.0.1 50000 127.0.0.1 22")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert probe_host(port, [])["unreached"] == ""
    assert probe_host(port, [])["unreached"] == "127.0.0.1: Connection refused"
    assert probe_host(0, [])["unreached"] == ""
