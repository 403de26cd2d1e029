"""Compare values that must be equal on all ranks; name the ranks and hosts that differ."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import hvdrec
from hvdrec.storage.artifacts import MANIFEST
from hvdrec.storage.urls import Location

MISSING_FILE = "missing"
"""The digest of a path that does not exist."""
MAX_HOSTS, MAX_FIELDS = 4, 4
"""Largest numbers of hosts and fields that a message names; the message counts the rest."""


def host_name() -> str:
    """Return the name of this host."""
    return socket.gethostname()


def versions() -> dict[str, str]:
    """Return the versions that must be equal on every host: name to show -> version.

    hvdrec's version includes the start of a hash of its source code, because two checkouts of the
    same version may differ.
    """
    return {
        "hvdrec": f"{hvdrec.__version__} (source {_source_hash()})",
        "torch": _version("torch"),
        "Horovod": _version("horovod"),
        "Python": ".".join(platform.python_version_tuple()[:2]),
    }


def digest(path: Location) -> str:
    """Return a short text that differs between two hosts if they see different content at a path.

    For a file, the text is the start of the file's SHA-256. For an artifact, it is the start of the
    SHA-256 of its manifest, which holds the hash of each file. All other directories give the same
    text.
    """
    for file in (path / MANIFEST, path):
        try:
            return hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except IsADirectoryError:
            return "a directory"
        except OSError as error:
            return f"unreadable ({error.strerror})"
    return MISSING_FILE


def describe_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Format ascending ranks with their hosts, such as ``ranks 1, 2 on hv2 and 4 on hv3``.

    `hosts` is the host of every rank of the job.
    """
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(rank)
    parts = [f"{_ranges(by_host[host])} on {host}" for host in list(by_host)[:MAX_HOSTS]]
    more = len(by_host) - MAX_HOSTS
    if more > 0:
        parts.append(f"more on {more} other host{'' if more == 1 else 's'}")
    return ("rank " if len(ranks) == 1 else "ranks ") + " and ".join(parts)


def describe_difference(values: Sequence[str], hosts: Sequence[str]) -> str | None:
    """Say which ranks have which value; None if the values of all ranks are equal.

    An example is ``2.13.0 (rank 0 on hv1), 2.12.1 (ranks 1, 2 on hv2)``. `values` and `hosts` have
    an entry for every rank.
    """
    by_value: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        by_value.setdefault(value, []).append(rank)
    if len(by_value) < 2:
        return None
    return ", ".join(f"{value} ({describe_ranks(r, hosts)})" for value, r in by_value.items())


def version_differences(
    rank_versions: Sequence[Mapping[str, str]], hosts: Sequence[str]
) -> str | None:
    """Return an error message that names the versions that differ between ranks, or None."""
    lines = _differences(rank_versions, hosts, "unknown")
    if not lines:
        return None
    return f"versions differ: {'; '.join(lines)}; install the same versions on every host"


def config_differences(configs: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> str | None:
    """Return an error message that names the fields that differ between ranks, or None."""
    flat = [{name: json.dumps(value) for name, value in _flatten(each)} for each in configs]
    lines = _differences(flat, hosts, "null")
    if not lines:
        return None
    more = len(lines) - MAX_FIELDS
    rest = f"; {more} more fields differ" if more > 0 else ""
    return (
        f"configurations differ: {'; '.join(lines[:MAX_FIELDS])}{rest}; "
        "use the same file and arguments on every host"
    )


def _differences(
    mappings: Sequence[Mapping[str, str]], hosts: Sequence[str], default: str
) -> list[str]:
    lines = []
    for name in dict.fromkeys(name for each in mappings for name in each):
        text = describe_difference([each.get(name, default) for each in mappings], hosts)
        if text is not None:
            lines.append(f"{name} = {text}")
    return lines


def _ranges(ranks: Sequence[int]) -> str:
    """Format ascending ranks such as ``0, 2-5``; three or more consecutive ranks become a range."""
    runs = [
        [rank for _, rank in run]
        for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])
    ]
    parts = [[f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run) for run in runs]
    return ", ".join(text for part in parts for text in part)


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each scalar in nested mappings and lists."""
    if isinstance(value, Mapping | list):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in pairs:
            yield from _flatten(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@cache
def _source_hash() -> str:
    root = Path(hvdrec.__file__).parent
    digester = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digester.update(f"{file.relative_to(root).as_posix()}\0".encode())
        digester.update(file.read_bytes())
    return digester.hexdigest()[:8]
