"""Drafts beside a path: who may remove them, and how they take its place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvdrec.storage import drafts
from hvdrec.storage.artifacts import read_manifest, write_artifact
from hvdrec.storage.drafts import draft_directory, draft_file, remove_leftovers, write_text

KILLED = """
import os, signal, sys
from pathlib import Path
from hvdrec.storage.artifacts import write_artifact
with write_artifact(Path(sys.argv[1]), "raw", overwrite=True) as draft:
    (draft / "half.bin").write_bytes(b"0" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "raw")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [name for name in names(tmp_path) if name.endswith(".partial")]
    with write_artifact(tmp_path / "raw", "raw"):
        pass
    assert names(tmp_path) == ["raw"]


def test_drafts_of_earlier_versions_and_of_files_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".latest.0badcafe").write_text("step")
    (tmp_path / ".step-00000002.deadbeef.partial").mkdir()
    (tmp_path / ".step-00000002.deadbeef.partial" / "tables").write_text("half")
    kept = [".hidden", ".latest.txt", ".other.0badcafe", ".step-2.deadbeef.partial.txt", "a"]
    for name in kept[:2] + kept[3:]:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".other.0badcafe").mkdir()
    remove_leftovers(tmp_path, "latest")
    assert ".latest.0badcafe" not in names(tmp_path)
    assert ".step-00000002.deadbeef.partial" in names(tmp_path)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(set(kept) - {".other.0badcafe"})


def test_drafts_of_live_writers_stay(tmp_path: Path) -> None:
    with draft_directory(tmp_path / "raw") as one, draft_directory(tmp_path / "raw") as other:
        (one / "a").write_text("a")
        with draft_file(tmp_path / "latest") as text:
            remove_leftovers(tmp_path)
            assert one.is_dir() and other.is_dir() and text.is_file()
    assert names(tmp_path) == ["latest", "raw"]


def test_without_locks_only_old_drafts_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: int) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(drafts.fcntl, "flock", no_locks)
    for name, age in ((".raw.00000001", 0.0), (".raw.00000002", 2 * drafts.UNLOCKED_SECONDS)):
        file = tmp_path / f"{name}.partial"
        file.write_text("half")
        os.utime(file, (time.time() - age,) * 2)
    write_text(tmp_path / "raw", "new")
    assert names(tmp_path) == [".raw.00000001.partial", "raw"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_artifact_is_replaced_with_and_without_an_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(drafts, "_exchange", lambda *_: False)
    for rows in (1, 2):
        with write_artifact(tmp_path / "raw", "raw", {"rows": rows}, overwrite=True) as draft:
            (draft / f"{rows}.txt").write_text("text")
    assert read_manifest(tmp_path / "raw", "raw").meta == {"rows": 2}
    assert names(tmp_path) == ["raw"]
    assert names(tmp_path / "raw") == ["2.txt", "manifest.json"]


def test_an_artifact_that_a_killed_writer_moved_aside_is_moved_back(tmp_path: Path) -> None:
    with write_artifact(tmp_path / "raw", "raw", {"rows": 1}):
        pass
    (tmp_path / "raw").rename(tmp_path / ".raw.deadbeef.old")
    remove_leftovers(tmp_path)
    assert read_manifest(tmp_path / "raw", "raw").meta == {"rows": 1}
    assert names(tmp_path) == ["raw"]
