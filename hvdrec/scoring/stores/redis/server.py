"""A Redis server as hvdrec talks to it: few round trips, bounded waits, errors of one line."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from hvdrec.scoring.errors import StoreError, shown

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ModuleNotFoundError:
    raise StoreError(
        "embeddings in Redis need the extra 'redis': pip install 'hvdrec[redis]'"
    ) from None

FIRST_PAUSE = 0.05
LONGEST_PAUSE = 1.0
CONNECTIONS = 10_000
Command = tuple[Any, ...]
WatchError = redis.WatchError


class RedisServer:
    """One server and its pool of connections; safe from many threads.

    timeout: seconds to wait for a connection and for each part of an answer. Nothing is tried
    twice: a failure is a StoreError, and `Pause` decides when the next caller may try.
    """

    def __init__(self, url: str, timeout: float) -> None:
        """Check the URL, without connecting; StoreError that does not show its password."""
        if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not timeout > 0:
            raise StoreError(f"timeout = {shown(timeout)}: must be seconds, more than 0")
        self._timeout = float(timeout)
        self.label, self._secrets = _checked(url)
        self._pause = Pause()
        try:
            self._client: Any = redis.Redis.from_url(
                url,
                socket_timeout=self._timeout,
                socket_connect_timeout=self._timeout,
                retry=Retry(NoBackoff(), 0),
                max_connections=CONNECTIONS,
                # Of the older protocol, which every server speaks.
                protocol=2,
            )
            # Options of the URL are looked at when the first connection is made.
            pool = self._client.connection_pool
            pool.connection_class(**pool.connection_kwargs)
        except (TypeError, ValueError, redis.RedisError):
            raise StoreError(
                f"{self.label}: the URL has an option that is not known, or of the wrong type"
            ) from None

    def run(self, commands: Sequence[Command]) -> list[Any]:
        """Return the replies to commands, sent in one round trip; StoreError for a failure."""
        with self.guarded() as client:
            pipeline = client.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            replies: list[Any] = pipeline.execute(raise_on_error=False)
        for command, reply in zip(commands, replies, strict=True):
            if isinstance(reply, Exception):
                raise StoreError(self._refusal(reply, f"{command[0]} {command[1]}"))
        return replies

    @contextmanager
    def guarded(self) -> Iterator[Any]:
        """Give the client, unless the server has just failed; failures come out as StoreError."""
        attempt = self._pause.admit()
        try:
            yield self._client
        except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
            line = self._failure(error)
            self._pause.failed(attempt, line)
            raise StoreError(line) from None
        except redis.RedisError as error:
            self._pause.succeeded()
            raise StoreError(self._refusal(error, "a command")) from None
        self._pause.succeeded()

    def _failure(self, error: Exception) -> str:
        if isinstance(error, redis.BusyLoadingError):
            return f"{self.label}: is loading its data; try again in a while"
        if isinstance(error, redis.AuthenticationError):
            return f"{self.label}: refuses the user or the password ({self._text(error)})"
        if isinstance(error, redis.TimeoutError):
            return (
                f"{self.label}: did not answer within {self._timeout:g} s; look at its load, or "
                "give it more time"
            )
        return (
            f"{self.label}: cannot be reached ({self._text(error)}); check that it runs and that "
            "the address is right"
        )

    def _refusal(self, error: Exception, what: str) -> str:
        text = self._text(error)
        if isinstance(error, redis.OutOfMemoryError) or text.startswith("OOM"):
            hint = "give it more memory (maxmemory)"
        elif isinstance(error, redis.exceptions.ReadOnlyError):
            hint = "it is a replica: publish to its primary"
        elif isinstance(error, redis.exceptions.NoPermissionError):
            hint = "give the user this permission"
        elif text.startswith("WRONGTYPE"):
            hint = "something else has written there; run hvdrec publish"
        else:
            hint = "look at the server's log"
        return f"{self.label}: refuses {what} ({text}); {hint}"

    def _text(self, error: Exception) -> str:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return (text if len(text) <= 120 else text[:117] + "...").rstrip(".")


class Pause:
    """Whether a server that failed may be asked again.

    After a failure callers are refused for a time, then one of them tries while the others are
    still refused. Failures in a row double the time, from FIRST_PAUSE to LONGEST_PAUSE; those of
    callers that were under way together count as one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._line: str | None = None
        self._failures = 0
        self._seconds = 0.0
        self._until = 0.0

    def admit(self) -> int:
        """Return what `failed` wants to know; StoreError where it is too early to ask again."""
        if self._line is None:
            return self._failures
        with self._lock:
            left = self._until - self._clock()
            if self._line is not None and left > 0:
                raise StoreError(f"{self._line}; it is asked again in {left:.2f} s")
            self._until = self._clock() + self._seconds
            return self._failures

    def failed(self, attempt: int, line: str) -> None:
        """Take note of a failure, and of its text, which the next callers are told."""
        with self._lock:
            if attempt != self._failures:
                return
            self._failures += 1
            is_first = self._line is None
            self._seconds = FIRST_PAUSE if is_first else min(2 * self._seconds, LONGEST_PAUSE)
            self._until = self._clock() + self._seconds
            self._line = line

    def succeeded(self) -> None:
        """Take note of an answer."""
        if self._line is not None:
            with self._lock:
                self._line = None


def _checked(url: str) -> tuple[str, list[str]]:
    """Return a URL as it may be shown, and what must never be."""
    wanted = "must be redis://HOST:PORT/DATABASE, rediss://... (TLS) or unix://PATH"
    try:
        parts = urlsplit(url)
        shown_url = _without_secrets(parts)
    except (AttributeError, TypeError, ValueError):
        # What the reason quotes may be a part of the password.
        raise StoreError(f"the URL of the Redis server cannot be read; {wanted}") from None
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise StoreError(f"the URL of the Redis server is of scheme '{parts.scheme}'; {wanted}")
    if parts.scheme != "unix" and not parts.path.strip("/").isdecimal() and parts.path.strip("/"):
        raise StoreError(f"{shown_url}: the database must be a number, as in redis://HOST:PORT/0")
    passwords = [parts.password or "", *parse_qs(parts.query).get("password", [])]
    return shown_url, [form for text in passwords for form in {text, unquote(text)} if form]


def _without_secrets(parts: SplitResult) -> str:
    if parts.scheme == "unix":
        return f"unix://{parts.path}"
    host = parts.hostname or "localhost"
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}:{parts.port or 6379}/{parts.path.strip('/') or 0}"
