"""Promotions and rollbacks while a service answers requests: no request fails."""

from __future__ import annotations

import shutil
import threading
from functools import partial
from pathlib import Path

import httpx
import pytest

from hvdrec.promotion.versions import Published
from tests.bundles import write_bundle
from tests.other_bundle import write_other_bundle
from tests.serving.conftest import PATIENT
from tests.serving.launch import serving, wait_for

PROMOTIONS, THREADS = 20, 2
BODY = {"user": "1", "items": ["10", "20"]}


@pytest.mark.slow
def test_no_request_fails_through_twenty_promotions(tmp_path: Path) -> None:
    bundles = write_bundle(tmp_path / "ours"), write_other_bundle(tmp_path / "other")
    published = Published(tmp_path / "published")

    def promote(number: int) -> str:
        with published.locked():
            copy = shutil.copytree(bundles[number % 2], published.folder / "candidate")
            name = published.publish(copy)
            published.prune(2)
        return name

    promote(0)
    stop, answers = threading.Event(), [0] * THREADS
    wrong: list[str] = []
    with serving(published.link, *PATIENT) as running:

        def ask(thread: int) -> None:
            with httpx.Client(base_url=running.url, timeout=60) as client:
                while not stop.is_set():
                    answer = client.post("/v1/score", json=BODY)
                    if answer.status_code != 200:
                        wrong.append(answer.text)
                    answers[thread] += 1

        def version() -> str:
            return str(httpx.get(f"{running.url}/v1/bundle", timeout=60).json()["version"])

        def another(before: str) -> str | None:
            now = version()
            return now if now != before else None

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        try:
            seen = version()
            for number in range(1, PROMOTIONS + 1):
                if number == PROMOTIONS // 2:
                    published.roll_back()
                else:
                    promote(number)
                seen = wait_for(partial(another, seen))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert wrong == []
    assert min(answers) > PROMOTIONS
