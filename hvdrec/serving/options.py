"""Settings of the service and their command-line options; usable without the extra ``serve``."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hvdrec.errors import invalid_value

MOST_THREADS = 4


def _option(default: Any, text: str, low: float = 0, high: float = 0) -> Any:
    """Declare a setting with its help text and, for numbers, the smallest and largest value."""
    return field(default=default, metadata={"help": text, "low": low, "high": high})


@dataclass(frozen=True)
class Options:
    """Settings of the service; `hvdrec serve --help` describes each."""

    bundle: Path
    host: str = _option("127.0.0.1", "address to listen on; the default accepts local clients only")
    port: int = _option(8080, "port; 0 takes a free one, printed to standard error", 0, 65535)
    workers: int = _option(1, "processes that share the port", 1, 1024)
    threads: int = _option(
        0,
        f"requests that a worker scores at once; 0: its share of the cores, at most {MOST_THREADS}",
        0,
        1024,
    )
    max_requests: int = _option(
        64, "requests in a worker, waiting ones included; further ones get 503", 1, 1_000_000
    )
    max_wait: float = _option(
        1.0, "seconds a request may wait for a thread (503) or for its body (408)", 0.001, 3600
    )
    max_body: int = _option(1 << 20, "bytes of a request's body; a longer one gets 413", 1, 1 << 30)
    max_candidates: int = _option(
        10_000, "items that a request may score or rank; more get 422", 1, 10_000_000
    )
    max_header: int = _option(
        1 << 15, "bytes of a request's line and headers; longer ones get 431", 256, 1 << 24
    )
    header_wait: float = _option(
        10.0, "seconds for a request's headers to arrive (408)", 0.001, 3600
    )
    max_connections: int = _option(
        1024,
        "open connections of a worker; a new one replaces the one that has waited longest for a "
        "request, and gets 503 if all are busy",
        1,
        1_000_000,
    )
    max_per_address: int = _option(
        512, "the same for one client address; a proxy counts as one", 1, 1_000_000
    )
    drain: float = _option(
        2.0,
        "seconds from the signal to stop, when /readyz turns 503, until no connection is accepted; "
        "set it longer than a load balancer takes to notice",
        0,
        3600,
    )
    watch: bool = True
    verify: bool = True
    store: str | None = None

    def __post_init__(self) -> None:
        """Raise UserError if a number is out of range."""
        for setting in fields(self):
            low, high = (setting.metadata.get(name, 0) for name in ("low", "high"))
            value = getattr(self, setting.name)
            if high and not low <= value <= high:
                raise invalid_value(_flag(setting.name), value, f"must be from {low} to {high}")

    @property
    def scoring_threads(self) -> int:
        """Number of requests that a worker scores at the same time."""
        affinity = getattr(os, "sched_getaffinity", None)  # not on every system
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        return self.threads or min(max(cores // self.workers, 1), MOST_THREADS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the settings to a command line; `from_arguments` reads them."""
    parser.add_argument("bundle", type=Path, help="directory of the bundle")
    for setting in fields(Options):
        if setting.metadata:
            parser.add_argument(
                _flag(setting.name),
                type=type(setting.default),
                default=setting.default,
                help=f"{setting.metadata['help']} (default %(default)s)",
            )
    parser.add_argument(
        "--no-watch",
        dest="watch",
        action="store_false",
        help="do not reload when another bundle replaces this one",
    )
    parser.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="do not compare the bundle's files with their checksums, at the start and at reloads",
    )
    parser.add_argument(
        "--store",
        "--redis",
        metavar="URL",
        default=os.environ.get("HVDREC_REDIS"),
        help="read embeddings from this store, for example redis://HOST:6379/0, which hvdrec "
        "publish fills (default: $HVDREC_REDIS, else the bundle's own embeddings)",
    )


def from_arguments(arguments: argparse.Namespace) -> Options:
    """Build the settings from a parsed command line; raise UserError if one is out of range."""
    return Options(
        **{setting.name: getattr(arguments, setting.name) for setting in fields(Options)}
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
