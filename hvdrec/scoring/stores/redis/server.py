"""Talk to a Redis server in few round trips, with bounded waits and one-line errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from hvdrec.scoring.errors import StoreError, first_line, shown

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
EXPECTED_URL = "must be redis://HOST:PORT/DATABASE, rediss://... (TLS) or unix://PATH"
Command = tuple[Any, ...]
WatchError = redis.WatchError


class RedisServer:
    """One server and its connection pool; thread-safe.

    Nothing is retried: a failure raises StoreError, and `CircuitBreaker` decides when the next
    caller may contact the server.

    Attributes:
        label: The server's URL without the password, for messages.
    """

    def __init__(self, url: str, timeout: float) -> None:
        """Check the URL without connecting.

        Args:
            url: URL of the server; it may contain a password, which no message shows.
            timeout: Seconds to wait for a connection and for each part of a reply.

        Raises:
            StoreError: The URL or the timeout is not valid.
        """
        if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not timeout > 0:
            raise StoreError(
                f"timeout = {shown(timeout)}: must be seconds, more than 0",
                field="timeout",
                value=timeout,
            )
        self._timeout = float(timeout)
        self.label, self._secrets = _checked(url)
        self._breaker = CircuitBreaker()
        try:
            self._client: Any = redis.Redis.from_url(
                url,
                socket_timeout=self._timeout,
                socket_connect_timeout=self._timeout,
                retry=Retry(NoBackoff(), 0),
                max_connections=CONNECTIONS,
                protocol=2,  # every server supports it
            )
            # redis checks the URL's options when it makes the first connection; do it now.
            pool = self._client.connection_pool
            pool.connection_class(**pool.connection_kwargs)
        except (TypeError, ValueError, redis.RedisError):
            raise StoreError(
                f"{self.label}: the URL has an unknown option or one of the wrong type"
            ) from None

    def run(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one round trip and return their replies; raise StoreError on failure."""
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
        """Yield the Redis client; StoreError if a call fails or the server has just failed."""
        attempt = self._breaker.admit()
        try:
            yield self._client
        except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
            line = self._failure(error)
            self._breaker.failed(attempt, line)
            raise StoreError(line) from None
        except redis.RedisError as error:
            self._breaker.succeeded()
            raise StoreError(self._refusal(error, "a command")) from None
        self._breaker.succeeded()

    def _failure(self, error: Exception) -> str:
        if isinstance(error, redis.BusyLoadingError):
            return f"{self.label}: the server is loading its data; try again later"
        if isinstance(error, redis.AuthenticationError):
            return f"{self.label}: the server refuses the user or password ({self._text(error)})"
        if isinstance(error, redis.TimeoutError):
            return (
                f"{self.label}: no reply within {self._timeout:g} s; check the server's load or "
                "raise the timeout"
            )
        return (
            f"{self.label}: cannot connect ({self._text(error)}); check that the server runs and "
            "that the address is right"
        )

    def _refusal(self, error: Exception, command: str) -> str:
        text = self._text(error)
        if isinstance(error, redis.OutOfMemoryError) or text.startswith("OOM"):
            hint = "give the server more memory (maxmemory)"
        elif isinstance(error, redis.exceptions.ReadOnlyError):
            hint = "this is a replica: publish to its primary"
        elif isinstance(error, redis.exceptions.NoPermissionError):
            hint = "grant the user this permission"
        elif text.startswith("WRONGTYPE"):
            hint = "another program wrote to this key; run hvdrec publish"
        else:
            hint = "check the server's log"
        return f"{self.label}: the server refuses {command} ({text}); {hint}"

    def _text(self, error: Exception) -> str:
        text = first_line(error)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return (text if len(text) <= 120 else text[:117] + "...").rstrip(".")


class CircuitBreaker:
    """Refuses calls to a server that has just failed.

    After a failure, all callers are refused for a pause. After the pause, one caller may try; all
    other callers are refused until this call has succeeded. Each further failure doubles the pause,
    from `FIRST_PAUSE` to `LONGEST_PAUSE` seconds. Calls that fail at the same time count as one
    failure.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start without a failure. ``clock`` returns the time in seconds."""
        self._clock = clock
        self._lock = threading.Lock()
        self._error: str | None = None
        self._failures = 0
        self._seconds = 0.0
        self._until = 0.0

    def admit(self) -> int:
        """Admit a call, or raise StoreError during a pause; return a number to pass to `failed`."""
        if self._error is None:
            return self._failures
        with self._lock:
            left = self._until - self._clock()
            if self._error is not None and left > 0:
                raise StoreError(f"{self._error}; next attempt in {left:.2f} s")
            self._until = self._clock() + self._seconds
            return self._failures

    def failed(self, attempt: int, error: str) -> None:
        """Record a failed call; callers that are refused during the pause get its error text."""
        with self._lock:
            if attempt != self._failures:
                return
            self._failures += 1
            is_first = self._error is None
            self._seconds = FIRST_PAUSE if is_first else min(2 * self._seconds, LONGEST_PAUSE)
            self._until = self._clock() + self._seconds
            self._error = error

    def succeeded(self) -> None:
        """Record a successful call, which ends the pauses."""
        if self._error is not None:
            with self._lock:
                self._error = None


def _checked(url: str) -> tuple[str, list[str]]:
    """Return a URL without its password, and the secret texts that no message may show."""
    try:
        parts = urlsplit(url)
        public_url = _without_secrets(parts)
    except (AttributeError, TypeError, ValueError):
        # Leave out the parser's reason: it may quote a part of the password.
        raise StoreError(f"the URL of the Redis server cannot be parsed; {EXPECTED_URL}") from None
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise StoreError(f"the URL of the Redis server has scheme '{parts.scheme}'; {EXPECTED_URL}")
    database = parts.path.strip("/")
    if parts.scheme != "unix" and database and not database.isdecimal():
        raise StoreError(f"{public_url}: the database must be a number, as in redis://HOST:PORT/0")
    passwords = [parts.password or "", *parse_qs(parts.query).get("password", [])]
    return public_url, [form for text in passwords for form in {text, unquote(text)} if form]


def _without_secrets(parts: SplitResult) -> str:
    if parts.scheme == "unix":
        return f"unix://{parts.path}"
    host = parts.hostname or "localhost"
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}:{parts.port or 6379}/{parts.path.strip('/') or 0}"
