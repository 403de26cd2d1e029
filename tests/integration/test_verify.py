"""`hvdrec verify` over all artifacts of a small run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hvdrec.errors import UserError
from hvdrec.storage.artifacts import read_manifest, write_manifest
from hvdrec.training.verification import find_artifacts, other_sources, verify
from tests.integration.conftest import SmallRun, hvdrec


@pytest.fixture
def work(small_run: SmallRun, tmp_path: Path) -> Path:
    """Return a copy of the work directory that a test may damage."""
    return Path(shutil.copytree(small_run.work, tmp_path / "work"))


def test_a_whole_work_directory_is_verified(work: Path) -> None:
    done = hvdrec("verify", work, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert all(artifact["ok"] for artifact in facts["artifacts"])
    kinds = {artifact["kind"] for artifact in facts["artifacts"]}
    assert kinds == {"samples", "features", "checkpoint", "bundle"}
    assert facts["other_sources"] == []


def test_every_damaged_file_is_named(work: Path) -> None:
    """One flipped bit in a file of each artifact, in its manifest, and in the run's own files."""
    folders = [folder for folder in find_artifacts(work) if isinstance(folder, Path)]
    files = [work / "run" / name for name in ("latest", "best", "config.json")]
    for folder in folders:
        largest = max(verify(folder).manifest.files.items(), key=lambda item: item[1]["bytes"])
        files += [folder / largest[0], folder / "manifest.json"]
    for file in files:
        whole = file.read_bytes()
        at = whole.rindex(b'"sha256"') + 20 if file.name == "manifest.json" else len(whole) // 2
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError) as caught:
            for folder in find_artifacts(work):
                verify(folder)
        assert str(file) in str(caught.value)
        file.write_bytes(whole)


def test_damage_ends_in_exit_code_2_and_the_rest_is_verified(work: Path) -> None:
    file = work / "features" / "preprocess.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    done = hvdrec("verify", work / "features")
    assert done.returncode == 2
    assert str(file) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = hvdrec("verify", work)
    assert done.returncode == 2
    assert f"damaged: {file}" in done.stdout
    assert f"{work / 'bundle'}: ok, bundle" in done.stdout


def test_an_artifact_made_from_another_version_is_reported(work: Path) -> None:
    samples = work / "samples"
    (samples / "more.txt").write_text("more")
    write_manifest(samples, "samples", read_manifest(samples, "samples").meta)
    verified = [verify(folder) for folder in find_artifacts(work)]
    lines = list(other_sources(verified))
    assert {line.partition(":")[0] for line in lines} == {
        str(work / name) for name in ("features", "bundle")
    }
    assert all("hvdrec samples" in line for line in lines)
    assert hvdrec("verify", work).returncode == 1


def test_a_directory_without_artifacts_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no artifact here"):
            find_artifacts(path)
