"""The environment variables that launchers set and that Horovod reads, and checks of them."""

from __future__ import annotations

import http.client
import ipaddress
import os
import socket
from pathlib import Path
from typing import Any

import psutil

from hvdrec.errors import UserError, invalid_value

LAUNCHER_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
"""One of these is set if horovodrun or an MPI launcher started the process. The value may be wrong,
so only its presence is checked."""
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "HOROVOD_SIZE")
"""The number of processes that the launcher started; used only to check Horovod's world size."""
BACKEND_VARIABLES = ("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS")
LOCAL_SIZE_VARIABLES = ("HOROVOD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
"""The number of processes that the launcher started on this host."""

DEFAULTS = {"HOROVOD_FUSION_THRESHOLD": "0"}
"""Tensor fusion is off: which tensors it joins depends on timing, so sums over three or more ranks
would differ in the last bit from run to run."""
SHARED_CORE_DEFAULTS = {"OMPI_MCA_mpi_yield_when_idle": "1"}
"""Set if Horovod's thread has no core of its own. By default, Open MPI keeps the core busy while it
waits. Two ranks on two hyperthreads of a core reached 0.70 times the speed of two independent
processes without this setting, and 0.92 times with it."""
GLOO_SHARED_CORE_DEFAULTS = {"HOROVOD_CYCLE_TIME": "2"}
"""Set with Gloo if Horovod's thread has no core of its own. By default Horovod looks for work every
millisecond, and Gloo's transport then nearly fills a core. With 2 ms, the speed rose from 0.72 to
0.76 times that of independent processes. With MPI this is not set, because it made steps 2 %
longer."""
SINGLE_PROCESS_DEFAULTS = {
    "HOROVOD_CYCLE_TIME": "20",  # ms; Horovod's thread has nothing to do, so it should rarely wake
    # With MPI as the controller, Open MPI's daemon would have to be on PATH.
    "HOROVOD_CONTROLLER": "gloo",
    "HOROVOD_CPU_OPERATIONS": "gloo",
}

RENDEZVOUS_SECONDS = 10.0


def is_launched() -> bool:
    """Return True if horovodrun or an MPI launcher started this process."""
    return any(name in os.environ for name in LAUNCHER_VARIABLES)


def set_horovod_defaults() -> None:
    """Set the variables that Horovod reads when it starts, unless the user has set them.

    If this host has fewer than two cores per rank, the variables let Horovod's thread sleep while
    it waits.
    """
    settings = DEFAULTS | ({} if is_launched() else SINGLE_PROCESS_DEFAULTS)
    ranks = next((os.environ[name] for name in LOCAL_SIZE_VARIABLES if name in os.environ), "1")
    if ranks.isdecimal() and int(ranks) > 1 and len(os.sched_getaffinity(0)) < 2 * int(ranks):
        settings |= SHARED_CORE_DEFAULTS
        if _uses_gloo():
            settings |= GLOO_SHARED_CORE_DEFAULTS
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def record_timeline(file: Path) -> None:
    """Let Horovod write its timeline to a file; call this function before Horovod starts.

    Raises:
        UserError: The directory of the file does not exist, or the file cannot be written.
    """
    try:
        file.touch()
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise invalid_value(
            "--horovod-timeline", str(file), problem, "choose another file"
        ) from None
    os.environ["HOROVOD_TIMELINE"] = str(file)


def check_process_count(host: str, size: int) -> None:
    """Raise UserError if the launcher started several processes but Horovod sees only one."""
    for name in SIZE_VARIABLES:
        started = os.environ.get(name, "1")
        if size == 1 and started != "1":
            raise UserError(
                f"{host}: the launcher started {started} processes ({name}) but Horovod sees one; "
                "use the mpirun of the MPI that Horovod was built with, or horovodrun",
                field=name,
                value=started,
            )


def check_gloo_address(host: str) -> None:
    """Check that Gloo, if it is used, can listen on this host's addresses; otherwise Gloo crashes.

    Gloo uses the network interface in HOROVOD_GLOO_IFACE for some connections. For others it uses
    the address to which the host's name resolves, which other hosts must be able to reach.

    Raises:
        UserError: The interface does not exist, or the host's name has no usable address.
    """
    if not _uses_gloo():
        return
    interface = os.environ.get("HOROVOD_GLOO_IFACE", "")
    interfaces = psutil.net_if_addrs()
    if interface and interface not in interfaces:
        raise UserError(
            f"{host}: HOROVOD_GLOO_IFACE = '{interface}': no such network interface; known: "
            f"{', '.join(interfaces)}; set it with horovodrun --network-interfaces",
            field="HOROVOD_GLOO_IFACE",
            value=interface,
        )
    try:
        resolved = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        problem = f"has no address ({error.strerror}), which Gloo needs; add it to /etc/hosts"
        raise UserError(f"{host}: this host's name {problem}", field=host) from None
    local = next((address[0] for family, *_, address in resolved if _can_bind(family, address)), "")
    if not local:
        address = resolved[0][4][0]
        problem = f"has the address {address} of another host; correct it in /etc/hosts"
        raise UserError(f"{host}: this host's name {problem}", field=host, value=address)
    if _spans_hosts() and ipaddress.ip_address(local).is_loopback:
        problem = (
            f"has the address {local}, which other hosts cannot reach; put its network address"
        )
        raise UserError(
            f"{host}: this host's name {problem} into /etc/hosts", field=host, value=local
        )


def check_rendezvous(host: str) -> None:
    """Check that this host can reach the launcher's key-value store, in which Gloo's ranks meet.

    Without this check, Horovod waits for the store forever, or exits silently on a wrong answer.

    Raises:
        UserError: The store does not answer, or another program listens on its port.
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
            f"{host}: cannot reach the rendezvous store at {address}, port {port} ({error}); "
            "another program uses that port, or a firewall blocks it",
            field="HOROVOD_GLOO_RENDEZVOUS_PORT",
            value=port,
        ) from None
    finally:
        store.close()


def _uses_gloo() -> bool:
    return "gloo" in (os.environ.get(name, "").lower() for name in BACKEND_VARIABLES)


def _can_bind(family: int, address: Any) -> bool:
    """Return True if a socket can listen on an address; Gloo tests its address in the same way."""
    try:
        with socket.socket(family) as trial:
            trial.bind(address)
        return True
    except OSError:
        return False


def _spans_hosts() -> bool:
    size = os.environ.get("HOROVOD_SIZE", "1")
    return os.environ.get("HOROVOD_LOCAL_SIZE", size) != size
