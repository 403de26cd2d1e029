"""The end of the service: load balancers learn of it first, and no request is lost."""

from __future__ import annotations

import http.client
import json
import signal
import threading
from collections import Counter
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serving.conftest import PATIENT
from tests.serving.launch import Running, serving, wait_for

BODY = json.dumps({"user": "1", "items": ["10"]})
JSON = {"content-type": "application/json"}


def ask_until_refused(running: Running, keeps: bool, outcomes: Counter[object]) -> None:
    """Send requests, over one connection as long as the service keeps it, or over new ones."""
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
        try:
            connection.connect()
        except ConnectionRefusedError:
            return
        is_open = True
        while is_open:
            try:
                connection.request("POST", "/v1/score", BODY, JSON)
                answer = connection.getresponse()
                answer.read()
                outcomes[answer.status] += 1
                is_open = keeps and answer.getheader("connection") != "close"
            except Exception as error:
                outcomes[repr(error)] += 1
                is_open = False
        connection.close()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_no_request_is_lost_under_load(bundle: Path, workers: str) -> None:
    options = (*PATIENT, "--workers", workers, "--drain", "0.3")
    with serving(bundle, *options) as running:
        outcomes: Counter[object] = Counter()
        threads = [
            threading.Thread(target=ask_until_refused, args=(running, number % 2 == 0, outcomes))
            for number in range(8)
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: outcomes[200] > 50)
        # A service manager signals every process; some programs signal one and its group.
        family = psutil.Process(running.process.pid).children(recursive=True)
        for process in [running.process, *family, running.process]:
            process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert running.process.wait(60) == 0
        assert set(outcomes) == {200}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_readiness_ends_before_the_service_does(bundle: Path, workers: str) -> None:
    with serving(bundle, *PATIENT, "--workers", workers, "--drain", "600") as running:
        running.process.send_signal(signal.SIGTERM)
        ready = wait_for(
            lambda: get if (get := httpx.get(f"{running.url}/readyz")).is_error else None
        )
        assert ready.status_code == 503
        assert "stopping" in ready.json()["error"]
        assert httpx.get(f"{running.url}/healthz").status_code == 200
        # Clients with open connections move to other servers.
        answer = httpx.post(f"{running.url}/v1/score", content=BODY, headers=JSON)
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        family = psutil.Process(running.process.pid).children(recursive=True)
        assert running.stop(signal.SIGTERM) == 128 + signal.SIGTERM  # the second signal
        psutil.wait_procs(family, timeout=60)
        assert not any(process.is_running() for process in family)
