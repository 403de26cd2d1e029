"""What launchers tell, and the store where Gloo's ranks meet."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from hvdrec.errors import UserError
from hvdrec.parallel import environment as launcher
from hvdrec.parallel.environment import (
    ALONE_DEFAULTS,
    BACKEND_VARIABLES,
    DEFAULTS,
    GLOO_SHARED_CORE_DEFAULTS,
    LAUNCHER_VARIABLES,
    LOCAL_SIZE_VARIABLES,
    SHARED_CORE_DEFAULTS,
    check_gloo_address,
    check_rendezvous,
    is_launched,
    set_environment,
    unseen_processes,
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (*launcher.LAUNCHER_VARIABLES, *launcher.SIZE_VARIABLES, *launcher.BACKEND_VARIABLES)
    for name in (*names, "HOROVOD_GLOO_IFACE", "HOROVOD_LOCAL_SIZE"):
        monkeypatch.setenv(name, "")  # so that it is gone at the end, whoever sets it
        monkeypatch.delenv(name)


def test_processes_that_do_not_see_each_other_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_launched()
    assert unseen_processes(1) is None
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert is_launched()
    assert unseen_processes(4) is None
    assert unseen_processes(1) == ("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    assert unseen_processes(1) is None


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Yield the port of a web server that is no store: it takes no PUT."""
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "127.0.0.1")
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_another_program_at_the_rendezvous_is_named(
    store: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", str(store))
    said = rf"hv2: cannot meet the other ranks at 127.0.0.1, port {store} \(status 501\): another"
    with pytest.raises(UserError, match=said):
        check_rendezvous("hv2")


def test_a_rendezvous_that_says_nothing_is_given_up(
    store: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "RENDEZVOUS_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", str(silent.getsockname()[1]))
        with pytest.raises(UserError, match=r"\(timed out\): another program"):
            check_rendezvous("hv2")


def test_horovods_own_store_is_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from horovod.runner.http.http_server import RendezvousServer

    check_rendezvous("hv2")  # none is named
    server = RendezvousServer()
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "127.0.0.1")
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", str(server.start()))
    try:
        check_rendezvous("hv2")
        assert server._httpd.cache["hvdrec"]["hv2"] == b"here"
    finally:
        server.stop()


def test_a_host_whose_name_has_no_address_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    check_gloo_address("no.such.name.invalid")  # MPI does without
    monkeypatch.setenv("HOROVOD_CPU_OPERATIONS", "GLOO")
    with pytest.raises(UserError, match=r"^no\.such\.name\.invalid: this host's own name has no "):
        check_gloo_address("no.such.name.invalid")
    with pytest.raises(UserError, match=r"own name, 192\.0\.2\.1, is another host's; mend it in"):
        check_gloo_address("192.0.2.1")


def test_a_name_that_no_other_host_reaches_is_good_for_one_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOROVOD_CONTROLLER", "gloo")
    check_gloo_address("localhost")
    monkeypatch.setenv("HOROVOD_SIZE", "4")
    monkeypatch.setenv("HOROVOD_LOCAL_SIZE", "4")
    check_gloo_address("127.0.1.1")
    monkeypatch.setenv("HOROVOD_LOCAL_SIZE", "2")
    with pytest.raises(UserError, match=r"own name is 127\.0\.1\.1, where no other host reaches"):
        check_gloo_address("127.0.1.1")


def test_a_network_interface_that_is_not_there_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_CONTROLLER", "gloo")
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "lo")
    check_gloo_address("localhost")
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "eth77")
    with pytest.raises(UserError, match=r"^hv2: there is no network interface 'eth77' \("):
        check_gloo_address("hv2")


@pytest.mark.parametrize("name", ["HOROVOD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"])
def test_horovod_spares_cores_where_ranks_share_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {**SHARED_CORE_DEFAULTS, **GLOO_SHARED_CORE_DEFAULTS}
    for known in (*LAUNCHER_VARIABLES, *LOCAL_SIZE_VARIABLES, *BACKEND_VARIABLES, *DEFAULTS, *both):
        monkeypatch.setenv(known, "")
        monkeypatch.delenv(known)
    set_environment()  # a process alone
    assert {key: os.environ[key] for key in (*DEFAULTS, *ALONE_DEFAULTS)} == {
        **DEFAULTS,
        **ALONE_DEFAULTS,
    }
    monkeypatch.delenv("HOROVOD_CYCLE_TIME")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv(name, "4")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    set_environment()  # a core for each rank and one for its Horovod
    assert not set(both) & set(os.environ)
    assert {key: os.environ[key] for key in DEFAULTS} == DEFAULTS
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(7))
    set_environment()
    assert {key: os.environ.get(key) for key in both} == {
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "HOROVOD_CYCLE_TIME": None,
    }
    monkeypatch.setenv("OMPI_MCA_mpi_yield_when_idle", "0")  # the user's own
    monkeypatch.setenv("HOROVOD_CPU_OPERATIONS", "gloo")
    set_environment()
    assert {key: os.environ[key] for key in both} == {
        "OMPI_MCA_mpi_yield_when_idle": "0",
        "HOROVOD_CYCLE_TIME": "2",
    }
