"""Artifacts in local directories: atomic writes, manifests and their checks."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from hvdrec import __version__
from hvdrec.errors import UserError
from hvdrec.storage.artifacts import (
    read_manifest,
    verify_artifact,
    write_artifact,
)
from hvdrec.storage.checksums import sha256
from hvdrec.storage.drafts import write_text


def make(path: Path, kind: str = "raw", text: str = "hello", **options: bool) -> Path:
    with write_artifact(path, kind, {"rows": 3}, **options) as draft:
        (draft / "part").mkdir()
        (draft / "part" / "a.txt").write_text(text)
        (draft / "b.bin").write_bytes(b"\x00\x01")
    return path


def edit_manifest(path: Path, **changes: Any) -> Path:
    file = path / "manifest.json"
    manifest = {**json.loads(file.read_text()), **changes}
    del manifest["checksum"]  # as in the manifests of earlier versions
    file.write_text(json.dumps(manifest))
    return file


def contents(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file()
    }


def test_manifest_lists_every_file_with_its_checksum_and_size(tmp_path: Path) -> None:
    path = make(tmp_path / "new" / "raw")
    manifest = read_manifest(path, "raw")
    assert manifest.files == {
        "b.bin": {"sha256": hashlib.sha256(b"\x00\x01").hexdigest(), "bytes": 2},
        "part/a.txt": {"sha256": hashlib.sha256(b"hello").hexdigest(), "bytes": 5},
    }
    assert manifest.meta == {"rows": 3}
    assert (manifest.kind, manifest.format, manifest.written_by) == ("raw", 1, __version__)
    assert verify_artifact(path, "raw") == manifest


def test_sha256_of_abc_equals_the_published_value(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "abc") == known


def test_meta_is_read_on_exit(tmp_path: Path) -> None:
    meta: dict[str, Any] = {}
    with write_artifact(tmp_path / "raw", "raw", meta):
        meta["rows"] = 7
    assert read_manifest(tmp_path / "raw", "raw").meta == {"rows": 7}


def test_a_writer_that_raises_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="disk full"),
        write_artifact(tmp_path / "raw", "raw") as draft,
    ):
        (draft / "half.txt").write_text("half")
        raise RuntimeError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_the_path_is_empty_until_the_artifact_is_complete(tmp_path: Path) -> None:
    with write_artifact(tmp_path / "raw", "raw") as draft:
        assert not (tmp_path / "raw").exists()
        assert draft.parent == tmp_path  # the same file system, so that renaming is atomic
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw"]


def test_overwriting_that_raises_keeps_the_old_artifact(tmp_path: Path) -> None:
    path = make(tmp_path / "raw")
    before = contents(path)
    with pytest.raises(RuntimeError), write_artifact(path, "raw", overwrite=True) as draft:
        (draft / "new.txt").write_text("new")
        raise RuntimeError
    assert contents(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw"]


def test_overwriting_replaces_the_whole_artifact(tmp_path: Path) -> None:
    path = make(tmp_path / "raw")
    with write_artifact(path, "raw", overwrite=True) as draft:
        (draft / "new.txt").write_text("new")
    assert set(contents(path)) == {"manifest.json", "new.txt"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw"]


def test_an_existing_artifact_is_refused_without_overwrite(tmp_path: Path) -> None:
    path = make(tmp_path / "raw")
    before = contents(path)
    with pytest.raises(UserError) as error:
        make(path, text="other")
    assert str(error.value) == f"{path}: already exists; pass --overwrite to replace it"
    assert contents(path) == before


def test_overwriting_refuses_a_directory_that_is_not_an_artifact(tmp_path: Path) -> None:
    path = tmp_path / "thesis"
    path.mkdir()
    (path / "chapter1.txt").write_text("mine")
    with pytest.raises(UserError) as error:
        make(path, overwrite=True)
    assert str(error.value) == (
        f"{path}: exists and is not an hvdrec artifact (no manifest.json); choose another path"
    )
    assert contents(path) == {"chapter1.txt": b"mine"}


def test_overwriting_refuses_an_artifact_of_another_kind(tmp_path: Path) -> None:
    path = make(tmp_path / "x", "samples")
    before = contents(path)
    with pytest.raises(UserError) as error:
        make(path, "raw", overwrite=True)
    assert str(error.value) == (
        f"{path}: contains a 'samples' artifact; only [raw] may be replaced; choose another path"
    )
    assert contents(path) == before


def test_overwriting_replaces_an_empty_directory_and_a_damaged_artifact(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert read_manifest(make(tmp_path / "empty", overwrite=True), "raw").meta == {"rows": 3}
    damaged = make(tmp_path / "damaged")
    (damaged / "manifest.json").write_text("{")
    assert read_manifest(make(damaged, overwrite=True), "raw").meta == {"rows": 3}


def test_a_renamed_artifact_is_still_valid(tmp_path: Path) -> None:
    make(tmp_path / "raw").rename(tmp_path / "elsewhere")
    assert verify_artifact(tmp_path / "elsewhere", "raw").meta == {"rows": 3}


def test_a_missing_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_manifest(tmp_path / "nothing", "samples")
    assert str(error.value) == (
        f"{tmp_path / 'nothing'}: no samples artifact here (manifest.json is missing); "
        "run the stage that writes it"
    )


def test_an_artifact_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "raw")
    with pytest.raises(UserError) as error:
        read_manifest(path, "bundle")
    assert str(error.value) == f"{path}: is a 'raw' artifact, expected 'bundle'"


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    file = edit_manifest(make(tmp_path / "raw"), format=2)
    with pytest.raises(UserError) as error:
        read_manifest(tmp_path / "raw", "raw")
    assert (
        str(error.value) == f"{file}: format 2 is newer than this hvdrec reads (1); upgrade hvdrec"
    )


@pytest.mark.parametrize("text", ["", "{", "[1]", '"raw"', '{"kind": "raw"}'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    file = make(tmp_path / "raw") / "manifest.json"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        read_manifest(tmp_path / "raw", "raw")
    assert str(error.value).startswith(f"{file}: damaged manifest (")
    assert str(error.value).endswith("); write the artifact again")


def test_a_manifest_that_is_not_utf8_is_damaged(tmp_path: Path) -> None:
    file = make(tmp_path / "raw") / "manifest.json"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="damaged manifest"):
        read_manifest(tmp_path / "raw", "raw")


@pytest.mark.parametrize(
    "changes",
    [
        {"files": ["b.bin"]},
        {"files": {"b.bin": 2}},
        {"files": {"b.bin": {}}},
        {"files": {"b.bin": {"bytes": 2}}},
        {"format": "1"},
        {"format": None},
        {"meta": None},
    ],
)
def test_a_manifest_of_the_wrong_types_is_damaged(tmp_path: Path, changes: dict[str, Any]) -> None:
    file = edit_manifest(make(tmp_path / "raw"), **changes)
    with pytest.raises(UserError) as error:
        read_manifest(tmp_path / "raw", "raw")
    assert str(error.value).startswith(f"{file}: damaged manifest (")


@pytest.mark.parametrize("name", ["../secret", "part/../../secret", "/etc/passwd"])
def test_a_file_name_outside_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("hello")
    facts = {"sha256": hashlib.sha256(b"hello").hexdigest(), "bytes": 5}
    file = edit_manifest(make(tmp_path / "raw"), files={name: facts})
    with pytest.raises(UserError) as error:
        read_manifest(tmp_path / "raw", "raw")
    assert str(error.value) == (
        f"{file}: file name '{name}' leaves the directory; do not use this artifact"
    )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = make(tmp_path / "raw")
    (path / "b.bin").unlink()
    with pytest.raises(UserError) as error:
        read_manifest(path, "raw")
    assert str(error.value) == (
        f"{path / 'b.bin'}: listed in manifest.json but missing; write the artifact again"
    )


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = make(tmp_path / "raw")
    (path / "part" / "a.txt").write_text("hell")
    with pytest.raises(UserError) as error:
        read_manifest(path, "raw")
    assert str(error.value) == (
        f"{path / 'part' / 'a.txt'}: 4 bytes, manifest.json says 5; write the artifact again"
    )


def test_verify_detects_changed_contents_of_the_same_size(tmp_path: Path) -> None:
    path = make(tmp_path / "raw")
    (path / "part" / "a.txt").write_text("hallo")
    assert read_manifest(path, "raw").meta == {"rows": 3}  # compares sizes only
    with pytest.raises(UserError) as error:
        verify_artifact(path, "raw")
    assert str(error.value) == (
        f"{path / 'part' / 'a.txt'}: contents differ from manifest.json; write the artifact again"
    )


def test_write_text_replaces_a_file_and_leaves_no_draft(tmp_path: Path) -> None:
    write_text(tmp_path / "latest", "step-1\n")
    write_text(tmp_path / "latest", "step-2\n")
    assert contents(tmp_path) == {"latest": b"step-2\n"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_write_that_the_disk_refuses_names_the_artifact_and_keeps_the_old_one(
    tmp_path: Path, code: int
) -> None:
    path = make(tmp_path / "raw")
    before = contents(path)
    with (
        pytest.raises(UserError, match="cannot be written") as caught,
        write_artifact(path, "raw", overwrite=True),
    ):
        raise OSError(code, "refused")
    assert caught.value.field == str(path)
    assert contents(path) == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_small_file_on_a_full_disk_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("hvdrec.storage.drafts.os.fsync", full)
    with pytest.raises(UserError, match="free some space") as caught:
        write_text(tmp_path / "report.json", "{}")
    assert caught.value.field == str(tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []
