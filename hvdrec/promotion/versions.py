"""The published versions of a model: bundles in numbered directories, and which of them serves.

A directory of published versions holds ``versions/0001``, ``versions/0002``, …, each a complete
bundle. The link ``current`` points to the version that serves. ``promotions.jsonl`` has a line for
each promotion, refusal and rollback. The link is replaced in one atomic step, so a service that
watches ``current`` always finds a complete bundle.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdrec.errors import invalid_file, unknown_name, write_errors_named
from hvdrec.storage.artifacts import read_manifest
from hvdrec.storage.json_text import json_text

VERSIONS, CURRENT, HISTORY, LOCK = "versions", "current", "promotions.jsonl", ".lock"
PROMOTED, REFUSED, ROLLED_BACK = "promoted", "refused", "rolled_back"


@dataclass(frozen=True)
class Version:
    """A published version.

    Attributes:
        name: Name of its directory, such as ``0007``.
        record: The event of its promotion, with the measured values; empty if it is not recorded.
        is_current: True if this version serves.
    """

    name: str
    record: Mapping[str, Any]
    is_current: bool


class Published:
    """A directory of published versions."""

    def __init__(self, folder: Path) -> None:
        """Refer to a directory, which need not exist yet."""
        self.folder = folder

    @property
    def link(self) -> Path:
        """Path of the link ``current``, for services to load and to watch."""
        return self.folder / CURRENT

    def path(self, name: str) -> Path:
        """Return the directory of a version."""
        return self.folder / VERSIONS / name

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let only one process at a time change the versions; other processes wait."""
        with write_errors_named(self.folder):
            (self.folder / VERSIONS).mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def names(self) -> list[str]:
        """Return the names of all versions, the oldest first."""
        with suppress(FileNotFoundError):
            return sorted(
                (each.name for each in (self.folder / VERSIONS).iterdir() if each.name.isdigit()),
                key=int,
            )
        return []

    def current(self) -> str | None:
        """Return the name of the version that serves; None if there is none.

        Raises:
            UserError: ``current`` is not a link, or the version that it points to is missing.
        """
        if not self.link.is_symlink():
            if self.link.exists():
                problem = "is not a link to a version"
                raise invalid_file(self.link, problem, "move it away, then promote again")
            return None
        name = Path(os.readlink(self.link)).name
        if name not in self.names():
            remedy = f"point it to a version: hvdrec promote --rollback VERSION --to {self.folder}"
            raise invalid_file(self.link, f"names version '{name}', which is missing", remedy)
        return name

    def history(self) -> list[dict[str, Any]]:
        """Return all recorded events, the oldest first; incomplete lines are left out."""
        events = []
        with suppress(FileNotFoundError):
            for line in (self.folder / HISTORY).read_text().splitlines():
                with suppress(ValueError):
                    events.append(json.loads(line))
        return events

    def record(self, name: str | None) -> dict[str, Any]:
        """Return the event of a version's latest promotion; empty if it is not recorded."""
        events = [e for e in self.history() if e["event"] == PROMOTED and e.get("version") == name]
        return events[-1] if events else {}

    def versions(self) -> list[Version]:
        """Return all versions, the oldest first."""
        current = self.current()
        return [Version(name, self.record(name), name == current) for name in self.names()]

    def note(self, event: str, **facts: Any) -> dict[str, Any]:
        """Append an event to the history and return it."""
        line = {"event": event, "time": round(time.time(), 3), **facts}
        with (
            write_errors_named(self.folder / HISTORY),
            (self.folder / HISTORY).open("a", encoding="utf-8") as file,
        ):
            file.write(json_text(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return line

    def next_name(self) -> str:
        """Return the name of the next version; names of removed versions are not used again."""
        used = [*self.names(), *(str(e["version"]) for e in self.history() if e.get("version"))]
        return f"{max((int(name) for name in used if name.isdigit()), default=0) + 1:04d}"

    def publish(self, bundle: Path) -> str:
        """Move a complete bundle to a new version and let it serve; no file is copied.

        The bundle must be on the same file system as the versions.

        Returns:
            The name of the version.
        """
        name = self.next_name()
        with write_errors_named(self.folder):
            bundle.rename(self.path(name))
            self._point(name)
        return name

    def roll_back(self, name: str | None = None) -> tuple[str | None, str]:
        """Let an earlier version serve again.

        Args:
            name: Version that is to serve; None for the newest version before the current one.

        Returns:
            The version that served before, None if unknown, and the version that serves now.

        Raises:
            UserError: There is no such version, or its bundle is damaged.
        """
        names = self.names()
        before: str | None = None
        with suppress(ValueError):  # the link may be damaged; a rollback repairs it
            before = self.current()
        if name is None:
            older = [each for each in names if before is None or int(each) < int(before)]
            if not older:
                problem = "holds no version before the current one"
                raise invalid_file(self.folder, problem, "promote another run")
            name = older[-1]
        elif name not in names:
            raise unknown_name("--rollback", name, names)
        read_manifest(self.path(name), "bundle")
        with write_errors_named(self.folder):
            self._point(name)
        return before, name

    def prune(self, keep: int) -> list[str]:
        """Remove old versions, except the newest `keep`, the current one and the one before it."""
        names, current = self.names(), self.current()
        spared = set(names[-keep:])
        if current is not None:
            at = names.index(current)
            spared |= set(names[max(0, at - 1) : at + 1])
        removed = [name for name in names if name not in spared]
        for name in removed:
            shutil.rmtree(self.path(name), ignore_errors=True)
        return removed

    def _point(self, name: str) -> None:
        """Replace the link in one atomic step."""
        draft = self.link.with_name(f".{CURRENT}.{uuid.uuid4().hex[:8]}")
        draft.symlink_to(Path(VERSIONS) / name)
        draft.replace(self.link)
