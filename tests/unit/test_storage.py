"""Artifacts and shards in a remote store: an fsspec store in memory that can stop responding."""

from __future__ import annotations

import errno
import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from hvdrec.cli import main
from hvdrec.config import Config
from hvdrec.config.data_sections import Loader, Paths
from hvdrec.config.schema import Feature
from hvdrec.data.batch import Batch
from hvdrec.data.loader import ShardLoader
from hvdrec.errors import UserError
from hvdrec.storage import urls as storage
from hvdrec.storage.artifacts import (
    DRAFT_MANIFEST,
    MANIFEST,
    fetch_artifact,
    read_manifest,
    verify_artifact,
    write_artifact,
)
from hvdrec.storage.parquet import read_tables
from hvdrec.storage.urls import Url, as_location, retried
from tests.unit.test_loader import SCHEMA, numbers, shard, tensors, write_shards


class Store(MemoryFileSystem):
    """A store in memory that records operations and fails the next `away` requests."""

    protocol = "away"
    root_marker = ""
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    operations: ClassVar[list[tuple[str, str]]] = []
    away = 0
    lock = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> Any:
        return super()._strip_protocol(path.removeprefix("away://"))

    @classmethod
    def respond(cls, operation: str, path: str) -> None:
        with cls.lock:
            if cls.away:
                cls.away -= 1
                raise ConnectionResetError(errno.ECONNRESET, "the store is away")
            cls.operations.append((operation, path.rsplit("/", 1)[-1]))

    def info(self, path: str, **options: Any) -> Any:
        self.respond("info", path)
        return super().info(path, **options)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        self.respond("open" if mode == "rb" else "put", path)
        return super()._open(path, mode, **options)

    def rm_file(self, path: str) -> None:
        self.respond("remove", path)
        super()._rm(path)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Store]]:
    fsspec.register_implementation("away", Store, clobber=True)
    Store.store.clear()
    Store.pseudo_dirs[:] = [""]
    Store.operations.clear()
    monkeypatch.setattr(Store, "away", 0)
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(storage, "LONGEST_PAUSE", 0.002)
    yield Store
    Store.clear_instance_cache()


def make(path: Any, kind: str = "bundle", text: str = "hello", **options: bool) -> Any:
    with write_artifact(path, kind, {"rows": 3}, **options) as draft:
        (draft / "part").mkdir()
        (draft / "part/a.txt").write_text(text)
        (draft / "b.bin").write_bytes(b"\x00\x01")
    return path


def put(url: Url, contents: bytes) -> None:
    url.filesystem.pipe_file(url.path, contents)


# --------------------------------------------------------------------------------------- locations


def test_paths_and_urls_are_parsed(tmp_path: Path) -> None:
    assert as_location("runs/a") == Path("runs/a")
    assert as_location(f"file://{tmp_path}/a b") == tmp_path / "a b"
    assert as_location("s3://bucket/a/") == Url("s3://bucket/a")
    assert (
        str(as_location("s3://bucket/a") / "train" / "x.parquet") == "s3://bucket/a/train/x.parquet"
    )
    assert (as_location("s3://bucket/a") / "b").name == "b"


def test_only_raw_tables_features_and_bundles_may_be_remote() -> None:
    features = (Feature("user_id"), Feature("item_id", side="item"))
    paths = Paths("s3://b/raw", work="w", features="s3://b/features", bundle="gs://b/bundle")
    config = Config("run", features, paths=paths)
    assert config.paths.of("features") == Url("s3://b/features")
    assert config.paths.of("bundle") == Url("gs://b/bundle")
    assert config.paths.of("samples") == Path("w/samples")
    for key in ("work", "samples", "run"):
        with pytest.raises(UserError, match=rf"^paths\.{key} = 's3://b/x': must be a directory; "):
            Config("run", features, paths=Paths(**{key: "s3://b/x"}))


@pytest.mark.parametrize(
    "command", [["recommend", "s3://b/x", "--user", "1"], ["export", "s3://b/x"]]
)
def test_commands_that_need_a_local_directory_refuse_a_url(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert "error: s3://b/x: must be a directory of this machine; " in capsys.readouterr().err


def test_a_missing_client_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", absent)
    with pytest.raises(UserError, match=r"^s3:.*is not installed; install hvdrec\[s3\]$"):
        Url("s3://b/x").is_file()
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"^nowhere://b/x: not the URL of a known store"):
        Url("nowhere://b/x").is_file()


# ----------------------------------------------------------------------------------------- retries


def failing(times: int, error: Callable[[], Exception]) -> Callable[[], int]:
    left = [times]

    def act() -> int:
        if left[0]:
            left[0] -= 1
            raise error()
        return 7

    return act


@pytest.mark.usefixtures("store")
def test_transient_errors_are_retried_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hvdrec.storage.urls"):
        assert retried(failing(3, lambda: ConnectionError("gone")), "s3://b/x") == 7
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    assert lines[0] == "s3://b/x: no response (gone); retrying in 0.001 s"
    assert lines[2] == "s3://b/x: no response (gone); retrying in 0.002 s"
    assert lines[3].startswith("s3://b/x: responds again after ")
    caplog.clear()
    assert retried(failing(0, RuntimeError), "s3://b/x") == 7
    assert caplog.records == []


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (FileNotFoundError("x"), FileNotFoundError, "x"),
        (ValueError("x"), ValueError, "x"),
        (OSError("Couldn't deserialize thrift"), OSError, "thrift"),
        (OSError(errno.ENOSPC, "full"), OSError, "full"),
        (PermissionError(errno.EACCES, "no"), UserError, "s3://b: the store denies access"),
    ],
)
def test_permanent_errors_are_not_retried(error: Exception, expected: type, text: str) -> None:
    calls = 0

    def act() -> None:
        nonlocal calls
        calls += 1
        raise error

    with pytest.raises(expected, match=text):
        retried(act, "s3://b")
    assert calls == 1


@pytest.mark.usefixtures("store")
def test_retries_end_after_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.01)
    with pytest.raises(UserError, match=r"^s3://b: not reachable for 0 s \(gone\); ") as caught:
        retried(failing(1000, lambda: ConnectionError("gone")), "s3://b")
    assert caught.value.field == "s3://b"


@pytest.mark.usefixtures("store")
def test_a_stopped_reader_does_not_wait_for_a_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_PAUSE", 100.0)
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(ConnectionError):
        retried(failing(1, lambda: ConnectionError("gone")), "s3://b", stopped=stopped)


# --------------------------------------------------------------------------------------- artifacts


def test_remote_and_local_artifacts_have_equal_manifests(
    store: type[Store], tmp_path: Path
) -> None:
    here, there = make(tmp_path / "here"), make(Url("away://b/there"))
    assert read_manifest(there, "bundle") == read_manifest(here, "bundle")
    assert (there / "part/a.txt").read_text() == "hello"
    assert there.is_dir()
    assert set(there.sizes()) == {MANIFEST, "b.bin", "part/a.txt"}


def test_the_manifest_is_uploaded_last_and_removed_first(store: type[Store]) -> None:
    url = make(Url("away://b/x"))
    puts = [name for operation, name in store.operations if operation == "put"]
    assert puts == [DRAFT_MANIFEST, "b.bin", "a.txt", MANIFEST]
    store.operations.clear()
    with write_artifact(url, "bundle", overwrite=True) as draft:
        (draft / "c.bin").write_bytes(b"new")
    changes = [
        f"{operation} {name}"
        for operation, name in store.operations
        if operation in ("put", "remove")
    ]
    changes[3:5] = sorted(changes[3:5])
    assert changes == [
        f"put {DRAFT_MANIFEST}",
        f"remove {MANIFEST}",
        "put c.bin",
        "remove a.txt",
        "remove b.bin",
        f"put {MANIFEST}",
        f"remove {DRAFT_MANIFEST}",
    ]
    assert set(url.sizes()) == {MANIFEST, "c.bin"}


def test_files_that_are_not_in_the_manifest_are_kept(store: type[Store]) -> None:
    url = make(Url("away://b/x"))
    put(url / "notes/mine.txt", b"mine")
    make(url, text="again", overwrite=True)
    assert (url / "notes/mine.txt").read_bytes() == b"mine"
    put(Url("away://b/other") / "mine.txt", b"mine")
    for overwrite, text in (
        (False, "already exists; pass --overwrite"),
        (True, "not an hvdrec artif"),
    ):
        with pytest.raises(UserError, match=text):
            make(Url("away://b/other"), overwrite=overwrite)
    with pytest.raises(UserError, match="contains a 'bundle' artifact; only"):
        make(url, kind="features", overwrite=True)
    with pytest.raises(UserError, match="already exists; pass --overwrite"):
        make(url)


def test_an_interrupted_upload_leaves_no_artifact_and_can_be_repeated(
    store: type[Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = make(Url("away://b/x"))
    put_file = Store.put_file

    def interrupt(self: Store, source: str, target: str, *more: Any, **options: Any) -> None:
        if target.endswith("a.txt"):
            raise RuntimeError("killed")
        put_file(self, source, target, *more, **options)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Store, "put_file", interrupt)
        make(url, text="new", overwrite=True)
    with pytest.raises(UserError, match="no bundle artifact here"):
        read_manifest(url, "bundle")
    make(url, text="new")
    assert (url / "part/a.txt").read_text() == "new"
    assert set(url.sizes()) == {MANIFEST, "b.bin", "part/a.txt"}


def test_an_error_of_the_writer_uploads_nothing(store: type[Store]) -> None:
    with pytest.raises(RuntimeError), write_artifact(Url("away://b/x"), "bundle") as draft:
        (draft / "a").write_text("a")
        raise RuntimeError
    assert Url("away://b/x").sizes() == {}


def test_a_missing_or_truncated_remote_file_is_named(store: type[Store]) -> None:
    url = make(Url("away://b/x"))
    put(url / "b.bin", b"\x00")
    with pytest.raises(UserError, match=r"away://b/x/b.bin: 1 bytes, manifest.json says 2"):
        read_manifest(url, "bundle")
    (url / "b.bin").remove()
    with pytest.raises(UserError, match=r"away://b/x/b.bin: listed in manifest.json but missing"):
        read_manifest(url, "bundle")


# ------------------------------------------------------------------------------------------- fetch


def test_fetch_copies_an_artifact_only_once(store: type[Store], tmp_path: Path) -> None:
    url, to = make(Url("away://b/x")), tmp_path / "deep/to"
    assert fetch_artifact(url, to, "bundle")
    assert (to / MANIFEST).read_bytes() == (url / MANIFEST).read_bytes()
    verify_artifact(to, "bundle")
    store.operations.clear()
    assert not fetch_artifact(url, to, "bundle")
    assert not [name for operation, name in store.operations if name == "a.txt"]
    make(url, text="later", overwrite=True)
    with pytest.raises(UserError, match="already exists; pass --overwrite"):
        fetch_artifact(url, to, "bundle")
    assert (to / "part/a.txt").read_text() == "hello"
    assert fetch_artifact(url, to, "bundle", overwrite=True)
    assert (to / "part/a.txt").read_text() == "later"
    assert [path.name for path in to.parent.iterdir()] == ["to"]


def test_a_damaged_copy_is_fetched_again(store: type[Store], tmp_path: Path) -> None:
    url, to = make(Url("away://b/x")), tmp_path / "to"
    fetch_artifact(url, to, "bundle")
    (to / "part/a.txt").write_text("HELLO")
    assert fetch_artifact(url, to, "bundle", overwrite=True)
    assert (to / "part/a.txt").read_text() == "hello"


def test_a_file_that_differs_from_its_manifest_is_not_fetched(
    store: type[Store], tmp_path: Path
) -> None:
    url = make(Url("away://b/x"))
    put(url / "part/a.txt", b"HELLO")
    with pytest.raises(UserError, match=r"away://b/x/part/a.txt: contents differ from manifest"):
        fetch_artifact(url, tmp_path / "to", "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_cannot_name_files_outside_its_directory(
    store: type[Store], tmp_path: Path
) -> None:
    url = make(Url("away://b/x"))
    raw = json.loads((url / MANIFEST).read_text())
    raw["files"]["../evil"] = raw["files"]["b.bin"]
    del raw["checksum"]
    put(url / MANIFEST, json.dumps(raw).encode())
    with pytest.raises(UserError, match=r"file name '\.\./evil' leaves the directory"):
        fetch_artifact(url, tmp_path / "to", "bundle")
    with pytest.raises(UserError, match=r"file name '\.\./evil' leaves the directory"):
        make(url, overwrite=True)


# ------------------------------------------------------------------------------------------ shards


@pytest.fixture
def shards(store: type[Store], tmp_path: Path) -> tuple[Path, Url, int]:
    """Write the same shards locally and to the store; return both folders and the row count."""
    total = write_shards(tmp_path, [25, 0, 40, 7], 6)
    url = Url("away://b/features/train")
    for file in tmp_path.glob("*.parquet"):
        (url / file.name).upload(file)
    return tmp_path, url, total


def batches(folder: Any, world: int = 2, **options: Any) -> list[Batch]:
    loaders = [
        ShardLoader(
            folder,
            SCHEMA,
            Loader(shuffle_rows=20, **options),
            batch_size=8,
            rank=rank,
            world_size=world,
        )
        for rank in range(world)
    ]
    return [batch for loader in loaders for batch in loader.epoch(0)]


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(tensor, tensors(b)[name])
        for a, b in zip(ours, theirs, strict=True)
        for name, tensor in tensors(a).items()
    )


def test_remote_shards_give_the_same_batches_as_local_ones(shards: tuple[Path, Url, int]) -> None:
    here, there, total = shards
    found = batches(there)
    assert same(found, batches(here))
    assert sorted(numbers(found)) == list(range(total))
    assert read_tables(there).equals(read_tables(here))
    loaders = [ShardLoader(f, SCHEMA, batch_size=8, rank=0, world_size=1) for f in (here, there)]
    ranges = [[(low, high) for _, low, high in each.code_ranges("user_id")] for each in loaders]
    assert ranges[0] == ranges[1]


def test_no_row_is_lost_while_a_store_does_not_respond(
    shards: tuple[Path, Url, int], store: type[Store], caplog: pytest.LogCaptureFixture
) -> None:
    here, there, total = shards
    loader = ShardLoader(there, SCHEMA, Loader(shuffle_rows=20), batch_size=8, rank=0, world_size=1)
    found: list[Batch] = []
    for number, batch in enumerate(loader.epoch(0)):
        found.append(batch)
        if number % 3 == 0:
            store.away = 6
    assert sorted(numbers(found)) == list(range(total))
    assert same(found, batches(here, 1))
    assert any("the store is away" in record.getMessage() for record in caplog.records)
    # The store is also away when an epoch begins.
    store.away = 5
    assert sorted(numbers(list(loader.epoch(1)))) == list(range(total))


def test_a_store_that_stays_away_ends_the_epoch_with_an_error(
    shards: tuple[Path, Url, int], store: type[Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.05)
    options = Loader(shuffle_rows=9)
    loader = ShardLoader(shards[1], SCHEMA, options, batch_size=8, rank=0, world_size=1)
    epoch = loader.epoch(0)
    next(epoch)
    store.away = 10**9
    with pytest.raises(UserError, match=r"train/shard-0000\d.parquet: not reachable for 0 s"):
        list(epoch)


# ------------------------------------------------------------------------------------------- cache


def test_row_groups_are_read_once_and_then_cached(
    shards: tuple[Path, Url, int], store: type[Store], tmp_path: Path
) -> None:
    here, there, _ = shards
    options: dict[str, Any] = {"cache_dir": str(tmp_path / "cache"), "cache_gb": 0.1}

    def footers_and_reads() -> int:
        store.operations.clear()
        assert same(batches(there, **options), batches(here))
        return sum(operation == "open" for operation, _ in store.operations)

    first, second = footers_and_reads(), footers_and_reads()
    groups = 5 + 0 + 7 + 2
    # Each of the two ranks reads the row groups of its windows; both read some of them.
    assert first - second >= groups
    assert same(batches(here, cache_dir=str(tmp_path / "local")), batches(here))
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


def test_rewritten_shards_are_not_read_from_the_cache(
    tmp_path: Path,
) -> None:
    options = {"cache_dir": str(tmp_path / "cache")}
    (tmp_path / "train").mkdir()
    write_shards(tmp_path / "train", [8], 4)
    assert sorted(numbers(batches(tmp_path / "train", 1, **options))) == list(range(8))
    import pyarrow.parquet as pq

    pq.write_table(shard(100, 8), tmp_path / "train/shard-00000.parquet", row_group_size=4)
    assert sorted(numbers(batches(tmp_path / "train", 1, **options))) == list(range(100, 108))


def test_an_unusable_cache_directory_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, [8], 4)
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(UserError, match="cannot be used") as caught:
        batches(tmp_path, 1, cache_dir=str(tmp_path / "file"))
    assert (caught.value.field, caught.value.value) == ("loader.cache_dir", str(tmp_path / "file"))
