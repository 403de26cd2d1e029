"""A search on several ranks, which train each trial together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.parallel.launch import BIN, launch

HVDREC = str(BIN / "hvdrec")


@pytest.mark.slow
def test_a_failed_trial_does_not_end_a_search_on_several_ranks(small: Path, tmp_path: Path) -> None:
    features = small.parent / "work/features"
    options = ["tune", str(small), "--paths.features", str(features), "--trials", "3"]
    # The configured learning rate, one that diverges, and another one.
    options += ["--search", "train.learning_rate=0.005,1e30,0.004"]
    searches = []
    for ranks, launcher in ((1, ""), (2, "horovodrun"), (2, "mpirun")):
        work = tmp_path / f"{ranks}{launcher}"
        done = launch([HVDREC, *options, "--paths.work", str(work)], ranks, launcher)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("3 trials by validation auc") == 1
        searches.append(json.loads((work / "tune/trials.json").read_text())["trials"])
    alone, *together = searches
    assert sorted(trial["state"] for trial in alone) == ["complete", "complete", "failed"]
    for trials in together:
        for one, other in zip(alone, trials, strict=True):
            assert other["values"] == one["values"]
            assert other["state"] == one["state"]
            # Batches of several ranks hold other rows, so values are similar but not equal.
            if one["state"] == "complete":
                assert abs(other["value"] - one["value"]) < 0.05
                assert len(other["validations"]) == len(one["validations"]) == 2
