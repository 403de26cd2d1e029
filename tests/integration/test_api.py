"""The Python API from raw tables to a scorer gives the figures of the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import hvdrec
from tests.integration.conftest import SmallRun
from tests.small_data import small_config


def _plain(result: Any, work: str, other: str) -> Any:
    """Return a result as JSON, with the paths of another working directory."""
    return json.loads(json.dumps(result.to_dict(), allow_nan=False).replace(work, other))


def test_every_stage_gives_the_figures_of_the_command_line(
    small_run: SmallRun, tmp_path_factory: pytest.TempPathFactory
) -> None:
    work = str(tmp_path_factory.mktemp("api") / "work")
    config = small_config(str(small_run.work.parent / "raw"), work)
    config = replace(config, train=replace(config.train, cpu_layers="fused"))
    expected = str(small_run.work)

    samples = hvdrec.make_samples(config, progress=False)
    assert _plain(samples, work, expected) == small_run.samples
    assert samples.rows == {"train": 4800, "validation": 600, "test": 600}

    features = hvdrec.prepare(config, workers=1, progress=False)
    assert _plain(features, work, expected) == small_run.prepare
    assert sum(features.shards["train"]) == features.rows["train"]

    trained = hvdrec.train(config)
    assert _plain(trained, work, expected) == small_run.train

    evaluation = hvdrec.evaluate(trained.run)
    assert _plain(evaluation, work, expected) == small_run.report
    assert evaluation.ranking is not None
    assert evaluation.ranking["auc"] == small_run.report["ranking"]["auc"]

    bundle = hvdrec.export(trained.run, workers=1, progress=False)
    assert _plain(bundle, work, expected) == small_run.export
    scores = hvdrec.Scorer.load(bundle.path).score("u1", ["101", "102"], {"hour": 23})
    by_command = hvdrec.Scorer.load(small_run.work / "bundle")
    assert np.array_equal(scores, by_command.score("u1", ["101", "102"], {"hour": 23}))

    with pytest.raises(hvdrec.UserError, match="already") as caught:
        hvdrec.make_samples(config, progress=False)
    assert caught.value.field == samples.path


def test_export_overrides_fields_that_need_no_training(small_run: SmallRun, tmp_path: Any) -> None:
    run = small_run.work / "run"
    bundle = hvdrec.export(
        run, to=tmp_path / "int8", overrides={"export.embeddings": "int8"}, progress=False
    )
    assert bundle.path == str(tmp_path / "int8")
    assert bundle.precision is not None
    assert bundle.precision["embeddings"] == "int8"
    with pytest.raises(hvdrec.UserError, match="cannot change after training") as caught:
        hvdrec.export(run, to=tmp_path / "other", overrides={"model.dimension": 16})
    assert caught.value.field == "model.dimension"
    assert not (tmp_path / "other").exists()


def test_a_negative_catalogue_for_ease_is_refused(small_run: SmallRun) -> None:
    with pytest.raises(hvdrec.UserError) as caught:
        hvdrec.evaluate(small_run.work / "run", ease_items=-1)
    assert caught.value.field == "ease_items"
    assert caught.value.value == -1


def test_evaluate_overrides_its_own_fields_only(small_run: SmallRun) -> None:
    run = small_run.work / "run"
    taken = hvdrec.evaluate(run, baselines=False)
    shown = hvdrec.evaluate(
        run, baselines=False, overrides={"evaluate.seen": "shown", "evaluate.k": [3]}
    )
    assert taken.retrieval is not None and shown.retrieval is not None
    assert shown.retrieval["users"] < taken.retrieval["users"]
    assert "recall@3" in shown.retrieval
    with pytest.raises(hvdrec.UserError, match="evaluate") as caught:
        hvdrec.evaluate(run, overrides={"model.dimension": 4})
    assert (caught.value.field, caught.value.value) == ("model.dimension", 4)
