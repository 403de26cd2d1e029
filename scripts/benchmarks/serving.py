"""Measure the HTTP service beside a bare FastAPI handler, one worker each, with the same bodies.

The bodies are those of `/v1/score` with 500 candidates. The bare handler (bare_service.py) parses
the request and returns a fixed answer. It is measured with its return type declared (`bare`), which
is several times faster, and without (`bare_undeclared`). All servers run under uvicorn with uvloop
and httptools and without an access log. The same client, a separate process that keeps a few
connections busy, drives them in turns. `scorer` calls `Scorer.score` for the same request in a loop
on one thread, without HTTP: the most that a service can reach on one core. `cpu_us` is the server's
CPU time per request, which other processes affect least. The bundle is that of score.py; `int8` is
the service over the same bundle with an int8 ranker.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

CANDIDATES, CONNECTIONS = 500, 8
WARM_UP = 0.3
SCENE = {"hour": 21, "weekday": 4}
Figures = dict[str, float]


def measure(turns: int = 5, seconds: float = 2.0) -> dict[str, Any]:
    """Return the figures of ``http``: ratios, and requests per second."""
    with tempfile.TemporaryDirectory(prefix="hvdrec-http-") as name:
        folder = Path(name)
        bundles = _bundles(folder)
        body, answer = folder / "body.json", folder / "answer.json"
        asked = _request(bundles["float32"])
        body.write_text(json.dumps(asked))
        answer.write_text(json.dumps(_answer(bundles["float32"], asked)))
        found: dict[str, dict[str, list[float]]] = {}
        with contextlib.ExitStack() as running:
            servers = {
                "service": running.enter_context(_service(bundles["float32"])),
                "int8": running.enter_context(_service(bundles["int8"])),
                "bare": running.enter_context(_bare(answer, "declared")),
                "bare_undeclared": running.enter_context(_bare(answer, "undeclared")),
            }
            for _ in range(turns):
                for program, server in servers.items():
                    before = server.cpu_seconds()
                    busy = _client("--load", server.port, body, CONNECTIONS, seconds)
                    spent = server.cpu_seconds() - before
                    alone = _client("--load", server.port, body, 1, seconds / 4)
                    figures = {
                        "requests_per_second": busy["rate"],
                        "cpu_us": 1e6 * spent / busy["requests"],
                        "one_connection_ms": alone["p50_ms"],
                    }
                    for figure, value in figures.items():
                        found.setdefault(figure, {}).setdefault(program, []).append(value)
                scorer = _client("--scorer", bundles["float32"], body, seconds / 2)
                found["requests_per_second"].setdefault("scorer", []).append(scorer["rate"])
    medians = {
        figure: {name: statistics.median(values) for name, values in by_name.items()}
        for figure, by_name in found.items()
    }
    rate = medians["requests_per_second"]
    return {
        "share_of_bare": rate["service"] / rate["bare"],
        "share_of_bare_undeclared": rate["service"] / rate["bare_undeclared"],
        "share_of_scorer": rate["service"] / rate["scorer"],
        "scorer_share_of_bare": rate["scorer"] / rate["bare"],
        "int8_share_of_bare": rate["int8"] / rate["bare"],
        **medians,
        "turns_requests_per_second": found["requests_per_second"],
        "candidates": CANDIDATES,
        "connections": CONNECTIONS,
        "turns": turns,
    }


def _bundles(folder: Path) -> dict[str, Path]:
    from score import exported, prepared

    config, model, _ = prepared(folder)
    return {
        "float32": exported(config, model, "float32"),
        "int8": exported(config, model, "rank8"),
    }


def _request(bundle: Path) -> dict[str, Any]:
    import numpy as np

    keys = np.load(bundle / "items/keys.npy").astype(str)
    items = np.random.default_rng(0).permutation(keys)[:CANDIDATES].tolist()
    user = str(np.load(bundle / "users/keys.npy").astype(str)[7])
    return {"user": user, "items": items, "scene": SCENE}


def _answer(bundle: Path, asked: dict[str, Any]) -> dict[str, list[float]]:
    from hvdrec.scoring import Scorer

    # The shortest decimals of float32, as the service writes them.
    return {"scores": [float(str(score)) for score in Scorer.load(bundle).score(**asked)]}


# ---------------------------------------------------------------------------------- the processes


@dataclass(frozen=True)
class Server:
    """A running server."""

    port: int
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """Return the CPU time used so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextlib.contextmanager
def _running(command: list[str], listening: str) -> Iterator[Server]:
    """Run a server and yield it; its standard error contains the port."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.search(listening, line)
        if not found:
            raise SystemExit(f"{command}: {line}{process.stderr.read()}")
        port = int(found[1])
        _wait_for(port)
        yield Server(port, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(30)
        process.stderr.close()


@contextlib.contextmanager
def _service(bundle: Path) -> Iterator[Server]:
    command = [str(Path(sys.executable).with_name("hvdrec")), "serve", str(bundle)]
    command += ["--port", "0", "--max-wait", "30"]
    with _running(command, r"http://127.0.0.1:(\d+)") as server:
        yield server


@contextlib.contextmanager
def _bare(answer: Path, written: str) -> Iterator[Server]:
    program = Path(__file__).with_name("bare_service.py")
    with _running([sys.executable, str(program), str(answer), written], r"(\d+)") as server:
        yield server


def _wait_for(port: int, limit: float = 60.0) -> None:
    """Wait until a server answers its readiness check."""
    import httpx

    end = time.monotonic() + limit
    while time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/readyz").is_success:
                return
        time.sleep(0.05)
    raise SystemExit(f"port {port}: no answer within {limit:g} s")


def _client(*arguments: object) -> Figures:
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    figures: Figures = json.loads(done.stdout)
    return figures


# ----------------------------------------------------------------------- what the processes run


async def load(port: int, body: bytes, connections: int, seconds: float) -> Figures:
    """Keep ``connections`` busy with one request; return answers a second, and the median's time.

    Raises SystemExit for an answer that is not 200.
    """
    head = f"POST /v1/score HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    request, took, wrong = head.encode() + body, [], []

    class Connection(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport: asyncio.Transport = transport
            self.send()

        def send(self) -> None:
            self.received, self.length = b"", 0
            self.started = time.perf_counter()
            self.transport.write(request)

        def data_received(self, data: bytes) -> None:
            self.received += data
            if not self.length:
                end = self.received.find(b"\r\n\r\n")
                if end < 0:
                    return
                answer = self.received[:end]
                found = re.search(rb"content-length: (\d+)", answer)
                if not answer.startswith(b"HTTP/1.1 200") or found is None:
                    wrong.append(self.received)
                    return
                self.length = end + 4 + int(found[1])
            if len(self.received) >= self.length:
                took.append(time.perf_counter() - self.started)
                self.send()

    loop = asyncio.get_running_loop()
    opened = [
        (await loop.create_connection(Connection, "127.0.0.1", port))[0] for _ in range(connections)
    ]
    await asyncio.sleep(WARM_UP)
    before, start = len(took), time.perf_counter()
    await asyncio.sleep(seconds)
    count, elapsed = len(took) - before, time.perf_counter() - start
    for transport in opened:
        transport.abort()
    if wrong:
        raise SystemExit(f"an answer that is not 200: {wrong[0]!r}")
    return {
        "rate": count / elapsed,
        "requests": len(took),
        "p50_ms": 1e3 * statistics.median(took[before:]),
    }


def score_alone(bundle: Path, body: bytes, seconds: float) -> Figures:
    """Return how many requests per second the scorer answers on one thread."""
    from hvdrec.scoring import Scorer

    scorer, asked = Scorer.load(bundle), json.loads(body)
    scorer.score(**asked)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        scorer.score(**asked)
        count += 1
    return {"rate": count / elapsed}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds per server and turn")
    parser.add_argument("--load", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--scorer", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        import uvloop

        port, body, connections, seconds = options.load
        content = Path(body).read_bytes()
        figures = uvloop.run(load(int(port), content, int(connections), float(seconds)))
        print(json.dumps(figures))
    elif options.scorer:
        bundle, body, seconds = options.scorer
        figures = score_alone(Path(bundle), Path(body).read_bytes(), float(seconds))
        print(json.dumps(figures))
    else:
        print(json.dumps({"http": measure(options.turns, options.seconds)}, indent=1))


if __name__ == "__main__":
    main()
