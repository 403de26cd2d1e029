"""The service as a program: start, workers, reloads and shutdown."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import run
from typing import Any

import httpx
import psutil
import pytest

from hvdrec.errors import UserError
from hvdrec.scoring import Scorer
from hvdrec.serving.metrics import shared_folder
from tests.other_bundle import put, write_other_bundle
from tests.serving.conftest import PATIENT
from tests.serving.launch import Running, refused, serving, wait_for

ONE: dict[str, Any] = {"user": "1", "items": ["10"], "scene": {"hour": 21}}
HEAD = "POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def post(running: Running, body: dict[str, Any] = ONE) -> httpx.Response:
    """Send a request over a new connection."""
    return httpx.post(f"{running.url}/v1/score", json=body, timeout=60)


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_in_progress_is_answered_before_shutdown(
    bundle: Path, workers: str, number: signal.Signals
) -> None:
    with serving(bundle, *PATIENT, "--workers", workers) as running:
        body = json.dumps(ONE).encode()
        with socket.create_connection(("127.0.0.1", running.port), timeout=60) as connection:
            connection.sendall(f"{HEAD}content-length: {len(body)}\r\n\r\n".encode() + body[:10])
            wait_for(lambda: "requests_in_flight 1.0" in httpx.get(f"{running.url}/metrics").text)
            running.process.send_signal(number)
            wait_for(lambda: not is_listening(running.port))
            assert running.process.poll() is None
            connection.sendall(body[10:])
            answer = b""
            while part := connection.recv(65536):
                answer += part
        head, _, scores = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert b"connection: close" in head
        expected = Scorer.load(bundle).score("1", ["10"], {"hour": 21})
        assert json.loads(scores)["scores"] == pytest.approx(expected.tolist())
        assert running.process.wait(60) == 0
        first, last = running.log.read_text().splitlines()  # and no traceback
        assert (first.split()[:2], last) == (["serving", "tiny"], "stopped")


def is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
    except ConnectionError:
        return False
    return True


def test_workers_share_the_port_and_metrics(bundle: Path) -> None:
    with serving(bundle, *PATIENT, "--workers", "2") as running:
        parent = psutil.Process(running.process.pid)
        workers = wait_for(lambda: two(workers_of(parent)))
        assert " with 2 workers\n" in running.log.read_text()
        for _ in range(50):
            assert post(running).status_code == 200
        counted = 'hvdrec_requests_total{route="/v1/score",status="200"} '
        # Each worker reports the metrics of both.
        for _ in range(10):
            assert f"{counted}50.0\n" in httpx.get(f"{running.url}/metrics").text
        folders = folders_of(workers)
        assert len(folders) == 1

        workers[0].kill()
        wait_for(lambda: workers[0] not in (now := workers_of(parent)) and two(now))
        assert post(running).status_code == 200
        metrics = wait_for(lambda: httpx.get(f"{running.url}/metrics").text)
        assert f"{counted}51.0\n" in metrics
        assert "hvdrec_requests_in_flight 0.0\n" in metrics
        assert running.stop() == 0
    assert not folders.pop().exists()
    assert not any(worker.is_running() for worker in workers)


def test_a_worker_that_dies_unanswered_does_not_delay_a_stop(
    bundle: Path,
) -> None:
    with serving(bundle, *PATIENT, "--workers", "2", "--drain", "0") as running:
        worker, _ = wait_for(lambda: two(workers_of(psutil.Process(running.process.pid))))
        worker.suspend()
        time.sleep(1.5)  # the parent asks its workers every 0.5 s, and now waits for the answer
        worker.kill()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0


def workers_of(parent: psutil.Process) -> list[psutil.Process]:
    """Return the worker processes of a parent."""

    def is_worker(child: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):  # or a zombie
            return any("spawn_main" in word for word in child.cmdline())
        return False

    return [child for child in parent.children() if is_worker(child)]


def folders_of(workers: list[psutil.Process]) -> set[Path]:
    """Return the folders of the workers' shared metrics."""
    maps = (Path(file.path) for worker in workers for file in worker.memory_maps())
    return {file.parent for file in maps if "hvdrec-metrics-" in str(file)}


def two(processes: list[psutil.Process]) -> list[psutil.Process]:
    return processes if len(processes) == 2 else []


@pytest.mark.parametrize("workers", ["1", "2"])
def test_workers_exit_when_their_parent_is_killed(bundle: Path, workers: str) -> None:
    with serving(bundle, *PATIENT, "--workers", workers) as running:
        family = psutil.Process(running.process.pid).children(recursive=True)
        folders = folders_of(workers_of(psutil.Process(running.process.pid)))
        assert len(folders) == int(workers) - 1
        running.process.kill()
        running.process.wait(60)
        psutil.wait_procs(family, timeout=60)
        assert not any(process.is_running() for process in family)
        assert not is_listening(running.port)
        assert not any(folder.exists() for folder in folders)


def test_a_new_bundle_replaces_the_old_one(bundle: Path, tmp_path: Path) -> None:
    other = write_other_bundle(tmp_path / "other")
    path = tmp_path / "served"
    put(bundle, path)
    with serving(path, *PATIENT) as running:
        versions = [Scorer.load(each).version for each in (bundle, other)]
        assert post(running).headers["bundle-version"] == versions[0]
        put(other, path)
        wait_for(lambda: post(running).headers["bundle-version"] == versions[1])
        expected = Scorer.load(other).score("1", ["10"], {"hour": 21}).tolist()
        assert post(running).json()["scores"] == pytest.approx(expected)
        answer = httpx.get(f"{running.url}/v1/bundle")
        assert answer.headers["bundle-version"] == answer.json()["version"] == versions[1]
        metrics = httpx.get(f"{running.url}/metrics").text
        assert "hvdrec_bundle_reloads_total 1.0\n" in metrics
        for version, served in zip(versions, ("0.0", "1.0"), strict=True):
            line = f'hvdrec_bundle_info{{name="tiny",version="{version}"}} {served}\n'
            assert line in metrics

        broken = tmp_path / "broken"
        shutil.copytree(bundle, broken)
        (broken / "ranker.onnx").write_bytes(b"no graph")
        put(broken, path)
        refused_once = "hvdrec_bundle_refused_total 1.0\n"
        wait_for(lambda: refused_once in httpx.get(f"{running.url}/metrics").text)
        assert post(running).headers["bundle-version"] == versions[1]
        assert "ranker.onnx: has 8 bytes" in running.log.read_text()


def test_fifty_renames_under_load_refuse_nothing(bundle: Path, tmp_path: Path) -> None:
    pair = (bundle, write_other_bundle(tmp_path / "other"))
    path = tmp_path / "served"
    put(bundle, path)
    with serving(path, *PATIENT) as running:
        expected = {
            scorer.version: scorer.score("1", ["10"], {"hour": 21}).tolist()
            for scorer in map(Scorer.load, pair)
        }
        is_done = threading.Event()

        def ask() -> list[httpx.Response]:
            answers = []
            with httpx.Client(base_url=running.url, timeout=60) as client:
                while not is_done.is_set():
                    answers += [client.post("/v1/score", json=ONE), client.get("/readyz")]
            return answers

        with ThreadPoolExecutor(2) as pool:
            asking = [pool.submit(ask) for _ in range(2)]
            for turn in range(1, 51):
                put(pair[turn % 2], path)
                time.sleep(0.05)
            put(pair[1], path)
            wait_for(
                lambda: post(running).headers["bundle-version"] == Scorer.load(pair[1]).version
            )
            is_done.set()
            answers = [answer for each in asking for answer in each.result()]
        assert {answer.status_code for answer in answers} == {200}
        for answer in answers:
            if "scores" in (body := answer.json()):
                scores = expected[answer.headers["bundle-version"]]
                assert body["scores"] == pytest.approx(scores)
        metrics = httpx.get(f"{running.url}/metrics").text
        assert "hvdrec_bundle_refused_total 0.0\n" in metrics
        assert "refused" not in running.log.read_text()


def test_without_watching_the_bundle_stays(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "served"
    put(bundle, path)
    with serving(path, *PATIENT, "--no-watch") as running:
        version = post(running).headers["bundle-version"]
        threads = psutil.Process(running.process.pid).num_threads()
        put(write_other_bundle(tmp_path / "other"), path)
        assert post(running).headers["bundle-version"] == version
    with serving(path, *PATIENT) as running:
        assert post(running).headers["bundle-version"] != version
        # Watching takes one thread.
        assert psutil.Process(running.process.pid).num_threads() == threads + 1


def test_workers_without_a_temporary_directory(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**_: object) -> object:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refused)
    with (
        pytest.raises(UserError, match=r"^--workers: .* temporary directory.*--tmpfs /tmp"),
        shared_folder(),
    ):
        pass


def test_a_port_in_use(bundle: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for workers in ("1", "2"):
            line = refused(str(bundle), "--port", str(port), "--workers", workers)
            start = (
                f"hvdrec: error: 127.0.0.1:{port}: cannot listen here (Address already in use); "
            )
            assert line.startswith(start)
            assert "--port" in line.removeprefix(start)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--port", "70000"], "--port = 70000: must be from 0 to 65535"),
        (["--workers", "0"], "--workers = 0: must be from 1 to 1024"),
        (["--max-wait", "nan"], "--max-wait = nan: must be from 0.001 to 3600"),
        (["--max-requests", "-1"], "--max-requests = -1: must be from 1 to 1000000"),
        (["--host", "no such host"], "no such host:8080: cannot listen here"),
        (["--host", "203.0.113.7"], "203.0.113.7:8080: cannot listen here (Cannot assign"),
    ],
)
def test_invalid_options(bundle: Path, options: list[str], text: str) -> None:
    assert refused(str(bundle), *options).startswith(f"hvdrec: error: {text}")


def test_a_bundle_that_cannot_be_opened(tmp_path: Path, bundle: Path) -> None:
    line = refused(str(tmp_path / "none"))
    assert "none: is not a bundle" in line
    assert "hvdrec export" in line
    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    (broken / "ranker.onnx").unlink()
    assert "ranker.onnx: is missing" in refused(str(broken))


def blocked(*names: str) -> str:
    """Return the start of a program in which modules seem not to be installed."""
    return f"import sys; sys.modules.update(dict.fromkeys({names!r})); "


@pytest.mark.parametrize("name", ["fastapi", "uvicorn", "prometheus_client", "orjson", "pydantic"])
def test_a_missing_extra_is_one_line(bundle: Path, name: str) -> None:
    program = blocked(name) + (
        "from pathlib import Path; from hvdrec.errors import UserError\n"
        "from hvdrec.serving import Options, serve\n"
        f"try: serve(Options(Path({str(bundle)!r}), port=0))\n"
        "except UserError as error: print(error)"
    )
    result = run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == (
        f"{name}: not installed; serving needs the extra 'serve': pip install 'hvdrec[serve]'\n"
    )


def test_the_service_imports_only_its_extra() -> None:
    others = ("torch", "pyarrow", "pandas", "duckdb", "onnx", "horovod", "petastorm")
    program = blocked(*others) + (
        "import hvdrec.serving.run; "
        "print(*sorted(name for name in sys.modules if name.startswith('hvdrec.')))"
    )
    result = run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    allowed = ("hvdrec.serving", "hvdrec.scoring", "hvdrec.errors", "hvdrec.cli.text_table")
    assert all(name.startswith(allowed) for name in result.stdout.split())
