"""Whether hosts are fit for a job, asked before it is launched.

Launchers tell little and late of a host that does not answer, or of an ssh that asks for a
password. This asks each host by ssh, as they do, what `agreement` says of it.
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

from hvdrec.cluster.probe import answer
from hvdrec.errors import UserError
from hvdrec.parallel import agreement

CONNECT_SECONDS, ANSWER_SECONDS = 10, 40
CLOCK_SECONDS = 60
"""How far clocks may be apart: stores and file systems compare times."""
SSH = ("ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}")


@dataclass(frozen=True)
class HostCheck:
    """What is wrong with a host; nothing if it is fit."""

    host: str
    slots: int
    problems: tuple[str, ...]


def parse_hosts(text: str) -> dict[str, int]:
    """Return the slots of each host of ``hv1:2,hv2:2``, as horovodrun and mpirun take them."""
    found: dict[str, int] = {}
    for part in text.split(","):
        host, _, slots = part.strip().partition(":")
        # A name that starts with a dash would be an option of ssh.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", host) or not re.fullmatch(
            r"([1-9][0-9]*)?", slots
        ):
            raise UserError(f"-H {text}: '{part}' is no host; write host:slots,host:slots")
        if host in found:
            raise UserError(f"-H {text}: '{host}' stands there twice")
        found[host] = int(slots or 1)
    return found


def check_hosts(hosts: Mapping[str, int], paths: Sequence[Path]) -> list[HostCheck]:
    """Return what keeps hosts from working in a job that is launched here and reads paths.

    Every host must let this one in without a password, have this Python with the same versions at
    the same place, see the same at each path, and reach this host over the network.
    """
    here = answer(0, [str(path) for path in paths])
    missing = [path for path, seen in here["paths"].items() if seen == agreement.MISSING_FILE]
    if missing:
        raise UserError(f"{missing[0]}: is not there on {here['host']}, where this was started")
    with _listening() as port, ThreadPoolExecutor(len(hosts)) as pool:
        found = pool.map(lambda host: _problems(host, here, port), hosts)
        return [
            HostCheck(host, slots, tuple(problems))
            for (host, slots), problems in zip(hosts.items(), found, strict=True)
        ]


def compare(here: Mapping[str, Any], there: Mapping[str, Any], seconds: float) -> list[str]:
    """Return what is wrong with a host's answer, which took some seconds, beside this host's."""
    problems = []
    for name, version in there["versions"].items():
        mine = here["versions"][name]
        if version != mine:
            problems.append(f"{name} {version}, but {mine} on {here['host']}; install the same")
    for path, seen in there["paths"].items():
        mine = here["paths"][path]
        if seen == agreement.MISSING_FILE:
            problems.append(f"{path}: is not there; copy it there, or share it")
        elif seen != mine:
            problems.append(f"{path}: is not the same as on {here['host']} ({seen}, here {mine})")
    if there["unreached"]:
        problems.append(
            f"cannot connect to {here['host']} ({there['unreached']}); open the network between "
            "them for all ports"
        )
    apart = there["time"] - time.time()
    if abs(apart) > CLOCK_SECONDS + seconds:
        problems.append(f"its clock is {apart:+.0f} s off that of {here['host']}; set both by NTP")
    return problems


def explain_ssh(host: str, text: str) -> str:
    """Return what an ssh that did not get in said, and what helps."""
    said = " ".join(text.split()) or "it says nothing"
    if "Permission denied" in said:
        return f"ssh asks for a password ({said}); ssh-copy-id {host}"
    if "Host key verification failed" in said:
        return f"ssh does not know this host ({said}); ssh {host} once, or ssh-keyscan"
    return f"cannot be reached by ssh ({said})"


def _problems(host: str, here: Mapping[str, Any], port: int) -> list[str]:
    """Ask one host, and return what is wrong with it."""
    command = [sys.executable, "-m", answer.__module__]
    paths = list(here["paths"])
    started = time.monotonic()
    try:
        if _is_local(host):
            asked = _run([*command, "0", *paths])
        else:
            there = (
                f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join([*command, str(port), *paths])}"
            )
            asked = _run([*SSH, host, there])
    except subprocess.TimeoutExpired:
        return [f"no answer within {ANSWER_SECONDS} s after the connection was made"]
    except FileNotFoundError:
        raise UserError("ssh: not installed here (apt-get install openssh-client)") from None
    if asked.returncode == 0:
        # Whatever a login script prints comes first.
        with suppress(ValueError, IndexError):
            return compare(
                here, json.loads(asked.stdout.splitlines()[-1]), time.monotonic() - started
            )
    said = " ".join((asked.stderr.strip() or asked.stdout.strip()).splitlines()[-1:])
    if asked.returncode == 255:
        return [explain_ssh(host, asked.stderr)]
    if "can't cd" in said or "cd:" in said:
        return [f"{Path.cwd()}: is not there, where this was started; ranks start in it"]
    if asked.returncode == 127:
        return [f"{sys.executable}: is not there ({said}); install hvdrec at the same place"]
    if "No module named" in said:
        return [f"hvdrec is not installed or another version ({said}); install the same"]
    return [f"does not answer what it was asked ({said or f'exit {asked.returncode}'})"]


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
    """Return whether a name is this host's, as launchers tell: they do without ssh then."""
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return False
    mine = (each.address for each_list in psutil.net_if_addrs().values() for each in each_list)
    return address in mine


@contextmanager
def _listening() -> Iterator[int]:
    """Yield a port on which whoever connects is let in, and out again."""
    with socket.create_server(("", 0), backlog=128) as server:

        def take() -> None:
            with suppress(OSError):  # closed
                while True:
                    server.accept()[0].close()

        threading.Thread(target=take, daemon=True).start()
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)  # a close alone does not end a wait
