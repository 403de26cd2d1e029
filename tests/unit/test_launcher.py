"""The patched launcher of Horovod: what shows on command lines, and where it listens."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from horovod.runner import gloo_run
from horovod.runner.common.util.hosts import SlotInfo
from horovod.runner.driver import driver_service
from horovod.runner.http.http_server import RendezvousServer
from horovod.runner.util.remote import get_remote_command_and_env

BUILD = Path(__file__).parents[2] / "scripts" / "build_horovod"
OTHER_HOST = "203.0.113.7"  # reserved for documentation, so not an address of this host
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "not-to-be-seen",
    "TRICKY": 'it\'s "$HOME" `id` \\ not-to-be-seen\nnext line',
}
SSH = """#!/bin/sh
# Stands in for ssh: notes its command line and runs the last argument as another host would.
tr '\\0' '\\n' </proc/$$/cmdline >>"$NOTES"
for last; do :; done
exec env -i PATH="$PATH" NOTES="$NOTES" sh -c "$last"
"""
PROGRAM = """
import os, pathlib
notes = pathlib.Path(os.environ["NOTES"])
with notes.open("a") as file:
    for process in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try: file.write(process.read_bytes().replace(b"\\0", b" ").decode(errors="replace") + "\\n")
        except OSError: pass
notes.with_suffix(".environment").write_text(ascii(sorted(os.environ.items())))
"""


@pytest.mark.parametrize("host", ["localhost", OTHER_HOST])
def test_a_rank_gets_the_environment_but_no_command_line_shows_it(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text(SSH)
    ssh.chmod(0o755)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    notes = tmp_path / "notes"
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("NOTES", str(notes))
    settings = SimpleNamespace(
        elastic=False,
        ssh_port=None,
        ssh_identity_file=None,
        verbose=0,
        output_filename=None,
        num_proc=1,
        prefix_output_with_timestamp=False,
    )
    # Bash exports functions under such names, and has variables that cannot be set.
    environment = {
        **SECRETS,
        "BASH_FUNC_f%%": "() { :; }",
        "a.b": "1",
        "UID": "0",
        "NOTES": str(notes),
    }
    slot = SlotInfo(host, 0, 0, 0, 1, 1, 1)
    command = gloo_run.get_run_command([sys.executable, str(program)], "127.0.0.1", ["lo"], 1)
    line = gloo_run._slot_info_to_command_fn(command, environment)(slot)
    run = gloo_run._exec_command_fn(settings, environment)
    assert run(line, slot, [])[0] == 0
    seen = notes.with_suffix(".environment").read_text()
    for pair in [*SECRETS.items(), ("HOROVOD_RANK", "0"), ("HOROVOD_GLOO_RENDEZVOUS_PORT", "1")]:
        assert ascii(pair) in seen
    assert str(program) in notes.read_text()
    assert "not-to-be-seen" not in notes.read_text()


def test_kubeflow_shows_only_known_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_MCA_plm_rsh_agent", "/etc/mpi/kubexec.sh")
    environment = {**SECRETS, "HOROVOD_CYCLE_TIME": "2", "PATH": "/a:/b"}
    command, _ = get_remote_command_and_env("run me", environment, "pod")
    assert "HOROVOD_CYCLE_TIME=2 PATH=/a:/b" in command
    assert "run me" in command
    assert "not-to-be-seen" not in command


def test_the_launchers_key_is_not_on_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        driver_service.safe_shell_exec,
        "execute",
        lambda command, **more: calls.append((command, more)) or 0,
    )
    monkeypatch.setattr(
        driver_service.threads,
        "execute_function_multithreaded",
        lambda call, arguments, **_: [call(*each) for each in arguments],
    )
    settings = SimpleNamespace(key=b"k" * 32, ssh_port=None, ssh_identity_file=None, verbose=0)
    driver_service._launch_task_servers(["localhost", OTHER_HOST], {"localhost"}, {}, settings)
    secret = driver_service.codec.dumps_base64(settings)
    for command, more in calls:
        assert secret not in command
        assert secret in "".join(more["env"].values())


def test_the_rendezvous_listens_on_one_address() -> None:
    server = RendezvousServer(address="127.0.0.1")
    port = server.start()
    try:
        (listening,) = (
            each
            for each in psutil.Process().net_connections("tcp")
            if each.laddr.port == port and each.status == psutil.CONN_LISTEN
        )
        assert listening.laddr.ip == "127.0.0.1"
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
    finally:
        server.stop()


def patch(packages: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BUILD), "patch", str(packages)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_second_patch_changes_nothing_and_another_release_is_refused(tmp_path: Path) -> None:
    installed = Path(str(find_spec("horovod").origin)).parent  # type: ignore[union-attr]
    copy = tmp_path / "horovod"
    shutil.copytree(installed / "runner", copy / "runner")
    assert patch(tmp_path).returncode == 0
    before = {path: path.read_bytes() for path in copy.rglob("*.py")}
    assert patch(tmp_path).returncode == 0
    assert before == {path: path.read_bytes() for path in copy.rglob("*.py")}
    (copy / "runner" / "gloo_run.py").write_text("another release\n")
    done = patch(tmp_path)
    assert done.returncode == 1
    assert "gloo_run.py: differs" in done.stderr
    assert "scripts/install" in done.stderr
