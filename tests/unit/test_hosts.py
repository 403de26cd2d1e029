"""The check of hosts before a launch, as far as one host shows it."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from hvdrec import cli
from hvdrec.cluster.hosts import check_hosts, compare, explain_ssh, parse_hosts
from hvdrec.cluster.probe import answer
from hvdrec.errors import UserError


def test_hosts_are_read_as_launchers_read_them() -> None:
    assert parse_hosts("hv1:2,hv2.lan,10.0.0.3:16") == {"hv1": 2, "hv2.lan": 1, "10.0.0.3": 16}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hv1:2,,hv2:2", "'' is no host; write host:slots,host:slots"),
        ("hv1:none", "'hv1:none' is no host"),
        ("hv1:0", "'hv1:0' is no host"),
        ("-oProxyCommand=reboot:1", "'-oProxyCommand=reboot:1' is no host"),
        ("hv1:1,hv1:2", "'hv1' stands there twice"),
    ],
)
def test_what_is_no_host_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_hosts(text)


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
            "torch 2.12.9, but 2.13.0 on hv1; install the same",
        ),
        ({"paths": {"/data": "missing"}}, "/data: is not there; copy it there, or share it"),
        ({"paths": {"/data": "def"}}, "/data: is not the same as on hv1 (def, here abc)"),
        ({"unreached": "10.0.0.1: timed out"}, "cannot connect to hv1 (10.0.0.1: timed out); open"),
        ({"time": time.time() + 3600}, "its clock is +3"),
    ],
)
def test_each_difference_is_a_problem(changes: dict[str, Any], problem: str) -> None:
    found = compare(here(), here(host="hv2", **changes), 1.0)
    assert len(found) == bool(problem)
    assert "".join(found).startswith(problem)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("me@hv2: Permission denied (publickey).\n", "ssh asks for a password (me@hv2: Permission"),
        ("Host key verification failed.", "ssh does not know this host"),
        ("ssh: connect to host hv2 port 22: No route to host", "cannot be reached by ssh (ssh: "),
        ("", "cannot be reached by ssh (it says nothing)"),
    ],
)
def test_what_ssh_says_is_explained(text: str, said: str) -> None:
    assert explain_ssh("hv2", text).startswith(said)


def test_this_host_is_fit_without_ssh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hvdrec.cluster.hosts.SSH", ("false",))
    (check,) = check_hosts({"localhost": 2}, [tmp_path])
    assert (check.host, check.slots, check.problems) == ("localhost", 2, ())
    with pytest.raises(SystemExit) as ended:
        cli.main(["hosts", "-H", "127.0.0.1:4", str(tmp_path), "--json"])
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"ok": True, "hosts": [{"host": "127.0.0.1", "slots": 4, "problems": []}]}


def test_a_path_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none: is not there on .*, where this was started"):
        check_hosts({"localhost": 1}, [tmp_path / "none"])


def test_problems_are_lines_and_the_status_is_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse = ("sh", "-c", "echo 'Permission denied (publickey).' >&2; exit 255", "ssh")
    monkeypatch.setattr("hvdrec.cluster.hosts.SSH", refuse)
    with pytest.raises(SystemExit) as ended:
        cli.main(["hosts", "-H", "198.51.100.1:1,localhost:1,198.51.100.2:1"])
    assert ended.value.code == 2
    told = "ssh asks for a password (Permission denied (publickey).); ssh-copy-id"
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{host}: {told} {host}" for host in ("198.51.100.1", "198.51.100.2")]


def test_a_host_tells_whether_it_reaches_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "127.0.0.1 50000 127.0.0.1 22")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert answer(port, [])["unreached"] == ""
    assert answer(port, [])["unreached"] == "127.0.0.1: Connection refused"
    assert answer(0, [])["unreached"] == ""
