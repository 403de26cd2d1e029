"""Tests that every problem of a host or rank is named and ends the job: the long form."""

from __future__ import annotations

import importlib.metadata
import json
import re
import time
from pathlib import Path

import pytest

import hvdrec
from tests.hosts.machines import HVDREC, LIMIT, TROUBLE, Done, Hosts
from tests.parallel.launch import BIN

LAUNCHERS = ("horovodrun --gloo", "horovodrun --mpi", "mpirun")
EVERY = pytest.mark.parametrize("launcher", LAUNCHERS)
LOST = "no sign of life for 25 s; it is stopped, or its host or network is down"
GONE = "ended without an error message; it was killed or it crashed"


@pytest.fixture
def train(small: Path, tmp_path: Path) -> list[str]:
    return [HVDREC, "train", str(small), "--paths.run", str(tmp_path / "run")]


def expect(done: Done, since: float, line: str) -> None:
    """Fail unless a job failed soon with one error line of hvdrec that starts with `line`."""
    print(f"{done.ended - since:.1f} s: {done.complaints}")
    assert done.status != 0
    assert done.ended - since < LIMIT
    assert len(done.complaints) == 1, done.output
    assert done.complaints[0].startswith(line), done.output


# ---------------------------------------------------------------------------- before training


@EVERY
def test_versions_differ(hosts: Hosts, train: list[str], tmp_path: Path, launcher: str) -> None:
    torch = next(
        Path(str(file.locate()))
        for file in importlib.metadata.files("torch") or ()
        if file.name == "METADATA" and ".dist-info" in str(file)
    )
    other_torch = tmp_path / "METADATA"
    other_torch.write_text(re.sub(r"(?m)^Version: .*", "Version: 2.12.9", torch.read_text()))
    init = Path(hvdrec.__file__)
    other_init = tmp_path / "init.py"
    other_init.write_text(re.sub(r"__version__ = .*", '__version__ = "0.0.9"', init.read_text()))
    started = time.time()
    with hosts.mounted(2, other_torch, torch), hosts.mounted(3, other_init, init):
        done = hosts.launch(launcher, 3, train)
    expect(done, started, f"versions differ: hvdrec = {hvdrec.__version__} (source ")
    message = done.complaints[0]
    assert " (ranks 0 on hv1 and 1 on hv2), 0.0.9 (source " in message
    assert "torch = 2.13.0" in message
    assert " (ranks 0 on hv1 and 2 on hv3), 2.12.9 (rank 1 on hv2); install the same" in message
    assert "Horovod" not in message
    if launcher != "horovodrun --gloo":
        assert done.status == 2
    assert not (tmp_path / "run").exists()


@EVERY
def test_configurations_differ(
    hosts: Hosts, small: Path, train: list[str], tmp_path: Path, launcher: str
) -> None:
    other = tmp_path / "other.toml"
    other.write_text(small.read_text().replace("batch_size = 512", "batch_size = 256"))
    started = time.time()
    with hosts.mounted(2, other, small):
        done = hosts.launch(launcher, 2, train)
    expect(
        done,
        started,
        "configurations differ: train.batch_size = 512 (rank 0 on hv1), 256 (rank 1 on hv2); ",
    )
    with hosts.mounted(2, Path("/dev/null"), small):
        started = time.time()
        done = hosts.launch(launcher, 2, train)
    expect(done, started, f"rank 1 on hv2: {small}: ")


@EVERY
def test_data_differ(
    hosts: Hosts, small: Path, train: list[str], tmp_path: Path, launcher: str
) -> None:
    features = small.parent / "work/features"
    with hosts.mounted(3, None, features):
        started = time.time()
        done = hosts.launch(launcher, 3, train)
    expect(done, started, f"rank 2 on hv3: {features}: no features artifact here")
    shard = features / "train/shard-00002.parquet"
    with hosts.mounted(2, Path("/dev/null"), shard):
        started = time.time()
        done = hosts.launch(launcher, 3, train)
    expect(done, started, f"rank 1 on hv2: {shard}: ")
    manifest = features / "manifest.json"
    other = tmp_path / "manifest.json"
    other.write_text(manifest.read_text().replace('"kind"', ' "kind"', 1))
    with hosts.mounted(3, other, manifest):
        started = time.time()
        done = hosts.launch(launcher, 3, train)
    expect(done, started, f"{features}: differs between hosts: ")
    assert not (tmp_path / "run").exists()


@EVERY
def test_run_directories_are_not_shared(
    hosts: Hosts, small: Path, tmp_path: Path, launcher: str
) -> None:
    shared = tmp_path / "runs"
    shared.mkdir()
    train = [HVDREC, "train", str(small), "--paths.run", str(shared / "run")]
    with hosts.mounted(2, None, shared):
        started = time.time()
        done = hosts.launch(launcher, 2, [*train, "--parallel.placement", "sharded"])
        expect(done, started, f"rank 1 on hv2: {shared / 'run'}: is not the directory of rank 0; ")
        assert list(shared.iterdir()) == []
        # Only rank 0 writes replicated tables, so the other ranks need not see them.
        done = hosts.launch(launcher, 2, train)
        assert done.status == 0, done.output
        started = time.time()
        done = hosts.launch(launcher, 2, [*train, "--resume"])
        expect(done, started, f"rank 1 on hv2: {shared / 'run'}: is not the directory of rank 0; ")
        started = time.time()
        done = hosts.launch(launcher, 2, [HVDREC, "evaluate", str(shared / "run")])
        expect(done, started, f"rank 1 on hv2: {shared / 'run'}: no run here")


@pytest.mark.parametrize("port", [0, 1])
def test_the_port_of_the_rendezvous_is_taken_or_closed(
    hosts: Hosts, train: list[str], port: int
) -> None:
    """Ranks are started by hand, because horovodrun picks a free port itself."""
    listen = (
        "import socket, subprocess, sys;"
        "taken = socket.create_server(('10.78.0.1', 0));"
        "port = taken.getsockname()[1] if sys.argv[1] == '0' else 9;"
        "sys.exit(subprocess.run(["
        "'env', f'HOROVOD_GLOO_RENDEZVOUS_PORT={port}', *sys.argv[2:]]).returncode)"
    )
    by_hand = {
        **{"HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.78.0.1", "HOROVOD_CONTROLLER": "gloo"},
        **{"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2", "HOROVOD_CPU_OPERATIONS": "gloo"},
    }
    started = time.time()
    setting = [f"{name}={value}" for name, value in by_hand.items()]
    command = [str(BIN / "python"), "-c", listen, str(port), *setting, *train]
    expect(
        hosts.run(1, command), started, "hv1: cannot reach the rendezvous store at 10.78.0.1, port "
    )


def test_a_port_of_open_mpi_is_taken(hosts: Hosts, train: list[str]) -> None:
    listen = (
        "import socket, subprocess, sys;"
        "taken = socket.create_server(('', 20000));"
        "sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    )
    # On hv1, where the launcher runs as well: one port for the messages of each rank.
    more = ["--mca", "btl_tcp_port_min_v4", "20000", "--mca", "btl_tcp_port_range_v4", "1"]
    start = ["mpirun", "--prefix", str(BIN.parent), "-np", "2", "-H", "hv1:1,hv2:1", *more, *train]
    started = time.time()
    done = hosts.run(1, [str(BIN / "python"), "-c", listen, *start])
    assert done.status != 0
    assert done.ended - started < LIMIT
    named = [line for line in done.output.splitlines() if "no port available" in line]
    assert len(named) == 1
    assert named[0].startswith("[hv1]")
    assert "bind() failed" in named[0]


# ---------------------------------------------------------------------------- ssh


@pytest.mark.parametrize("launcher", ["horovodrun --gloo", "mpirun"])
@pytest.mark.parametrize("host", ["10.78.0.99", "10.78.0.98", "nowhere"])
def test_a_host_cannot_be_reached(hosts: Hosts, train: list[str], launcher: str, host: str) -> None:
    if host == "10.78.0.98":  # packets to this address get no answer, not even a refusal
        lost = ["ip", "neigh", "replace", host, "lladdr", "02:00:00:00:00:98", "dev", "eth0"]
        assert hosts.run(1, lost).status == 0
    message = f"ssh: connect to host {host} port 22: "
    if host == "nowhere":
        message = f"ssh: Could not resolve hostname {host}: "
    started = time.time()
    done = hosts.run(1, [HVDREC, "hosts", "-H", f"hv1:1,{host}:1"])
    print(f"{done.ended - started:.1f} s: {done.output}")
    assert done.status == 2
    assert done.ended - started < LIMIT
    assert len(done.output.splitlines()) == 1
    assert done.output.startswith(f"{host}: cannot be reached by ssh ({message}")
    started = time.time()
    done = hosts.launch(launcher, 2, train, names=f"hv1:1,{host}:1")
    print(f"{done.ended - started:.1f} s: {message}")
    assert done.status != 0
    assert done.ended - started < LIMIT
    assert message in done.output


@EVERY
def test_ssh_asks_for_a_password(hosts: Hosts, train: list[str], launcher: str) -> None:
    with hosts.mounted(2, Path("/dev/null"), hosts.folder / "ssh/authorized_keys"):
        started = time.time()
        done = hosts.run(1, [HVDREC, "hosts", "-H", "hv1:1,hv2:1"])
        assert done.status == 2
        assert len(done.output.splitlines()) == 1
        assert done.output.startswith("hv2: ssh asks for a password (root@hv2: Permission denied")
        started = time.time()
        done = hosts.launch(launcher, 2, train, at_terminal=True)
    print(f"{done.ended - started:.1f} s")
    assert done.status != 0
    assert done.ended - started < LIMIT
    assert "root@hv2: Permission denied" in done.output


def test_the_name_of_a_host_needs_a_usable_address(
    hosts: Hosts, train: list[str], tmp_path: Path
) -> None:
    """Gloo listens on that address."""
    names, table = tmp_path / "hosts", Path("/etc/hosts")
    names.write_text("127.0.0.1 localhost\n10.78.0.2 hv2\n")
    with hosts.mounted(1, names, table):
        started = time.time()
        expect(hosts.run(1, train), started, "hv1: this host's name has no address (")
    names.write_text("127.0.0.1 localhost\n127.0.1.1 hv2\n10.78.0.1 hv1\n")  # as Debian has it
    with hosts.mounted(2, names, table):
        started = time.time()
        done = hosts.launch("horovodrun --gloo", 2, train)
        expect(done, started, "hv2: this host's name has the address 127.0.1.1, which other hosts")


def test_other_problems_of_a_host_are_named(hosts: Hosts, small: Path) -> None:
    package = Path(hvdrec.__file__).parent
    with hosts.mounted(2, None, package / "cluster"), hosts.mounted(3, None, BIN):
        done = hosts.run(1, [HVDREC, "hosts", "-H", "hv1:2,hv2:2,hv3:2", "--json"])
    assert done.status == 2
    first, second, third = json.loads(done.output)["hosts"]
    assert first == {"host": "hv1", "slots": 2, "problems": []}
    assert len(second["problems"]) == len(third["problems"]) == 1
    assert second["problems"][0].startswith("hvdrec is not installed or has another version (")
    assert third["problems"][0].startswith(f"{BIN / 'python'}: does not exist (")
    with hosts.mounted(2, None, hosts.folder):
        done = hosts.run(1, [HVDREC, "hosts", "-H", "hv2:1", str(small)])
    assert done.output.startswith("hv2: ")


# ---------------------------------------------------------------------------- in training


@EVERY
@pytest.mark.parametrize(
    ("kind", "rank", "message"),
    [
        ("fail", 1, "RuntimeError: the sky has fallen"),
        ("fail", 0, "RuntimeError: the sky has fallen"),
        ("mistake", 2, "a shard is damaged; write it again"),
        ("stopped", 1, LOST),
        ("stopped", 0, LOST),
    ],
)
def test_a_rank_in_trouble_ends_all(
    hosts: Hosts,
    train: list[str],
    tmp_path: Path,
    launcher: str,
    kind: str,
    rank: int,
    message: str,
) -> None:
    note = tmp_path / "note"
    command = [str(BIN / "python"), TROUBLE, kind, str(rank), str(note), *train[1:]]
    done = hosts.launch(launcher, 3, command)
    expect(done, float(note.read_text()), f"rank {rank} on hv{rank + 1}: {message}")


@EVERY
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_is_killed(
    hosts: Hosts, train: list[str], tmp_path: Path, launcher: str, rank: int
) -> None:
    note = tmp_path / "note"
    command = [str(BIN / "python"), TROUBLE, "killed", str(rank), str(note), *train[1:]]
    done = hosts.launch(launcher, 3, command)
    print(f"{done.ended - float(note.read_text()):.1f} s: {done.complaints}")
    assert done.status != 0
    assert done.ended - float(note.read_text()) < LIMIT
    # The launcher may end the other ranks before one of them reports; then it names the rank.
    expected = [f"rank {rank} on hv{rank + 1}: {GONE}"] if done.complaints else []
    assert done.complaints == expected
    by_launcher = (f"Process {rank} exit with status", f"process rank {rank} with PID ")
    assert expected or any(name in done.output for name in by_launcher)


@EVERY
def test_a_host_vanishes(hosts: Hosts, train: list[str], tmp_path: Path, launcher: str) -> None:
    note = tmp_path / "note"
    command = [str(BIN / "python"), TROUBLE, "cut", "2", str(note), *train[1:]]
    done = hosts.launch(launcher, 3, command)
    print(f"{done.ended - float(note.read_text()):.1f} s")
    assert done.status != 0
    assert done.ended - float(note.read_text()) < LIMIT
    if launcher == "horovodrun --gloo":
        assert [line[:15] for line in done.complaints] == ["rank 2 on hv3: "]
        assert done.complaints[0].endswith(LOST)
    else:  # Open MPI notices it first
        assert re.search(r"lost communication with a remote daemon[^-]*node hv3", done.output)


def test_a_rank_that_cannot_be_watched_is_a_warning(
    hosts: Hosts, train: list[str], tmp_path: Path
) -> None:
    """Rank 0 warns about a rank that cannot connect to it, and the job continues."""
    blind = (
        "import sys; from hvdrec import cli; from hvdrec.parallel import watchdog;"
        "watchdog._addresses = lambda: ['10.78.0.99'];"
        "cli.main(sys.argv[1:])"
    )
    done = hosts.launch("mpirun", 2, [str(BIN / "python"), "-c", blind, *train[1:]])
    assert done.status == 0, done.output
    warnings = [line for line in done.output.splitlines() if "hvdrec: warning: " in line]
    assert len(warnings) == 1
    assert "rank 1 on hv2 cannot connect to rank 0 on hv1 (10.78.0.99, port " in warnings[0]
