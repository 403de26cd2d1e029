"""Hosts for tests, and jobs on them, started as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
SCRIPT = str(Path(__file__).parent / "hosts.sh")
TERMINAL = str(Path(__file__).parent / "terminal.py")
TROUBLE = str(Path(__file__).parent / "trouble.py")
HVDREC = "hvdrec"
LIMIT = 60.0
"""The seconds within which a job must end after a failure."""


@dataclass(frozen=True)
class Done:
    """The result of a job."""

    status: int
    output: str
    """Standard output and standard error."""
    ended: float

    @property
    def complaints(self) -> list[str]:
        """The error messages of hvdrec."""
        lines = [line for line in self.output.splitlines() if "hvdrec: error: " in line]
        return [line[line.index("hvdrec: error: ") + 15 :] for line in lines]


@dataclass(frozen=True)
class Hosts:
    """The hosts hv1, hv2, ... that hosts.sh made."""

    folder: Path
    count: int

    def run(self, host: int, command: Sequence[str], timeout: float = 200) -> Done:
        """Run a command on a host."""
        environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.folder),  # horovodrun caches there which hosts answered
            "OMP_NUM_THREADS": "1",
            "OMPI_MCA_mpi_yield_when_idle": "1",  # all hosts share this machine's cores
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }
        done = subprocess.run(
            [SCRIPT, "run", str(self.folder), str(host), *command],
            env=environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Done(done.returncode, done.stdout, time.time())

    def launch(
        self,
        launcher: str,
        hosts: int,
        command: Sequence[str],
        names: str = "",
        at_terminal: bool = False,
        timeout: float = 200,
    ) -> Done:
        """Run a command on one rank of each of the first (or named) hosts, started on hv1.

        With `at_terminal`, programs may prompt and wait for an answer.
        """
        names = names or ",".join(f"hv{i}:1" for i in range(1, hosts + 1))
        prefix = sys.prefix
        start = {
            "horovodrun --gloo": ["horovodrun", "--disable-cache", "--gloo"],
            "horovodrun --mpi": ["horovodrun", "--mpi", f"--mpi-args=--prefix {prefix}"],
            "mpirun": ["mpirun", "--prefix", prefix],
        }[launcher]
        full = [*start, "-np", str(hosts), "-H", names, *command]
        if at_terminal:
            full = [str(BIN / "python"), TERMINAL, *full]
        return self.run(1, full, timeout)

    @contextmanager
    def mounted(self, host: int, source: Path | None, target: Path) -> Iterator[None]:
        """Mount a source, or an empty folder for None, over a path on one host only."""
        what = ["-t", "tmpfs", "none"] if source is None else ["--bind", str(source)]
        self._do(host, "mount", *what, str(target))
        try:
            yield
        finally:
            self._do(host, "umount", "--lazy", str(target))

    def clear(self) -> None:
        """Kill the programs on the hosts and bring their networks up."""
        for host in range(1, self.count + 1):
            self.run(host, ["bash", "-c", "kill -9 -1"])
            self._do(host, "ip", "link", "set", "eth0", "up")
        for host in range(1, self.count + 1):
            other = host % self.count + 1
            for _ in range(100):
                if self.run(other, ["ssh", "-o", "BatchMode=yes", f"hv{host}", "true"]).status == 0:
                    break
                time.sleep(0.1)
            else:
                raise AssertionError(f"hv{host} does not answer")

    def _do(self, host: int, *command: str) -> None:
        done = self.run(host, command)
        assert done.status == 0, done.output


@contextmanager
def hosts_up(count: int, folder: Path) -> Iterator[Hosts]:
    """Create hosts and remove them at the end."""
    script = subprocess.Popen(
        [SCRIPT, "up", str(count), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert script.stdin is not None
    assert script.stdout is not None
    assert script.stderr is not None
    try:
        if script.stdout.readline() != "up\n":
            raise AssertionError(script.stderr.read())
        yield Hosts(folder, count)
    finally:
        script.stdin.close()
        script.wait(30)
