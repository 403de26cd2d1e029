"""What the launcher of a job tells its processes, as far as that may be relied on."""

from __future__ import annotations

import http.client
import os

from hvdrec.errors import UserError

LAUNCHER_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
"""Set by horovodrun, Open MPI, and other MPI launchers: they tell that there is one, no more."""
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "HOROVOD_SIZE")
"""How many processes were started: to be compared with what Horovod says, no more."""

RENDEZVOUS_SECONDS = 10.0


def is_launched() -> bool:
    """Return whether a launcher has started this process, as one of several perhaps."""
    return any(name in os.environ for name in LAUNCHER_VARIABLES)


def unseen_processes(size: int) -> tuple[str, str] | None:
    """Return the variable, and how many processes it tells of, where Horovod sees but this one."""
    for name in SIZE_VARIABLES:
        started = os.environ.get(name, "1")
        if size == 1 and started != "1":
            return name, started
    return None


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
