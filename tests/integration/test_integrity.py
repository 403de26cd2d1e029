"""Artifacts that do not belong together, damaged files and interrupted writers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import hvdrec
from hvdrec import Config, UserError
from hvdrec.storage.artifacts import read_manifest, write_manifest
from hvdrec.storage.checksums import sealed, unsealed
from hvdrec.storage.lineage import require_source
from hvdrec.training import checkpoint
from hvdrec.training.pointers import find_checkpoint
from tests.integration.conftest import SmallRun


@dataclass(frozen=True)
class Copy:
    """A copy of the small run's work directory, whose run reads the copied artifacts."""

    config: Config
    work: Path

    @property
    def run(self) -> Path:
        return self.work / "run"

    def evaluate(self, **options: Any) -> Any:
        return hvdrec.evaluate(self.run, baselines=False, **options)

    def export(self) -> Any:
        return hvdrec.export(self.run, overwrite=True, workers=1, progress=False)

    def resume(self, **fields: Any) -> Any:
        changes = {"paths.work": str(self.work), "train.cpu_layers": "fused", **fields}
        config = hvdrec.load_config(self.config_file, changes)
        return hvdrec.train(config, resume=True, progress=False)

    @property
    def config_file(self) -> Path:
        return self.work / "config-file"


@pytest.fixture
def copy(small_run: SmallRun, tmp_path: Path) -> Copy:
    work = tmp_path / "work"
    shutil.copytree(small_run.work, work)
    (work / "config-file").write_bytes(small_run.config.read_bytes())
    file = work / "run" / "config.json"
    stored = unsealed(file.read_bytes())
    stored["paths"]["work"] = str(work)
    file.write_text(sealed(stored))
    config = hvdrec.load_config(small_run.config, {"paths.work": str(work)})
    return Copy(config, work)


def alter(artifact: Path, kind: str, name: str) -> str:
    """Replace an artifact by one with another file; return its identity."""
    (artifact / name).write_text("other")
    write_manifest(artifact, kind, read_manifest(artifact, kind).meta)
    return read_manifest(artifact, kind).identity


def refused(action: Callable[[], Any]) -> UserError:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return caught.value


def test_each_artifact_records_what_it_was_made_from(small_run: SmallRun) -> None:
    work = small_run.work
    samples = read_manifest(work / "samples", "samples")
    features = read_manifest(work / "features", "features")
    assert features.made_from("samples") == samples.identity
    latest = work / "run/checkpoints" / (work / "run/latest").read_text().split()[0]
    best = work / "run/checkpoints" / (work / "run/best").read_text().split()[0]
    assert read_manifest(latest, "checkpoint").made_from("features") == features.identity
    assert read_manifest(work / "bundle", "bundle").meta["made_from"] == {
        "samples": samples.identity,
        "features": features.identity,
        "checkpoint": read_manifest(best, "checkpoint").identity,
    }


def test_a_run_on_features_that_were_made_again_is_refused(copy: Copy) -> None:
    before = read_manifest(copy.work / "features", "features").identity
    now = alter(copy.work / "features", "features", "more.txt")
    teacher = {"train.teacher": str(copy.run), "paths.run": str(copy.work / "student")}
    for action in (
        copy.evaluate,
        copy.export,
        lambda: copy.resume(**{"train.epochs": 9}),
        lambda: copy.resume(**teacher),
    ):
        text = str(refused(action))
        assert before in text and now in text and str(copy.work / "features") in text
        assert "--overwrite" in text


def test_features_of_samples_that_were_made_again_are_refused(copy: Copy) -> None:
    now = alter(copy.work / "samples", "samples", "more.txt")
    text = str(refused(copy.export))
    assert now in text and str(copy.work / "samples") in text and "hvdrec prepare" in text


def test_equal_samples_made_again_are_accepted(copy: Copy) -> None:
    manifest = read_manifest(copy.work / "samples", "samples")
    write_manifest(copy.work / "samples", "samples", {**manifest.meta, "note": 1})
    assert read_manifest(copy.work / "samples", "samples").identity == manifest.identity
    features = copy.work / "features"
    made = read_manifest(features, "features")
    assert require_source(features, made, copy.work / "samples", "samples", "")


def test_artifacts_of_earlier_versions_are_accepted_with_a_line(
    copy: Copy, capfd: pytest.CaptureFixture[str]
) -> None:
    for file in copy.work.rglob("manifest.json"):
        raw = json.loads(file.read_text())
        del raw["checksum"]
        raw["meta"].pop("made_from", None)
        file.write_text(json.dumps(raw))
    copy.export()
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if "does not record its features" in line]
    assert [line for line in lines if "does not record its samples" in line]


@pytest.mark.parametrize("name", ["model.safetensors", "tables.safetensors", "manifest.json"])
def test_a_flipped_bit_in_a_checkpoint_is_named(copy: Copy, name: str) -> None:
    for folder in (copy.run / "checkpoints").iterdir():
        data = bytearray((folder / name).read_bytes())
        data[len(data) * 9 // 10] ^= 4
        (folder / name).write_bytes(data)
    for action in (copy.evaluate, copy.export, lambda: copy.resume(**{"train.epochs": 3})):
        error = refused(action)
        assert Path(error.field).name == name and "write the name of another" in str(error)


@pytest.mark.parametrize("content", [b"", b"\xb0", b"{}", b"[1]"])
def test_a_damaged_configuration_of_a_run_is_named(copy: Copy, content: bytes) -> None:
    (copy.run / "config.json").write_bytes(content)
    for action in (copy.evaluate, copy.export, copy.resume):
        assert refused(action).field == str(copy.run / "config.json")


def test_a_flipped_value_in_the_configuration_of_a_run_is_named(copy: Copy) -> None:
    file = copy.run / "config.json"
    text = file.read_text()
    assert '"seed": 0' in text
    file.write_text(text.replace('"seed": 0', '"seed": 1'))
    assert "differ from its checksum" in str(refused(copy.evaluate))


def test_each_step_has_one_checkpoint(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, save = [], checkpoint.save

    def record(run: Path, position: checkpoint.Position, *others: Any) -> None:
        saved.append(position.step)
        save(run, position, *others)

    monkeypatch.setattr(checkpoint, "save", record)
    steps = read_manifest(find_checkpoint(copy.run, "latest").directory, "checkpoint")
    per_epoch = steps.meta["position"]["step"] // 2
    copy.resume(**{"paths.run": str(copy.work / "new"), "train.checkpoint_every": per_epoch})
    assert saved == [per_epoch, 2 * per_epoch]
    assert find_checkpoint(copy.work / "new", "latest").metrics
