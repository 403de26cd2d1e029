"""The gate: a good model is published, and bad ones are refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hvdrec
from hvdrec.config.loading import load_config
from hvdrec.errors import UserError
from hvdrec.promotion.promote import roll_back
from hvdrec.promotion.versions import Published
from hvdrec.scoring import Scorer
from tests.growing_data import write_day
from tests.integration.conftest import hvdrec as command

TRAIN = {
    "train.epochs": 4,
    "train.batch_size": 64,
    "train.checkpoint_every": 0,
    "train.embedding_learning_rate": 0.15,
}
ITEMS = range(12)
Change = Callable[[pa.Table], pa.Table]


def trained(
    folder: Path, day: int, parent: int | None = None, change: Change | None = None, **fields: Any
) -> Path:
    """Prepare and train a day, after a change of its log; return the directory of the run."""
    file = write_day(folder, day, ITEMS, rows=2000)
    log = file.parent / "raw/day.parquet"
    if change is not None:
        pq.write_table(change(pq.read_table(log)), log)
    config = load_config(file, {**TRAIN, **fields})
    hvdrec.make_samples(config)
    earlier = None if parent is None else folder / f"day{parent}/work"
    features = None if earlier is None else earlier / "features"
    hvdrec.prepare(config, start_from=features, workers=1, progress=False)
    hvdrec.train(config, start_from=None if earlier is None else earlier / "run", progress=False)
    return config.paths.of("run")


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two good days; the second goes on from the first."""
    folder = tmp_path_factory.mktemp("promote")
    trained(folder, 0)
    trained(folder, 1, 0, **{"train.epochs": 1})
    return folder


@pytest.fixture
def published(days: Path, tmp_path: Path) -> Published:
    """Return published versions, of which the first day's model serves."""
    once = days / "published"
    if not once.exists():
        assert promote(days / "day0/work/run", once).is_promoted
    shutil.copytree(once, tmp_path / "published", symlinks=True)
    return Published(tmp_path / "published")


def promote(run: Path, to: Path, **options: Any) -> hvdrec.PromoteResult:
    return hvdrec.promote(run, to=to, progress=False, **options)


def test_the_next_good_model_is_published_and_can_be_rolled_back(
    days: Path, published: Published
) -> None:
    before = Scorer.load(published.link).version
    result = promote(days / "day1/work/run", published.folder)
    assert list(result.reasons) == []
    assert (result.is_promoted, result.served, result.version) == (True, "0001", "0002")
    assert {check.name for check in result.checks} >= {
        "rows",
        "auc",
        "log_loss",
        "calibration",
        "catalogue",
        "drift",
        "newest row",
        "coverage of price",
    }
    assert result.rows == 200
    assert Scorer.load(published.link).version != before
    assert [(each.name, each.is_current) for each in published.versions()] == [
        ("0001", False),
        ("0002", True),
    ]
    assert published.record("0002")["run"] == str(days / "day1/work/run")
    # The same checkpoint again: nothing to do.
    again = promote(days / "day1/work/run", published.folder)
    assert again.is_promoted and again.version == "0002" and published.names() == ["0001", "0002"]
    assert roll_back(published) == ("0002", "0001")
    assert Scorer.load(published.link).version == before
    assert [event["event"] for event in published.history()] == [
        "promoted",
        "promoted",
        "rolled_back",
    ]
    assert roll_back(published, "0002") == ("0001", "0002")


def shuffled(table: pa.Table) -> pa.Table:
    """Shuffle the labels of the training and validation rows; the test rows stay as they are."""
    label = table["clicked"].to_numpy().copy()
    kept = int(0.9 * len(label))
    np.random.default_rng(0).shuffle(label[:kept])
    return table.set_column(table.column_names.index("clicked"), "clicked", pa.array(label))


def without_price(table: pa.Table) -> pa.Table:
    nothing = pa.nulls(len(table), pa.float64())
    return table.set_column(table.column_names.index("price"), "price", nothing)


def same_price(table: pa.Table) -> pa.Table:
    same = pa.array(np.full(len(table), 0.5))
    return table.set_column(table.column_names.index("price"), "price", same)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shuffled, "auc falls"),
        (without_price, "coverage of price falls"),
        (same_price, "feature 'price' has one value"),
    ],
)
def test_a_bad_model_is_refused(
    published: Published, tmp_path: Path, change: Change, words: str
) -> None:
    run = trained(tmp_path, 1, change=change, **{"train.epochs": 1})
    result = promote(run, published.folder, allow_worse=True)
    assert not result.is_promoted
    assert any(words in reason for reason in result.reasons), result.reasons
    assert published.current() == "0001" and published.names() == ["0001"]
    assert published.history()[-1]["event"] == "refused"
    assert not list(published.folder.glob(".candidate*"))


@pytest.mark.slow
def test_older_rows_than_those_of_the_serving_model_are_refused(days: Path, tmp_path: Path) -> None:
    versions = Published(tmp_path / "published")
    assert promote(days / "day1/work/run", versions.folder).is_promoted
    result = promote(days / "day0/work/run", versions.folder)
    assert not result.is_promoted
    assert any("hours older" in reason for reason in result.reasons)
    forced = promote(days / "day0/work/run", versions.folder, force=True)
    assert forced.is_promoted and forced.version == "0002" and forced.reasons


def test_rows_that_are_too_old_by_the_clock_are_refused(days: Path, tmp_path: Path) -> None:
    result = promote(
        days / "day0/work/run", tmp_path / "p", overrides={"promote.max_age_hours": 1.0}
    )
    assert not result.is_promoted and result.version is None
    assert "promote.max_age_hours" in result.reasons[0]
    assert Published(tmp_path / "p").current() is None


@pytest.mark.slow
def test_the_command_says_why_it_refuses_lists_and_rolls_back(
    days: Path, published: Published
) -> None:
    run, to = days / "day1/work/run", published.folder
    refused = command("promote", run, "--to", to, "--promote.min-rows", 1000)
    assert refused.returncode == 1
    assert "promote.min_rows = 1000" in refused.stdout and "0001 still serves" in refused.stdout
    published.publish(shutil.copytree(published.path("0001"), to / "copy"))
    done = command("promote", "--rollback", "--to", to, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["version"] == "0001"
    listed = json.loads(command("promote", "--list", "--to", to, "--json").stdout)
    assert [each["version"] for each in listed] == ["0001", "0002"]
    assert [each["current"] for each in listed] == [True, False]
    missing = command("promote", "--rollback", "0009", "--to", to)
    assert missing.returncode == 2
    assert "0009" in missing.stderr and "Traceback" not in missing.stderr


def test_a_link_that_is_no_link_is_left_alone(days: Path, tmp_path: Path) -> None:
    (tmp_path / "current").mkdir()
    with pytest.raises(UserError) as caught:
        promote(days / "day0/work/run", tmp_path)
    assert caught.value.field == str(tmp_path / "current")
    assert (tmp_path / "current").is_dir()
