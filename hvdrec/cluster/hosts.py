"""Check before a launch that hosts can work in a job.

If a host does not answer or asks for a password, launchers report it late and unclearly.
`check_hosts` connects to each host by ssh, as launchers do, runs ``hvdrec.cluster.probe`` there and
compares its report with the report of this host.
"""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hvdrec.cluster.probe import probe_host
from hvdrec.errors import UserError, invalid_file, invalid_value
from hvdrec.parallel import agreement

CONNECT_SECONDS, ANSWER_SECONDS = 10, 40
CLOCK_SECONDS = 60
"""The largest allowed difference of two hosts' clocks; object stores and shared file systems
compare times of different hosts."""
SSH = ("ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}")
# A host name must not start with a dash, because ssh would take it as an option.
HOST_PATTERN, SLOTS_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9_.-]*", r"([1-9][0-9]*)?"


@dataclass(frozen=True)
class HostCheck:
    """A host, its number of slots (ranks), and its problems; without problems it can join a job."""

    host: str
    slots: int
    problems: tuple[str, ...]


def parse_hosts(text: str) -> dict[str, int]:
    """Return the number of slots of each host.

    `text` is the value of -H for horovodrun and mpirun, such as ``hv1:2,hv2:2``.
    """
    hosts: dict[str, int] = {}
    for part in text.split(","):
        host, _, slots = part.strip().partition(":")
        if not re.fullmatch(HOST_PATTERN, host) or not re.fullmatch(SLOTS_PATTERN, slots):
            raise invalid_value(
                "-H", text, f"'{part}' is not a host", "write host:slots,host:slots"
            )
        if host in hosts:
            raise invalid_value("-H", text, f"'{host}' appears twice", "name each host once")
        hosts[host] = int(slots or 1)
    return hosts


def check_hosts(hosts: Mapping[str, int], paths: Sequence[Path]) -> list[HostCheck]:
    """Check that hosts can work in a job that is launched on this host and reads `paths`.

    Every host must accept ssh from this host without a password, have the same Python environment
    at the same path, see the same content at each of `paths`, and reach this host over the network.
    """
    local = probe_host(0, [str(path) for path in paths])
    missing = [path for path, seen in local["paths"].items() if seen == agreement.MISSING_FILE]
    if missing:
        raise invalid_file(missing[0], f"does not exist on {local['host']}, where this was started")
    with _listening() as port, ThreadPoolExecutor(len(hosts)) as pool:
        problems = pool.map(lambda host: _problems(host, local, port), hosts)
        pairs = zip(hosts.items(), problems, strict=True)
        return [HostCheck(host, slots, tuple(each)) for (host, slots), each in pairs]


def compare_probes(
    local: Mapping[str, Any], remote: Mapping[str, Any], seconds: float
) -> list[str]:
    """Return the problems of another host: differing versions, files or clock, or no network.

    Args:
        local: The result of `probe_host` on this host.
        remote: The result of `probe_host` on the other host.
        seconds: How long the other host took to answer.
    """
    problems = []
    here = local["host"]
    for name, version in remote["versions"].items():
        expected = local["versions"][name]
        if version != expected:
            problems.append(f"{name} {version}, but {expected} on {here}; install the same version")
    for path, seen in remote["paths"].items():
        expected = local["paths"][path]
        if seen == agreement.MISSING_FILE:
            problems.append(f"{path}: does not exist; copy it there, or share it")
        elif seen != expected:
            problems.append(f"{path}: differs from {here} ({seen}, here {expected})")
    if remote["unreached"]:
        problems.append(
            f"cannot connect to {here} ({remote['unreached']}); allow all ports between the hosts"
        )
    offset = remote["time"] - time.time()
    if abs(offset) > CLOCK_SECONDS + seconds:
        problems.append(f"its clock is {offset:+.0f} s off that of {here}; set both by NTP")
    return problems


def explain_ssh(host: str, text: str) -> str:
    """Return the problem and the remedy for the error output `text` of ssh to `host`."""
    output = " ".join(text.split()) or "no message"
    if "Permission denied" in output:
        return f"ssh asks for a password ({output}); ssh-copy-id {host}"
    if "Host key verification failed" in output:
        return f"ssh does not know this host ({output}); ssh {host} once, or ssh-keyscan"
    return f"cannot be reached by ssh ({output})"


def _problems(host: str, local: Mapping[str, Any], port: int) -> list[str]:
    """Run the probe on a host and return the problems of this host."""
    command = [sys.executable, "-m", probe_host.__module__]
    paths = list(local["paths"])
    started = time.monotonic()
    try:
        if _is_local(host):
            done = _run([*command, "0", *paths])
        else:
            remote = shlex.join([*command, str(port), *paths])
            done = _run([*SSH, host, f"cd {shlex.quote(str(Path.cwd()))} && {remote}"])
    except subprocess.TimeoutExpired:
        return [f"no answer within {ANSWER_SECONDS} s after the connection was made"]
    except FileNotFoundError:
        raise UserError(
            "ssh: not installed here; apt-get install openssh-client", field="ssh"
        ) from None
    if done.returncode == 0:
        # Login scripts may print lines before the probe does.
        with suppress(ValueError, IndexError):
            probe = json.loads(done.stdout.splitlines()[-1])
            return compare_probes(local, probe, time.monotonic() - started)
    return [_explain_failure(host, done)]


def _explain_failure(host: str, done: subprocess.CompletedProcess[str]) -> str:
    output = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-1:])
    if done.returncode == 255:
        return explain_ssh(host, done.stderr)
    if "can't cd" in output or "cd:" in output:
        return f"{Path.cwd()}: does not exist; ranks start in the directory of the launcher"
    if done.returncode == 127:
        return f"{sys.executable}: does not exist ({output}); install hvdrec at the same place"
    if "No module named" in output or "ImportError" in output:
        return f"hvdrec is not installed or has another version ({output}); install the same"
    return f"gives no valid answer ({output or f'exit code {done.returncode}'})"


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=CONNECT_SECONDS + ANSWER_SECONDS,
        check=False,
    )


def _is_local(host: str) -> bool:
    """Return True if `host` names this host, which launchers do not reach by ssh."""
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return False
    return any(address == each.address for card in psutil.net_if_addrs().values() for each in card)


@contextmanager
def _listening() -> Iterator[int]:
    """Listen on a free port, close each connection at once, and yield the port."""
    with socket.create_server(("", 0), backlog=128) as server:

        def accept() -> None:
            with suppress(OSError):  # the server was shut down
                while True:
                    server.accept()[0].close()

        threading.Thread(target=accept, daemon=True).start()
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)  # `close` alone does not end a blocked `accept`
