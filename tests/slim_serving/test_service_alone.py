"""The HTTP service in an environment with only the extra `serve`, and pytest.

``HVDREC_TEST_BUNDLE`` is the path of the bundle that ``python tests/bundles.py OUT`` writes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hvdrec.scoring import Scorer

LIMIT_SECONDS = 60


@pytest.fixture(scope="module")
def bundle() -> Path:
    return Path(os.environ["HVDREC_TEST_BUNDLE"])


@pytest.fixture(scope="module")
def url(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the bundle on a free port; the service must end with exit code 0."""
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [Path(sys.executable).with_name("hvdrec"), "serve", str(bundle), "--port", "0"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        yield wait_until_ready(process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_SECONDS) == 0, log.read_text()


def wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
            try:
                with urllib.request.urlopen(f"{found[0]}/readyz", timeout=5):
                    return found[0]
            except OSError:
                pass
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def test_the_service_answers_what_the_scorer_returns(url: str, bundle: Path) -> None:
    scorer, scene = Scorer.load(bundle), {"hour": 21, "place": "home", "temperature": 12.5}
    body = {"user": "1", "items": ["40", "10", "unknown", None], "scene": scene}
    expected = scorer.score("1", body["items"], scene)  # type: ignore[arg-type]
    assert post(url, "/v1/score", body)["scores"] == pytest.approx(expected.tolist(), abs=1e-7)
    items = post(url, "/v1/recommend", {"user": "1", "scene": scene, "k": 3})["items"]
    assert [item["item"] for item in items] == [i.item for i in scorer.recommend("1", scene, 3)]


def test_a_wrong_request_is_refused(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(url, "/v1/score", {"user": "1", "items": "10"})
    assert caught.value.code == 422
