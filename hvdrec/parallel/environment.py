"""What the launcher of a job tells its processes, as far as that may be relied on."""

from __future__ import annotations

import http.client
import ipaddress
import os
import socket
from typing import Any

import psutil

from hvdrec.errors import UserError

LAUNCHER_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
"""Set by horovodrun, Open MPI, and other MPI launchers: they tell that there is one, no more."""
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "HOROVOD_SIZE")
"""How many processes were started: to be compared with what Horovod says, no more."""

BACKEND_VARIABLES = ("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS")

LOCAL_SIZE_VARIABLES = ("HOROVOD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
"""How many processes were started on this host."""
DEFAULTS = {"HOROVOD_FUSION_THRESHOLD": "0"}
"""Horovod's, for all jobs: messages are not joined by chance, so sums repeat to the last bit."""
SHARED_CORE_DEFAULTS = {"OMPI_MCA_mpi_yield_when_idle": "1"}
"""For Horovod's thread where it has no core of its own: Open MPI's waiting would keep one busy.
Two ranks on two hyperthreads of one core came from 0.70 to 0.92 of the speed of two processes
alone."""
GLOO_SHARED_CORE_DEFAULTS = {"HOROVOD_CYCLE_TIME": "2"}
"""The same for Gloo, whose transport nearly fills a core if Horovod looks for work every
millisecond, as it does by default: from 0.72 to 0.76. Under MPI steps became 2 % longer with it."""

ALONE_DEFAULTS = {"HOROVOD_CYCLE_TIME": "20"}
"""For a process alone, whose Horovod thread has nothing to do: to be woken seldom, in ms."""

RENDEZVOUS_SECONDS = 10.0


def is_launched() -> bool:
    """Return whether a launcher has started this process, as one of several perhaps."""
    return any(name in os.environ for name in LAUNCHER_VARIABLES)


def set_environment() -> None:
    """Set what Horovod reads when it starts; what the environment already says stands.

    Where ranks have not at least two cores each, Horovod is to wait without keeping a core busy.
    """
    settings = DEFAULTS | ({} if is_launched() else ALONE_DEFAULTS)
    ranks = next((os.environ[name] for name in LOCAL_SIZE_VARIABLES if name in os.environ), "1")
    if ranks.isdecimal() and int(ranks) > 1 and len(os.sched_getaffinity(0)) < 2 * int(ranks):
        settings |= SHARED_CORE_DEFAULTS
        if _has_gloo():
            settings |= GLOO_SHARED_CORE_DEFAULTS
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _has_gloo() -> bool:
    return "gloo" in (os.environ.get(name, "").lower() for name in BACKEND_VARIABLES)


def unseen_processes(size: int) -> tuple[str, str] | None:
    """Return the variable, and how many processes it tells of, where Horovod sees but this one."""
    for name in SIZE_VARIABLES:
        started = os.environ.get(name, "1")
        if size == 1 and started != "1":
            return name, started
    return None


def check_gloo_address(host: str) -> None:
    """Raise UserError unless Gloo, where it is used, finds addresses to listen at.

    It crashes without them. Some of its connections take the interface in HOROVOD_GLOO_IFACE;
    others always take the address of the host's name, which other hosts must then be able to reach.
    """
    if not _has_gloo():
        return
    interface = os.environ.get("HOROVOD_GLOO_IFACE", "")
    known = psutil.net_if_addrs()
    if interface and interface not in known:
        raise UserError(
            f"{host}: there is no network interface '{interface}' (HOROVOD_GLOO_IFACE); there are "
            f"{', '.join(known)}: horovodrun takes --network-interfaces"
        )
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(
            f"{host}: this host's own name has no address ({error.strerror}), and Gloo needs one; "
            "add it to /etc/hosts"
        ) from None
    own = next((address[0] for family, *_, address in found if _is_own(family, address)), None)
    if own is None:
        raise UserError(
            f"{host}: the address of this host's own name, {found[0][4][0]}, is another host's; "
            "mend it in /etc/hosts"
        )
    if _is_one_of_several_hosts() and ipaddress.ip_address(own).is_loopback:
        raise UserError(
            f"{host}: the address of this host's own name is {own}, where no other host reaches "
            "it; put its address in the network into /etc/hosts"
        )


def _is_own(family: int, address: Any) -> bool:
    """Return whether an address is one of this host, as Gloo finds out."""
    try:
        with socket.socket(family) as trial:
            trial.bind(address)
        return True
    except OSError:
        return False


def _is_one_of_several_hosts() -> bool:
    size = os.environ.get("HOROVOD_SIZE", "1")
    return os.environ.get("HOROVOD_LOCAL_SIZE", size) != size


def check_rendezvous(host: str) -> None:
    """Raise UserError unless this host reaches the launcher's store, where Gloo's ranks meet.

    Horovod asks that store without a limit of time, and ends without a word on a wrong answer.
    """
    address = os.environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR")
    port = os.environ.get("HOROVOD_GLOO_RENDEZVOUS_PORT", "")
    if address is None or not port.isdecimal():
        return
    store = http.client.HTTPConnection(address, int(port), timeout=RENDEZVOUS_SECONDS)
    try:
        store.request("PUT", f"/hvdrec/{host}", b"here")
        status = store.getresponse().status
        if status != http.client.OK:
            raise http.client.HTTPException(f"status {status}")
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"{host}: cannot meet the other ranks at {address}, port {port} ({error}): another "
            "program has taken that port, or a firewall closes it"
        ) from None
    finally:
        store.close()
