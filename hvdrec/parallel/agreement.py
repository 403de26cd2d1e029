"""What the processes of a job must have in common, and which host or rank differs."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import hvdrec
from hvdrec.storage.artifacts import MANIFEST

ABSENT = "not there"
NAMED_HOSTS, NAMED_FIELDS = 4, 4
"""How many hosts and fields a line names before it counts the rest."""


def host_name() -> str:
    """Return the name of this host."""
    return socket.gethostname()


def versions() -> dict[str, str]:
    """Return the versions that must be the same everywhere, by what people call them.

    Beside hvdrec's version stand the first digits of a hash of its source: two checkouts of one
    version may differ.
    """
    return {
        "hvdrec": f"{hvdrec.__version__} (source {_source()})",
        "torch": _version("torch"),
        "Horovod": _version("horovod"),
        "Python": ".".join(platform.python_version_tuple()[:2]),
    }


class Place(Protocol):
    """Where files are: a path, or what does the same for a store."""

    def __truediv__(self, name: str, /) -> Place: ...

    def read_bytes(self) -> bytes: ...


def digest(place: Place) -> str:
    """Return what tells whether two hosts see the same at a place.

    The hash of a file or of an artifact's manifest, which names the hash of each of its files; any
    other directory is only there or not.
    """
    for file in (place / MANIFEST, place):
        try:
            return hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except IsADirectoryError:
            return "a directory"
        except OSError as error:
            return f"unreadable ({error.strerror})"
    return ABSENT


def places(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Return where ranks are, for people: ``ranks 1, 2 on hv2 and 4 on hv3``.

    hosts: the host of every rank of the job.
    """
    found = list(_by_host(ranks, hosts).items())
    parts = [f"{_numbers(numbers)} on {host}" for host, numbers in found[:NAMED_HOSTS]]
    if len(found) > NAMED_HOSTS:
        parts.append(f"more on {_others(len(found) - NAMED_HOSTS)}")
    return ("rank " if len(ranks) == 1 else "ranks ") + " and ".join(parts)


def difference(values: Sequence[str], hosts: Sequence[str]) -> str | None:
    """Return who has which value, or None where all ranks have the same.

    ``2.13.0 on hv1 (rank 0), 2.12.1 on hv2 (ranks 1, 2)``.
    """
    by_value: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        by_value.setdefault(value, []).append(rank)
    if len(by_value) < 2:
        return None
    return ", ".join(f"{value} on {_in_brackets(who, hosts)}" for value, who in by_value.items())


def different_versions(found: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> str | None:
    """Return a line that names each version in which the ranks differ, or None."""
    names = dict.fromkeys(name for versions in found for name in versions)
    lines = []
    for name in names:
        values = [versions.get(name, "not known") for versions in found]
        told = difference(values, hosts)
        if told is not None:
            lines.append(f"{name} {told}")
    if not lines:
        return None
    return f"different versions: {'; '.join(lines)}; install the same on every host"


def different_fields(found: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> str | None:
    """Return a line that names the fields in which the ranks' configurations differ, or None."""
    flat = [dict(_flatten(each)) for each in found]
    names = dict.fromkeys(name for each in flat for name in each)
    lines = []
    for name in names:
        told = difference([json.dumps(each.get(name)) for each in flat], hosts)
        if told is not None:
            lines.append(f"{name} is {told}")
    if not lines:
        return None
    more = len(lines) - NAMED_FIELDS
    rest = f"; {more} more fields differ" if more > 0 else ""
    return (
        f"different configurations: {'; '.join(lines[:NAMED_FIELDS])}{rest}; "
        "give every host the same file and arguments"
    )


def _by_host(ranks: Sequence[int], hosts: Sequence[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank in ranks:
        found.setdefault(hosts[rank], []).append(rank)
    return found


def _in_brackets(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    found = list(_by_host(ranks, hosts).items())
    parts = [
        f"{host} ({'rank' if len(numbers) == 1 else 'ranks'} {_numbers(numbers)})"
        for host, numbers in found[:NAMED_HOSTS]
    ]
    if len(found) > NAMED_HOSTS:
        parts.append(_others(len(found) - NAMED_HOSTS))
    return " and ".join(parts)


def _others(count: int) -> str:
    return "another host" if count == 1 else f"{count} other hosts"


def _numbers(ranks: Sequence[int]) -> str:
    """Return numbers for people, runs of three and more as such: ``0, 2-5``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [
        [f"{run[0]}-{run[-1]}"] if len(run) > 2 else [str(rank) for rank in run] for run in runs
    ]
    return ", ".join(text for part in parts for text in part)


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the scalars of nested mappings and lists with their dotted names."""
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
def _source() -> str:
    root = Path(hvdrec.__file__).parent
    found = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        found.update(f"{file.relative_to(root).as_posix()}\0".encode())
        found.update(file.read_bytes())
    return found.hexdigest()[:8]
