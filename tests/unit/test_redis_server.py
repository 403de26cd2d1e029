"""Talking to a Redis server: pauses after failures, URLs, passwords, the missing package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdrec.scoring.bundle import read_bundle
from hvdrec.scoring.errors import StoreError
from hvdrec.scoring.stores.redis.server import FIRST_PAUSE, LONGEST_PAUSE, Pause, RedisServer
from hvdrec.scoring.stores.redis.store import open_stores
from tests.stores import make_bundle


class TestPause:
    def make(self) -> Pause:
        self.now = 50.0
        return Pause(lambda: self.now)

    def refused(self, pause: Pause) -> bool:
        try:
            pause.admit()
        except StoreError as error:
            assert str(error).startswith("down; it is asked again in ")
            return True
        return False

    def test_one_caller_tries_and_the_pauses_grow(self) -> None:
        pause, lengths = self.make(), []
        for _ in range(8):
            pause.failed(pause.admit(), "down")
            start = self.now
            while self.refused(pause):
                self.now += 0.005
            lengths.append(self.now - start)
            # The one that was let in is under way; the others wait on.
            assert self.refused(pause)
            self.now += LONGEST_PAUSE
        expected = [min(FIRST_PAUSE * 2**n, LONGEST_PAUSE) for n in range(8)]
        np.testing.assert_allclose(lengths, expected, atol=0.011)

    def test_callers_that_fail_together_count_once(self) -> None:
        pause = self.make()
        attempts = [pause.admit() for _ in range(10)]
        for attempt in attempts:
            pause.failed(attempt, "down")
        self.now += FIRST_PAUSE
        assert not self.refused(pause)

    def test_an_answer_ends_it(self) -> None:
        pause = self.make()
        for _ in range(5):
            pause.failed(pause.admit(), "down")
            self.now += LONGEST_PAUSE
        attempt = pause.admit()
        assert self.refused(pause)
        pause.succeeded()
        assert not self.refused(pause)
        pause.failed(attempt, "down")
        self.now += FIRST_PAUSE
        assert not self.refused(pause)


@pytest.mark.parametrize(
    ("url", "label"),
    [
        ("redis://:s3cret@host", "redis://host:6379/0"),
        ("redis://name:s3cret@HOST:7000/3", "redis://host:7000/3"),
        ("rediss://name:s3cret@[::1]:7000/3?ssl_cert_reqs=none", "rediss://[::1]:7000/3"),
        ("redis://host/1?password=s3cret", "redis://host:6379/1"),
        ("unix://name:s3cret@/run/redis.sock?db=2", "unix:///run/redis.sock"),
    ],
)
def test_a_server_is_named_without_its_password(url: str, label: str) -> None:
    server = RedisServer(url, 1.0)
    assert server.label == label
    assert server._text(Exception("AUTH s3cret failed")) == "AUTH *** failed"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://:s3cret@host", "is of scheme 'http'; must be redis://HOST:PORT/DATABASE, rediss"),
        ("localhost", "is of scheme ''"),
        ("", "is of scheme ''"),
        ("redis://:s3cret@host:s3cret", "cannot be read; must be redis://HOST"),
        ("redis://[:s3cret@host", "cannot be read"),
        ("redis://:s3cret@host/movies", "redis://host:6379/movies: the database must be a number"),
        ("redis://:s3cret@host?s3cret=1", "redis://host:6379/0: the URL has an option that is not"),
        ("redis://:s3cret@host?socket_timeout=s3cret", "or of the wrong type"),
    ],
)
def test_a_url_that_cannot_be(url: str, reason: str) -> None:
    with pytest.raises(StoreError) as caught:
        RedisServer(url, 1.0)
    assert reason in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("timeout", [0, -1, "1", True, float("nan")])
def test_a_timeout_that_cannot_be(timeout: Any) -> None:
    with pytest.raises(StoreError, match=r"^timeout = .*: must be seconds, more than 0$"):
        RedisServer("redis://host", timeout)


def test_stores_are_opened_without_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvdrec.scoring.stores.redis.server.FIRST_PAUSE", 1000.0)
    bundle = make_bundle(tmp_path / "bundle", key_dtype="int")
    users, items = open_stores("redis://127.0.0.1:1/0", bundle)
    assert (users.dtype, items.dtype) == ("int", "int")
    assert users.model == items.model == read_bundle(bundle, verify=False).model
    with pytest.raises(StoreError, match=r"^redis://127.0.0.1:1/0: cannot be reached \(.*\); "):
        users.lookup([1])
    with pytest.raises(StoreError, match=r"; it is asked again in \d+\.\d\d s$"):
        items.lookup([1])


def test_without_the_redis_package_one_line_names_the_extra() -> None:
    program = (
        "import sys; sys.modules['redis'] = None\n"
        "from hvdrec.scoring.errors import StoreError\n"
        "for name in ('redis_store', 'publish'):\n"
        "    try: __import__('hvdrec.scoring.' + name)\n"
        "    except StoreError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    line = "embeddings in Redis need the extra 'redis': pip install 'hvdrec[redis]'"
    assert done.stdout.splitlines() == [line, line]


def test_the_slim_module_alone_does_not_import_redis() -> None:
    program = "import sys, hvdrec.scoring; print('redis' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
