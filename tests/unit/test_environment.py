"""Tests of launcher variables, Gloo's addresses and its rendezvous store."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from hvdrec.errors import UserError
from hvdrec.parallel import environment
from hvdrec.parallel.environment import (
    BACKEND_VARIABLES,
    DEFAULTS,
    GLOO_SHARED_CORE_DEFAULTS,
    LAUNCHER_VARIABLES,
    LOCAL_SIZE_VARIABLES,
    SHARED_CORE_DEFAULTS,
    SINGLE_PROCESS_DEFAULTS,
    check_gloo_address,
    check_process_count,
    check_rendezvous,
    is_launched,
    set_horovod_defaults,
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (
        *environment.LAUNCHER_VARIABLES,
        *environment.SIZE_VARIABLES,
        *environment.BACKEND_VARIABLES,
    )
    for name in (*names, "HOROVOD_GLOO_IFACE", "HOROVOD_LOCAL_SIZE"):
        monkeypatch.setenv(name, "")  # so that monkeypatch removes it at the end
        monkeypatch.delenv(name)


def test_processes_that_horovod_does_not_see_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_launched()
    check_process_count("hv2", 1)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert is_launched()
    check_process_count("hv2", 4)
    with pytest.raises(UserError, match=r"^hv2: the launcher started 4 processes") as error:
        check_process_count("hv2", 1)
    assert (error.value.field, error.value.value) == ("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    check_process_count("hv2", 1)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Yield the port of a web server that does not accept PUT, unlike the store."""
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "127.0.0.1")
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_another_program_on_the_rendezvous_port_is_reported(
    store: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", str(store))
    message = rf"^hv2: .* at 127.0.0.1, port {store} \(status 501\); another program"
    with pytest.raises(UserError, match=message):
        check_rendezvous("hv2")


def test_a_silent_rendezvous_times_out(store: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "RENDEZVOUS_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", str(silent.getsockname()[1]))
        with pytest.raises(UserError, match=r"\(timed out\); another program"):
            check_rendezvous("hv2")


def test_horovods_own_store_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    from horovod.runner.http.http_server import RendezvousServer

    check_rendezvous("hv2")  # no store is configured
    server = RendezvousServer()
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "127.0.0.1")
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", str(server.start()))
    try:
        check_rendezvous("hv2")
        assert server._httpd.cache["hvdrec"]["hv2"] == b"here"
    finally:
        server.stop()


def test_gloo_needs_an_address_for_the_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    check_gloo_address("no.such.name.invalid")  # MPI does not need one
    monkeypatch.setenv("HOROVOD_CPU_OPERATIONS", "GLOO")
    with pytest.raises(UserError, match=r"^no\.such\.name\.invalid: .* has no address"):
        check_gloo_address("no.such.name.invalid")
    with pytest.raises(UserError, match=r"192\.0\.2\.1 of another host; correct it in"):
        check_gloo_address("192.0.2.1")


def test_a_loopback_address_is_refused_on_several_hosts_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOROVOD_CONTROLLER", "gloo")
    check_gloo_address("localhost")
    monkeypatch.setenv("HOROVOD_SIZE", "4")
    monkeypatch.setenv("HOROVOD_LOCAL_SIZE", "4")
    check_gloo_address("127.0.1.1")
    monkeypatch.setenv("HOROVOD_LOCAL_SIZE", "2")
    with pytest.raises(UserError, match=r"127\.0\.1\.1, which other hosts cannot reach"):
        check_gloo_address("127.0.1.1")


def test_an_unknown_network_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_CONTROLLER", "gloo")
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "lo")
    check_gloo_address("localhost")
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "eth77")
    with pytest.raises(UserError, match=r"^hv2: .*no such network interface.*lo") as error:
        check_gloo_address("hv2")
    assert (error.value.field, error.value.value) == ("HOROVOD_GLOO_IFACE", "eth77")


@pytest.mark.parametrize("name", ["HOROVOD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"])
def test_horovod_does_not_spin_on_shared_cores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both = {**SHARED_CORE_DEFAULTS, **GLOO_SHARED_CORE_DEFAULTS}
    for known in (*LAUNCHER_VARIABLES, *LOCAL_SIZE_VARIABLES, *BACKEND_VARIABLES, *DEFAULTS, *both):
        monkeypatch.setenv(known, "")
        monkeypatch.delenv(known)
    set_horovod_defaults()  # a single process
    assert {key: os.environ[key] for key in (*DEFAULTS, *SINGLE_PROCESS_DEFAULTS)} == {
        **DEFAULTS,
        **SINGLE_PROCESS_DEFAULTS,
    }
    for variable in SINGLE_PROCESS_DEFAULTS:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv(name, "4")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    set_horovod_defaults()  # one core for each rank and one for its Horovod thread
    assert not set(both) & set(os.environ)
    assert {key: os.environ[key] for key in DEFAULTS} == DEFAULTS
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(7))
    set_horovod_defaults()
    assert {key: os.environ.get(key) for key in both} == {
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "HOROVOD_CYCLE_TIME": None,
    }
    monkeypatch.setenv("OMPI_MCA_mpi_yield_when_idle", "0")  # set by the user
    monkeypatch.setenv("HOROVOD_CPU_OPERATIONS", "gloo")
    set_horovod_defaults()
    assert {key: os.environ[key] for key in both} == {
        "OMPI_MCA_mpi_yield_when_idle": "0",
        "HOROVOD_CYCLE_TIME": "2",
    }


def test_horovods_settings_for_one_process_do_not_reach_later_child_processes() -> None:
    program = (
        "import os\n"
        "from hvdrec.parallel import environment, ranks\n"
        "assert ranks.init().size == 1\n"
        "print(sorted(environment.SINGLE_PROCESS_DEFAULTS.keys() & os.environ.keys()))\n"
    )
    names = {name: value for name, value in os.environ.items() if "HOROVOD" not in name}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=names,
    )
    assert done.stdout == "[]\n"
