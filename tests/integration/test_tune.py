"""hvdrec tune on small data: trials, an interruption, and mistakes."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from hvdrec.storage.checksums import sealed, unsealed
from tests.integration.conftest import HVDREC, SmallRun, hvdrec, succeed

SEARCH = ("train.embedding-learning-rate=log:0.05:0.8", "model.dimension=8,16,32")
ONLY_FBGEMM = ("--parallel.kernel", "fbgemm")


@pytest.fixture(scope="module")
def options(small_run: SmallRun) -> tuple[str, ...]:
    features = small_run.work / "features"
    return ("tune", str(small_run.config), "--paths.features", str(features))


def _trials(folder: Path) -> list[dict[str, Any]]:
    found: dict[str, Any] = json.loads((folder / "tune/trials.json").read_text())
    return [{**trial, "seconds": 0} for trial in found["trials"]]


@pytest.fixture(scope="module")
def tuned(options: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search of four trials that nothing interrupted."""
    folder = tmp_path_factory.mktemp("tuned")
    facts = succeed(*options, "--search", *SEARCH, "--trials", "4", "--paths.work", folder)
    assert facts["path"] == str(folder / "tune/trials.json")
    assert [trial["state"] for trial in facts["trials"]] == ["complete"] * 4
    assert facts["best"]["auc"] == max(trial["value"] for trial in facts["trials"])
    return folder


def test_the_first_trial_equals_hvdrec_train(tuned: Path, small_run: SmallRun) -> None:
    first = _trials(tuned)[0]
    assert first["values"] == {"train.embedding_learning_rate": 0.5, "model.dimension": 8}
    assert first["value"] == small_run.train["validation"]["auc"]


@pytest.mark.slow
def test_the_best_trial_can_be_repeated_and_keeps_its_checkpoint(
    tuned: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    found = json.loads((tuned / "tune/trials.json").read_text())
    best, trials = found["best"], found["trials"]
    paths = ("--paths.features", small_run.work / "features", "--paths.run", tmp_path / "run")
    again = succeed("train", small_run.config, *shlex.split(best["overrides"]), *paths)
    assert again["validation"] == {"auc": best["auc"], "step": trials[best["trial"]]["step"]}
    for trial in trials:
        folder = tuned / f"tune/trial-{trial['number']:03d}"
        assert (folder / "log.jsonl").is_file()
        assert (folder / "checkpoints").is_dir() == (trial["number"] == best["trial"])
    folder = tuned / f"tune/trial-{best['trial']:03d}"
    report = succeed("evaluate", folder, "--split", "validation", "--no-baselines")
    assert report["ranking"]["auc"] == pytest.approx(best["auc"], abs=1e-12)


@pytest.mark.slow
def test_a_killed_search_resumes_with_the_same_trials(
    tuned: Path, options: tuple[str, ...], tmp_path: Path
) -> None:
    command = [HVDREC, *options, "--search", *SEARCH, "--paths.work", str(tmp_path)]
    with subprocess.Popen(
        [*command, "--trials", "4"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while not (tmp_path / "tune/trial-001/latest").is_file():  # the first of its two epochs
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    states = [trial["state"] for trial in _trials(tmp_path)]
    assert states == ["complete", "running"]
    # A resumed search knows its fields.
    succeed(*options, "--trials", "3", "--paths.work", tmp_path)
    assert len(_trials(tmp_path)) == 3
    succeed(*options, "--search", *SEARCH, "--trials", "4", "--paths.work", tmp_path)
    uninterrupted, resumed = _trials(tuned), _trials(tmp_path)
    assert resumed[1]["starts"] != [0]
    assert [{**trial, "starts": 0} for trial in resumed] == [
        {**trial, "starts": 0} for trial in uninterrupted
    ]


@pytest.mark.slow
def test_later_trials_use_the_cpu_layers_of_the_first(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    command = (*options, "--search", *SEARCH, "--train.epochs", "1", "--paths.work", tmp_path)
    succeed(*command, "--trials", "1")
    first = tmp_path / "tune/trial-000/config.json"
    recorded = unsealed(first.read_bytes())
    other = "plain" if recorded["train"]["cpu_layers"] != "plain" else "fused"
    recorded["train"]["cpu_layers"] = other
    first.write_text(sealed(recorded))
    succeed(*command, "--trials", "2")
    second = json.loads((tmp_path / "tune/trial-001/config.json").read_text())
    assert second["train"]["cpu_layers"] == other


def test_a_different_search_in_the_same_folder_is_refused(
    tuned: Path, options: tuple[str, ...]
) -> None:
    for more, message in (
        (
            ("--search", "model.dimension=8,16"),
            "holds a search with search train.embedding-learning",
        ),
        (
            ("--train.epochs", "3"),
            "holds a search with train.epochs = 2, now 3; resume it with those",
        ),
    ):
        done = hvdrec(*options, "--paths.work", tuned, *more)
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1]
    assert len(_trials(tuned)) == 4


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ((), "give at least one field with a range; train.learning_rate=log:1e-4:1e-2"),
        (("--search", "model.dimensions=8,16"), "did you mean 'model.dimension'?"),
        (("--search", "samples.label=a,b"), "decides what the samples and features are, which"),
        (("--search", SEARCH[0], "--trials", "0"), "trials = 0: must be at least 1"),
        (("--search", SEARCH[0], "--paths.features", "none"), "none: no features artifact here"),
        (
            ("--search", SEARCH[0], *ONLY_FBGEMM, "--train.embedding-optimizer", "adam"),
            "parallel.kernel = 'fbgemm': cannot hold table 'user_id': ",
        ),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    options: tuple[str, ...], tmp_path: Path, search: tuple[str, ...], message: str
) -> None:
    done = hvdrec(*options, "--paths.work", tmp_path / "work", *search)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("hvdrec: error: ")
    assert message in line
    assert not (tmp_path / "work/tune/trials.json").exists()


@pytest.mark.slow
def test_a_failing_trial_does_not_end_the_search(options: tuple[str, ...], tmp_path: Path) -> None:
    search = ("train.learning_rate=0.005,1e30", "--trials", "5")
    done = hvdrec(*options, "--search", *search, "--paths.work", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [trial["state"] for trial in _trials(tmp_path)] == ["complete", "failed"]
    assert "has diverged" in _trials(tmp_path)[1]["reason"]
    assert "no trial was better than the configuration as it is (trial 0)" in done.stdout
