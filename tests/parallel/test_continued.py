"""Continued training on several ranks: vocabularies grow, sharded tables grow with them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from hvdrec.config import load_config
from hvdrec.config.schema import FIRST_CODE
from hvdrec.features.fit import Fitted
from hvdrec.features.prepare import prepare
from hvdrec.samples import make_samples
from hvdrec.storage.parquet import read_tables
from hvdrec.training.pointers import find_checkpoint
from tests.growing_data import write_day
from tests.parallel.conftest import HVDREC
from tests.parallel.launch import launch

Tables = Mapping[str, NDArray[np.float32]]
DAYS = {0: range(10), 1: range(2, 20), 2: range(4, 40), 3: range(30, 80)}
"""Items that are shown on each day: their number doubles, and old ones vanish."""


def tables(checkpoint: Path) -> Tables:
    """Read the whole tables of a checkpoint from its part files, whatever their number."""
    parts = [load_file(file) for file in sorted(checkpoint.glob("tables-*-of-*.safetensors"))]
    whole = {}
    for name in parts[0] if parts else ():
        rows = sum(len(part[name]) for part in parts)
        whole[name] = np.empty((rows, *parts[0][name].shape[1:]), np.float32)
        for rank, part in enumerate(parts):
            whole[name][rank :: len(parts)] = part[name]
    replicated = checkpoint / "tables.safetensors"
    return whole | (load_file(replicated) if replicated.exists() else {})


def ready(folder: Path, day: int, parent: int | None) -> Path:
    """Make the samples and features of a day; the features go on from those of another day."""
    file = write_day(folder, day, DAYS[day])
    config = load_config(file)
    make_samples(config)
    earlier = None if parent is None else folder / f"day{parent}/work/features"
    prepare(config, start_from=earlier, workers=1, progress=False)
    return file


def train(folder: Path, day: int, ranks: int, *options: str) -> Path:
    command = [HVDREC, "train", str(folder / f"day{day}/run.toml"), *options]
    done = launch(command, ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / f"day{day}/work/run"


def check_growth(folder: Path, parent: int, day: int) -> None:
    """Compare the tables of a day, before and after training, with those of another day."""
    run, before_run = (folder / f"day{each}/work/run" for each in (day, parent))
    origin = find_checkpoint(before_run, "best")
    before, features = tables(origin.directory), folder / f"day{day}/work/features"
    started = sorted((run / "checkpoints").iterdir())[0]
    assert started.name == origin.name
    start, end = tables(started), tables(find_checkpoint(run, "latest").directory)
    fitted = Fitted.load(features)
    looked_up = read_tables(features / "train")
    for table in ("user_id", "item_id"):
        changed = fitted.changed_in(table) > parent
        known = len(before[f"{table}/weight"])
        kept = np.flatnonzero(~changed[:known])
        assert len(kept) > FIRST_CODE
        used = np.isin(np.arange(len(changed)), looked_up[table].to_numpy())
        for state in ("weight", "mean", "variance"):
            name = f"{table}/{state}"
            assert len(start[name]) == len(end[name]) == fitted.sizes[table]
            # Rows and optimizer state of known ids go on, bit for bit.
            np.testing.assert_array_equal(start[name][kept], before[name][kept])
            # Training touches only the rows that it looks up.
            np.testing.assert_array_equal(end[name][~used], start[name][~used])
            if state != "weight":
                assert not start[name][changed].any()
        weight = start[f"{table}/weight"]
        assert (weight[changed].any(axis=1)).all()
        reused = changed[:known].nonzero()[0]
        assert (weight[reused] != before[f"{table}/weight"][reused]).any(axis=1).all()
    dense = [load_file(c / "optimizer.safetensors") for c in (origin.directory, started)]
    assert {*dense[0]} == {*dense[1]}
    for name in dense[0]:
        np.testing.assert_array_equal(dense[0][name], dense[1][name])


def test_two_ranks_go_on_with_grown_tables(tmp_path: Path) -> None:
    ready(tmp_path, 0, None)
    before = train(tmp_path, 0, 2)
    ready(tmp_path, 1, 0)
    train(tmp_path, 1, 2, "--from", str(before))
    check_growth(tmp_path, 0, 1)


@pytest.mark.slow
def test_a_continued_run_resumes_at_a_step(tmp_path: Path) -> None:
    ready(tmp_path, 0, None)
    before = train(tmp_path, 0, 2)
    ready(tmp_path, 1, 0)
    run = train(tmp_path, 1, 2, "--from", str(before))
    # Stop after the second step of the new run, then resume: the result is the same.
    whole = tmp_path / "whole"
    shutil.move(run, whole)
    run.mkdir()
    shutil.copytree(whole, run, dirs_exist_ok=True)
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    for name in names[3:]:
        shutil.rmtree(run / "checkpoints" / name)
    (run / "latest").write_text(names[2] + "\n")
    train(tmp_path, 1, 2, "--from", str(before), "--resume")
    ends = [find_checkpoint(each, "latest").directory for each in (whole, run)]
    assert ends[0].name == ends[1].name == names[-1]
    for name in ("tables-00000-of-00002", "tables-00001-of-00002", "model", "optimizer"):
        one, other = (load_file(end / f"{name}.safetensors") for end in ends)
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(2, 2, 2, 2), (2, 3, 1, 2)])
def test_a_vocabulary_doubles_three_times_on_changing_numbers_of_ranks(
    tmp_path: Path, ranks: tuple[int, ...]
) -> None:
    ready(tmp_path, 0, None)
    train(tmp_path, 0, ranks[0])
    sizes, evicted = [], 0
    for day in (1, 2, 3):
        config = load_config(ready(tmp_path, day, day - 1))
        before = tmp_path / f"day{day - 1}/work"
        train(tmp_path, day, ranks[day], "--from", str(before / "run"))
        check_growth(tmp_path, day - 1, day)
        fitted = Fitted.load(config.paths.of("features"))
        sizes.append(sum(v is not None for v in fitted.features["item_id"].values or ()))
        vocabulary = fitted.features["item_id"].vocabulary
        assert vocabulary is not None
        evicted += int((fitted.changed_in("item_id")[: FIRST_CODE + 10] == day).sum())
    assert sizes[0] > 15 and sizes[1] > 30 and sizes[2] > 60
    assert evicted >= 2  # codes of the first items belong to others now
