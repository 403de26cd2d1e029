"""What a service is told: where it listens and what it takes on."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from hvdrec.errors import UserError

MOST_THREADS = 4


@dataclass(frozen=True)
class Options:
    """A service's settings; a value that cannot be is a UserError."""

    bundle: Path
    """Directory of the bundle."""
    host: str = "127.0.0.1"
    """Address to listen on; the default is reached from this machine alone."""
    port: int = 8080
    """0 takes any free port, which the first line on standard error names."""
    workers: int = 1
    """Processes that share the port."""
    threads: int = 0
    """Requests that a worker scores at once; 0: its share of the cores, 1 to 4."""
    max_requests: int = 64
    """Requests that a worker takes at once, those that wait included; one more gets 503."""
    max_wait: float = 1.0
    """Seconds a request may wait to be scored before it gets 503, and its body to come (408)."""
    max_body: int = 1 << 20
    """Bytes of a request's body; a longer one gets 413."""
    max_candidates: int = 10_000
    """Items that a request may have scored or ranked; more get 422."""
    watch: bool = True
    """Whether a new bundle at the path replaces the old one."""
    redis: str | None = None
    """URL of the Redis that holds the embeddings; None: those of the bundle."""

    def __post_init__(self) -> None:
        limits = {
            "port": (0, 65535),
            "workers": (1, 1024),
            "threads": (0, 1024),
            "max_requests": (1, 1_000_000),
            "max_wait": (0.001, 3600),
            "max_body": (1, 1 << 30),
            "max_candidates": (1, 10_000_000),
        }
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if not least <= value <= most:
                option = "--" + name.replace("_", "-")
                raise UserError(f"{option} {value}: must be from {least} to {most}")

    @property
    def scoring_threads(self) -> int:
        """Return how many requests a worker scores at once."""
        affinity = getattr(os, "sched_getaffinity", None)  # not on every system
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        return self.threads or min(max(cores // self.workers, 1), MOST_THREADS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a service's settings to a command line; `from_arguments` reads them."""
    default = Options(Path())
    add = parser.add_argument
    add("bundle", type=Path, help="directory of the bundle")
    add("--host", default=default.host, help="address to listen on (default %(default)s)")
    add("--port", type=int, default=default.port, help="0: any free one (default %(default)s)")
    add("--workers", type=int, default=default.workers, help="processes (default %(default)s)")
    add(
        "--threads",
        type=int,
        default=default.threads,
        help="requests that a worker scores at once (default: its share of the cores, "
        f"at most {MOST_THREADS})",
    )
    add(
        "--max-requests",
        type=int,
        default=default.max_requests,
        help="requests that a worker takes at once, those that wait included; more get 503 "
        "(default %(default)s)",
    )
    add(
        "--max-wait",
        type=float,
        default=default.max_wait,
        help="seconds a request may wait before it gets 503 (default %(default)s)",
    )
    add(
        "--max-body",
        type=int,
        default=default.max_body,
        help="bytes of a request's body; longer ones get 413 (default %(default)s)",
    )
    add(
        "--max-candidates",
        type=int,
        default=default.max_candidates,
        help="items a request may have ranked; more get 422 (default %(default)s)",
    )
    add(
        "--no-watch",
        dest="watch",
        action="store_false",
        help="stay with the bundle as it is, whatever lies at its path later",
    )
    add(
        "--redis",
        metavar="URL",
        default=os.environ.get("HVDREC_REDIS"),
        help="take embeddings from this Redis, where hvdrec publish wrote them (default: "
        "$HVDREC_REDIS, else those of the bundle)",
    )


def from_arguments(arguments: argparse.Namespace) -> Options:
    """Return the settings that a command line told; UserError for one that cannot be."""
    return Options(**{name: getattr(arguments, name) for name in Options.__dataclass_fields__})
