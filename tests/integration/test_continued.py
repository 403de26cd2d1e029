"""Days of a log, one after another: prepare --from and train --from, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hvdrec
from hvdrec.config import Config, Feature
from hvdrec.config.loading import load_config
from hvdrec.errors import UserError
from hvdrec.storage.artifacts import read_manifest
from hvdrec.training.pointers import find_checkpoint
from tests.growing_data import write_day

Day = Callable[..., Config]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the first day is prepared and trained."""
    folder = tmp_path_factory.mktemp("days")
    faster = {"train.epochs": 8, "train.batch_size": 32, "train.checkpoint_every": 0}
    config = load_config(write_day(folder, 0, range(10)), faster)
    hvdrec.make_samples(config)
    hvdrec.prepare(config, workers=1, progress=False)
    hvdrec.train(config, progress=False)
    return folder


@pytest.fixture(scope="module")
def second(first: Path) -> Path:
    """Return the TOML file of the second day, whose features go on from those of the first."""
    file = write_day(first, 1, range(2, 20))
    config = load_config(file)
    hvdrec.make_samples(config)
    hvdrec.prepare(config, start_from=first / "day0/work/features", workers=1, progress=False)
    return file


def log(config: Config) -> list[dict[str, Any]]:
    lines = (config.paths.of("run") / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_goes_on_with_its_steps_and_is_validated_before_it_trains(
    first: Path, second: Path, tmp_path: Path
) -> None:
    config = load_config(
        second, {"paths.run": str(tmp_path / "run"), "train.epochs": 2, "train.batch_size": 0}
    )
    before = find_checkpoint(first / "day0/work/run", "best")
    steps = before.manifest.meta["position"]["step"]
    result = hvdrec.train(config, start_from=first / "day0/work/run", progress=False)
    events = log(config)
    start = next(event for event in events if event["event"] == "start")
    validations = [event for event in events if event["event"] == "validation"]
    assert start["step"] == steps
    assert [event["epoch"] for event in validations] == [0, 1, 2]
    assert validations[0]["step"] == steps
    per_epoch = (result.steps - steps) // 2
    assert [event["step"] for event in validations] == [steps, steps + per_epoch, result.steps]
    assert validations[0]["auc"] > 0.55  # what the first day taught
    # The warm-up is over, and the batch size is that of the first run.
    assert start["warmup_steps"] <= steps
    assert start["batch_size"] == 32
    report = hvdrec.evaluate(tmp_path / "run", baselines=False)
    assert report.ranking is not None


@pytest.mark.slow
def test_an_added_feature_starts_from_new_rows(first: Path, second: Path, tmp_path: Path) -> None:
    old = load_config(second)
    text = second.read_text().replace(
        "\n[model]\n",
        '\n[[features]]\nname = "shown_hour"\nside = "scene"\ndtype = "int"\n[model]\n',
    )
    text = text.replace(
        "[grow]", '[samples.derive]\nshown_hour = "shown_at // 3600 % 24"\n\n[grow]'
    )
    file = tmp_path / "wider.toml"
    file.write_text(text)
    config = load_config(file, {"paths.work": str(tmp_path / "work")})
    assert len(config.features) == len(old.features) + 1
    hvdrec.make_samples(config)
    hvdrec.prepare(config, start_from=first / "day0/work/features", workers=1, progress=False)
    hvdrec.train(config, start_from=first / "day0/work/run", progress=False)
    assert hvdrec.train(load_config(second), start_from=first / "day0/work/run", progress=False)
    wide, narrow = (
        next(event for event in log(each) if event["event"] == "validation")
        for each in (config, old)
    )
    # The new feature has no influence before the first step.
    assert wide["log_loss"] == pytest.approx(narrow["log_loss"], abs=1e-6)


def test_features_record_their_ancestors_and_growth(first: Path, second: Path) -> None:
    before = read_manifest(first / "day0/work/features", "features")
    manifest = read_manifest(load_config(second).paths.of("features"), "features")
    assert manifest.meta["ancestors"] == [before.identity]
    assert manifest.meta["growth"]["item_id"]["admitted"] > 5
    assert "ancestors" not in before.meta


def refused(config: Config, run: Path, **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        hvdrec.train(config, start_from=run, progress=False, **options)
    return caught.value


def test_features_that_do_not_go_on_from_those_of_the_run_are_refused(
    first: Path, second: Path, tmp_path: Path
) -> None:
    overrides = {"paths.features": str(tmp_path / "f"), "paths.run": str(tmp_path / "run")}
    config = load_config(second, overrides)
    hvdrec.prepare(config, workers=1, progress=False)
    run = first / "day0/work/run"
    error = refused(config, run)
    assert error.field == str(find_checkpoint(run, "best").directory)
    ids = [
        read_manifest(path, "features").identity
        for path in (first / "day0/work/features", tmp_path / "f")
    ]
    assert all(each in str(error) for each in ids)
    assert "--from" in str(error)
    assert not (tmp_path / "run").exists()


def test_the_run_itself_is_refused(first: Path, second: Path) -> None:
    run = first / "day0/work/run"
    config = load_config(second, {"paths.run": str(run)})
    error = refused(config, run, overwrite=True)
    assert error.field == "--from" and str(run) in str(error)
    assert find_checkpoint(run, "best")


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("train.embedding_optimizer", "sgd", "train.embedding_optimizer"),
        ("model.tower.output", 6, "model"),
        ("train.objective", "ranking", "train.objective"),
    ],
)
def test_another_model_is_refused(
    first: Path, second: Path, tmp_path: Path, field: str, value: object, named: str
) -> None:
    config = load_config(second, {field: value, "paths.run": str(tmp_path / "run")})
    error = refused(config, first / "day0/work/run")
    assert error.field == named
    assert not (tmp_path / "run").exists()


def test_a_features_change_is_refused_before_anything_is_written(
    first: Path, second: Path, tmp_path: Path
) -> None:
    config = load_config(second, {"paths.features": str(tmp_path / "f")})
    features = tuple(
        Feature("item_id", side="item", dimension=8) if each.name == "item_id" else each
        for each in config.features
    )
    wider = hvdrec.load_config(second, {"paths.features": str(tmp_path / "f")})
    object.__setattr__(wider, "features", features)
    with pytest.raises(UserError) as caught:
        hvdrec.prepare(wider, start_from=first / "day0/work/features", workers=1, progress=False)
    assert caught.value.field == "features.item_id.dimension"
    assert not (tmp_path / "f").exists()


def test_features_can_go_on_in_place(first: Path, second: Path, tmp_path: Path) -> None:
    config = load_config(second, {"paths.features": str(tmp_path / "f")})
    hvdrec.prepare(config, workers=1, progress=False)
    before = read_manifest(tmp_path / "f", "features").identity
    result = hvdrec.prepare(
        config, start_from=tmp_path / "f", overwrite=True, workers=1, progress=False
    )
    # The rows were counted before, so nothing is admitted.
    assert result.growth["item_id"] == {"admitted": 0, "evicted": 0, "free": 0}
    assert read_manifest(tmp_path / "f", "features").meta["ancestors"] == [before]
