"""Connections to Redis: the circuit breaker, URLs, passwords, the missing package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdrec.scoring.bundle import read_bundle
from hvdrec.scoring.errors import StoreError
from hvdrec.scoring.stores import open_stores
from hvdrec.scoring.stores.redis.server import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    CircuitBreaker,
    RedisServer,
)
from tests.stores import make_bundle


class TestCircuitBreaker:
    def make(self) -> CircuitBreaker:
        self.now = 50.0
        return CircuitBreaker(lambda: self.now)

    def refused(self, breaker: CircuitBreaker) -> bool:
        try:
            breaker.admit()
        except StoreError as error:
            assert str(error).startswith("down; next attempt in ")
            return True
        return False

    def test_one_caller_tries_after_each_pause_and_the_pauses_grow(self) -> None:
        breaker, lengths = self.make(), []
        for _ in range(8):
            breaker.failed(breaker.admit(), "down")
            start = self.now
            while self.refused(breaker):
                self.now += 0.005
            lengths.append(self.now - start)
            # One caller was admitted and has not failed yet; the others are still refused.
            assert self.refused(breaker)
            self.now += LONGEST_PAUSE
        expected = [min(FIRST_PAUSE * 2**n, LONGEST_PAUSE) for n in range(8)]
        np.testing.assert_allclose(lengths, expected, atol=0.011)

    def test_concurrent_failures_count_once(self) -> None:
        breaker = self.make()
        attempts = [breaker.admit() for _ in range(10)]
        for attempt in attempts:
            breaker.failed(attempt, "down")
        self.now += FIRST_PAUSE
        assert not self.refused(breaker)

    def test_a_reply_ends_the_pause(self) -> None:
        breaker = self.make()
        for _ in range(5):
            breaker.failed(breaker.admit(), "down")
            self.now += LONGEST_PAUSE
        attempt = breaker.admit()
        assert self.refused(breaker)
        breaker.succeeded()
        assert not self.refused(breaker)
        breaker.failed(attempt, "down")
        self.now += FIRST_PAUSE
        assert not self.refused(breaker)


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
def test_the_label_does_not_show_the_password(url: str, label: str) -> None:
    server = RedisServer(url, 1.0)
    assert server.label == label
    assert server._text(Exception("AUTH s3cret failed")) == "AUTH *** failed"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://:s3cret@host", "has scheme 'http'; must be redis://HOST:PORT/DATABASE, rediss"),
        ("localhost", "has scheme ''"),
        ("", "has scheme ''"),
        ("redis://:s3cret@host:s3cret", "cannot be parsed; must be redis://HOST"),
        ("redis://[:s3cret@host", "cannot be parsed"),
        ("redis://:s3cret@host/movies", "redis://host:6379/movies: the database must be a number"),
        ("redis://:s3cret@host?s3cret=1", "redis://host:6379/0: the URL has an unknown option"),
        ("redis://:s3cret@host?socket_timeout=s3cret", "or one of the wrong type"),
    ],
)
def test_invalid_urls(url: str, reason: str) -> None:
    with pytest.raises(StoreError) as caught:
        RedisServer(url, 1.0)
    assert reason in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("timeout", [0, -1, "1", True, float("nan")])
def test_invalid_timeouts(timeout: Any) -> None:
    with pytest.raises(StoreError, match="more than 0") as caught:
        RedisServer("redis://host", timeout)
    assert caught.value.field == "timeout"
    assert caught.value.value is timeout


def test_opening_stores_does_not_connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvdrec.scoring.stores.redis.server.FIRST_PAUSE", 1000.0)
    bundle = make_bundle(tmp_path / "bundle", key_dtype="int")
    users, items = open_stores("redis://127.0.0.1:1/0", bundle)
    assert (users.dtype, items.dtype) == ("int", "int")
    assert users.model == items.model == read_bundle(bundle, verify=False).model
    with pytest.raises(StoreError, match=r"^redis://127.0.0.1:1/0: cannot connect \(.*\); "):
        users.lookup([1])
    with pytest.raises(StoreError, match=r"; next attempt in \d+\.\d\d s$"):
        items.lookup([1])


def test_a_missing_redis_package_is_one_line_that_names_the_extra() -> None:
    program = (
        "import sys; sys.modules['redis'] = None\n"
        "from hvdrec.scoring.errors import StoreError\n"
        "for name in ('store', 'publish'):\n"
        "    try: __import__('hvdrec.scoring.stores.redis.' + name)\n"
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
