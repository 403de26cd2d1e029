"""Configurations from TOML and from Python: types, ranges and the rules between fields."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvdrec.config import Config, Feature, load_config, with_fields
from hvdrec.config.data_sections import Paths, Split
from hvdrec.config.sections import Evaluate, Model, Ranker, Tower, Train
from hvdrec.config.structure import from_dict, to_dict
from hvdrec.errors import UserError

MINIMAL: dict[str, Any] = {
    "name": "small",
    "features": [
        {"name": "user_id"},
        {"name": "item_id", "side": "item"},
        {"name": "history", "kind": "sequence"},
        {"name": "hour", "side": "scene", "dtype": "int", "default": 12},
    ],
}
FEATURES = (Feature("user_id"), Feature("item_id", side="item"))
LIKE: dict[str, Any] = {"name": "like", "label": "rating > 3"}
WARM: dict[str, Any] = {
    "train": {"objective": "retrieval", "warm_start": {"history": "history"}},
    "model": {"tower": {"hidden": [], "output": 8}},
}

TOML = """
name = "small"
seed = 7

[paths]
work = "runs/small"
bundle = "served"

[samples]
interactions = "ratings.parquet"
label = "rating > 3"
derive = { hour = "timestamp // 3600 % 24" }
history = [{ name = "history", where = "rating > 3", length = 20 }]
joins = [{ table = "weather.csv", on = ["day", "city"] }]
split = { method = "random", fractions = [0.8, 0.1, 0.1], seed = 3 }

[model.tower]
hidden = []

[train]
learning_rate = 1
logq = false

[[features]]
name = "user_id"

[[features]]
name = "item_id"
side = "item"

[[features]]
name = "history"
kind = "sequence"
"""


def refused(build: Callable[[], object], field: str, value: object, *words: str) -> None:
    """Check the error's field, value, and that it is one line with these words."""
    with pytest.raises(UserError) as caught:
        build()
    assert (caught.value.field, caught.value.value) == (field, value)
    text = str(caught.value)
    assert "\n" not in text
    for word in (field, *words):
        assert word in text


def from_changed(**changes: Any) -> Config:
    return from_dict(Config, {**MINIMAL, **changes})


def test_loads_a_file_with_defaults_and_nested_tables(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(TOML)
    config = load_config(tmp_path / "run.toml")
    assert (config.name, config.seed) == ("small", 7)
    assert config.features[2] == Feature("history", kind="sequence")
    assert config.samples.derive == {"hour": "timestamp // 3600 % 24"}
    assert config.samples.history[0].length == 20
    assert config.samples.joins[0].on == ("day", "city")
    assert config.samples.split.fractions == (0.8, 0.1, 0.1)
    assert config.model == Model(tower=Tower(hidden=()))
    assert (config.train.learning_rate, type(config.train.learning_rate)) == (1.0, float)
    assert config.train.logq is False
    assert config.train.batch_size == 0
    assert config.schema.user_key == "user_id"


def test_stages_write_into_work_by_default(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(TOML)
    paths = load_config(tmp_path / "run.toml").paths
    assert paths.of("samples") == Path("runs/small/samples")
    assert paths.of("bundle") == Path("served")


def test_round_trip_through_json() -> None:
    config = from_changed(
        samples={"history": [{"name": "history", "length": 9}], "derive": {"a": "1"}},
        model={"ranker": {"hidden": [4, 2], "direct": ["user_id"]}},
        train={"learning_rate": 0.25, "objective": "ranking"},
    )
    assert config.model.ranker == Ranker(hidden=(4, 2), direct=("user_id",))
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_to_dict_omits_none_and_returns_plain_lists() -> None:
    plain = to_dict(from_dict(Config, MINIMAL))
    assert "default" not in plain["features"][0]
    assert plain["features"][3]["default"] == 12
    assert plain["model"]["tower"]["hidden"] == [128]


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"bogus": 1}, "bogus", ["unknown", "[name, features, seed, paths, samples, tasks,"]),
        ({"trane": {}}, "trane", ["unknown", "did you mean 'train'?"]),
        (
            {"encode": {"shard_row": 5}},
            "encode.shard_row",
            ["unknown", "[shard_rows, row_group_rows]", "did you mean 'shard_rows'?"],
        ),
        ({"samples": {"joins": [{"table": "a"}]}}, "samples.joins[0].on", ["missing"]),
        (
            {"samples": {"joins": [{"table": "a", "on": ["b"], "onn": 1}]}},
            "samples.joins[0].onn",
            ["unknown", "[table, on]", "did you mean 'on'?"],
        ),
        ({"samples": {"split": {"fractions": [0.5, 0.5]}}}, "samples.split.fractions[2]", []),
    ],
)
def test_refuses_unknown_and_missing_keys(
    changes: dict[str, Any], field: str, words: list[str]
) -> None:
    refused(lambda: from_changed(**changes), field, None, *words)


@pytest.mark.parametrize(
    ("changes", "field", "value", "words"),
    [
        ({"name": 3}, "name", 3, ["string"]),
        ({"train": 3}, "train", 3, ["table"]),
        ({"train": {"epochs": "3"}}, "train.epochs", "3", ["= '3'", "integer"]),
        ({"train": {"epochs": 3.0}}, "train.epochs", 3.0, ["= 3.0", "integer"]),
        ({"train": {"epochs": True}}, "train.epochs", True, ["= true", "integer"]),
        ({"train": {"logq": 1}}, "train.logq", 1, ["boolean"]),
        ({"train": {"learning_rate": False}}, "train.learning_rate", False, ["number"]),
        (
            {"train": {"objective": "both"}},
            "train.objective",
            "both",
            ["'retrieval', 'ranking' or 'joint'"],
        ),
        ({"train": {"objective": ["joint"]}}, "train.objective", ["joint"], ["'ranking'"]),
        ({"features": "user_id"}, "features", "user_id", ["list"]),
        ({"features": [1]}, "features[0]", 1, ["table"]),
        (
            {"features": [{"name": "a", "default": [1]}]},
            "features[0].default",
            [1],
            ["string", "integer", "number"],
        ),
        (
            {"samples": {"split": {"fractions": [0.4, 0.2, 0.2, 0.2]}}},
            "samples.split.fractions",
            [0.4, 0.2, 0.2, 0.2],
            ["3"],
        ),
        (
            {"samples": {"split": {"fractions": [0.8, 0.1, "x"]}}},
            "samples.split.fractions[2]",
            "x",
            ["number"],
        ),
        ({"samples": {"derive": ["a"]}}, "samples.derive", ["a"], ["table"]),
        ({"samples": {"derive": {"h": 3}}}, "samples.derive.h", 3, ["string"]),
        (
            {"samples": {"split": {"boundaries": [datetime.date(2026, 1, 2)]}}},
            "samples.split.boundaries[0]",
            "2026-01-02",
            ["number"],
        ),
        ({"paths": {"raw": ["a"] * 40}}, "paths.raw", ["a"] * 40, ["...:", "string"]),
    ],
)
def test_refuses_wrong_types(
    changes: dict[str, Any], field: str, value: object, words: list[str]
) -> None:
    refused(lambda: from_changed(**changes), field, value, *words)


@pytest.mark.parametrize(
    ("changes", "field", "value", "words"),
    [
        ({"features": []}, "features", [], ["at least 1"]),
        ({"train": {"batch_size": -1}}, "train.batch_size", -1, ["greater than or equal to 0"]),
        ({"train": {"learning_rate": -1}}, "train.learning_rate", -1, ["greater than 0"]),
        ({"train": {"clip_norm": -0.5}}, "train.clip_norm", -0.5, ["greater than or equal to 0"]),
        ({"train": {"clip_norm": float("inf")}}, "train.clip_norm", float("inf"), ["finite"]),
        ({"train": {"teacher_weight": 1}}, "train.teacher_weight", 1, ["less than 1"]),
        ({"model": {"initial_deviation": 0}}, "model.initial_deviation", 0, ["greater than 0"]),
        ({"model": {"unknown_rate": 1}}, "model.unknown_rate", 1, ["less than 1"]),
        ({"model": {"tower": {"hidden": [8, 0]}}}, "model.tower.hidden[1]", 0, ["greater than 0"]),
        ({"evaluate": {"threshold": 2}}, "evaluate.threshold", 2, ["less than or equal to 1"]),
        ({"evaluate": {"k": []}}, "evaluate.k", [], ["at least 1"]),
        ({"evaluate": {"k": [10, 0]}}, "evaluate.k[1]", 0, ["greater than 0"]),
        ({"export": {"trending_days": 0.0}}, "export.trending_days", 0.0, ["greater than 0"]),
        ({"tasks": [{**LIKE, "share": -1}]}, "tasks[0].share", -1, ["greater than or equal to 0"]),
        ({"tasks": [{**LIKE, "weight": 0}]}, "tasks[0].weight", 0, ["greater than 0"]),
        (
            {"samples": {"history": [{"name": "history", "length": 0}]}},
            "samples.history[0].length",
            0,
            ["greater than 0"],
        ),
    ],
)
def test_refuses_values_out_of_range(
    changes: dict[str, Any], field: str, value: object, words: list[str]
) -> None:
    refused(lambda: from_changed(**changes), field, value, *words)


def test_refuses_nan() -> None:
    with pytest.raises(UserError, match=r"^train\.weight_decay = nan: must be a finite number$"):
        from_changed(train={"weight_decay": float("nan")})


@pytest.mark.parametrize(
    ("changes", "field", "value", "words"),
    [
        ({"paths": {"work": "s3://b/x"}}, "paths.work", "s3://b/x", ["directory"]),
        (
            {"samples": {"split": {"fractions": [0.5, 0.5, 0.1]}}},
            "samples.split.fractions",
            [0.5, 0.5, 0.1],
            ["sum to 1"],
        ),
        (
            {"samples": {"split": {"fractions": [1, 0, 0]}}},
            "samples.split.fractions",
            [1.0, 0.0, 0.0],
            ["positive"],
        ),
        (
            {"samples": {"split": {"boundaries": [5]}}},
            "samples.split.boundaries",
            [5.0],
            ["two values or none"],
        ),
        (
            {"samples": {"history": [{"name": "user_id"}]}},
            "samples.history[0].name",
            "user_id",
            ["'sequence'", "[history]"],
        ),
        ({"samples": {"history": [{"name": "past"}]}}, "samples.history[0].name", "past", []),
        (
            {"samples": {"history": [{"name": "history", "column": "history"}]}},
            "samples.history[0].column",
            "history",
            ["[user_id, item_id, hour]"],
        ),
        ({"model": {"pooling": {"hour": "sqrt"}}}, "model.pooling", "hour", ["[history]"]),
        ({"model": {"tower": {"output": 0}}}, "model.tower.output", 0, ["'ranking'", "direct"]),
        (
            {"model": {"ranker": {"direct": ["hour"]}}},
            "model.ranker.direct",
            "hour",
            ["[user_id, item_id, history]"],
        ),
        (
            {"model": {"ranker": {"direct": ["user_id"], "matches": True}}},
            "model.ranker.matches",
            True,
            ["[user_id]", "share a table", "item key"],
        ),
        ({"model": {"ranker": {"heads": 3}}}, "model.ranker.heads", 3, ["output = 64"]),
        ({"train": {"epochs": 0}}, "train.epochs", 0, ["greater than 0", "warm_start"]),
        (
            {"train": {"accumulate": 2, "uniform_negatives": 8}},
            "train.uniform_negatives",
            8,
            ["train.accumulate = 1", "2"],
        ),
        (
            {"train": {"average_decay": 0.9}, "parallel": {"synchronization": "average"}},
            "train.average_decay",
            0.9,
            ["parallel.synchronization = 'average'"],
        ),
        (
            {"train": {"clip_norm": 1.0}, "parallel": {"synchronization": "adasum"}},
            "train.clip_norm",
            1.0,
            ["'step'", "'adasum'"],
        ),
        (
            {"train": {"teacher": "t", "objective": "retrieval"}},
            "train.teacher",
            "t",
            ["train.objective = 'retrieval'"],
        ),
        ({"train": {"teacher": "t"}, "tasks": [LIKE]}, "train.teacher", "t", ["[[tasks]]"]),
        (
            {"export": {"filters": ["item_id", "hour"]}},
            "export.filters",
            "hour",
            ["[item_id]"],
        ),
        ({"export": {"filters": ["item_id", "item_id"]}}, "export.filters", "item_id", []),
        (
            {"export": {"index": "hnsw"}, "train": {"objective": "ranking"}},
            "export.index",
            "hnsw",
            ["'joint' or 'retrieval'", "'none'"],
        ),
        (
            {"model": {"ranker": {"sharing": "mmoe"}}},
            "model.ranker.sharing",
            "mmoe",
            ["[[tasks]]"],
        ),
        (
            {"model": {"ranker": {"task_hidden": [8]}}},
            "model.ranker.task_hidden",
            [8],
            ["[[tasks]]"],
        ),
        ({"train": {"metric": "task_auc"}}, "train.metric", "task_auc", ["[[tasks]]", "'auc'"]),
        ({"tasks": [LIKE, LIKE]}, "tasks[0].name", "like", ["unique"]),
        ({"tasks": [{"name": "score", "label": "1"}]}, "tasks[0].name", "score", ["not 'score'"]),
        ({"tasks": [{"name": "a b", "label": "1"}]}, "tasks[0].name", "a b", ["letters"]),
        (
            {"tasks": [{**LIKE, "share": 0}, {"name": "b", "label": "1", "share": 0}]},
            "tasks[0].share",
            0.0,
            ["at least one"],
        ),
        (
            {"tasks": [LIKE], "train": {"objective": "retrieval"}},
            "train.objective",
            "retrieval",
            ["[[tasks]]", "'ranking' or 'joint'"],
        ),
        (
            {"tasks": [LIKE], "model": {"ranker": {"hidden": []}}},
            "model.ranker.hidden",
            [],
            ["hidden layer"],
        ),
        (
            {"tasks": [LIKE], "model": {"ranker": {"sharing": "mmoe", "experts": 1}}},
            "model.ranker.experts",
            1,
            ["at least 2"],
        ),
    ],
)
def test_refuses_fields_that_do_not_fit_each_other(
    changes: dict[str, Any], field: str, value: object, words: list[str]
) -> None:
    refused(lambda: from_changed(**changes), field, value, *words)


def test_a_warm_start_that_fits_is_accepted() -> None:
    assert from_changed(**WARM).train.warm_start.history == "history"
    assert with_fields(from_changed(**WARM), {"train.epochs": 0}).train.epochs == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"train.warm_start.history": "past"}, ["sequence", "[history]"]),
        ({"model.tower.hidden": [8]}, ["linear towers"]),
        ({"model.tower.normalize": True}, ["linear towers"]),
        ({"model.pooling.history": "attention"}, ["'mean' or 'sqrt'"]),
        ({"train.objective": "ranking"}, ["needs retrieval"]),
        ({"model.tower.output": 9}, ["at least 18, not 16"]),
    ],
)
def test_refuses_a_warm_start_that_the_model_cannot_hold(
    overrides: dict[str, object], words: list[str]
) -> None:
    config = from_changed(**WARM)
    history = overrides.get("train.warm_start.history", "history")
    refused(lambda: with_fields(config, overrides), "train.warm_start.history", history, *words)


def test_a_config_in_python_equals_one_from_toml() -> None:
    raw = {"name": "x", "features": to_dict(FEATURES), "train": {"epochs": 3}}
    assert Config("x", FEATURES, train=Train(epochs=3)) == from_dict(Config, raw)


@pytest.mark.parametrize(
    ("build", "field", "value", "words"),
    [
        (lambda: Train(batch_size=-1), "Train.batch_size", -1, ["greater than or equal to 0"]),
        (lambda: Train(epochs="3"), "Train.epochs", "3", ["integer"]),
        (lambda: Train(objective="both"), "Train.objective", "both", ["'joint'"]),
        (lambda: Train(epoch=3), "Train.epoch", None, ["unknown", "did you mean 'epochs'?"]),
        (lambda: Tower(hidden=(8, 0)), "Tower.hidden[1]", 0, ["greater than 0"]),
        (lambda: Evaluate(k=()), "Evaluate.k", (), ["at least 1"]),
        (lambda: Feature("a", min_count=0), "Feature.min_count", 0, ["greater than 0"]),
        (lambda: Split(method="last"), "Split.method", "last", ["'leave-last-out'"]),
        (lambda: Config("x", ()), "Config.features", (), ["at least 1"]),
        (lambda: Config("x"), "Config.features", None, ["missing"]),
        (
            lambda: Config("x", FEATURES, train=Train(metric="task_auc")),
            "train.metric",
            "task_auc",
            ["[[tasks]]"],
        ),
        (
            lambda: Config("x", FEATURES, paths=Paths(run="s3://b/r")),
            "paths.run",
            "s3://b/r",
            ["directory"],
        ),
    ],
)
def test_a_config_in_python_is_checked_the_same_way(
    build: Callable[[], object], field: str, value: object, words: list[str]
) -> None:
    refused(build, field, value, *words)


def test_refuses_a_config_without_a_name() -> None:
    refused(lambda: from_dict(Config, {"features": MINIMAL["features"]}), "name", None, "missing")


def test_a_mistake_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(TOML + "\n[train.extra]\n")
    refused(lambda: load_config(file), "train.extra", None, f"{file}: ", "known: [objective, ")


def test_refuses_a_file_that_is_missing_or_not_toml(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    refused(lambda: load_config(file), str(file), None, "no such file")
    file.write_text("name = ")
    refused(lambda: load_config(file), str(file), None, "not valid TOML", "Invalid value")
    file.write_bytes(b"name = '\xff'")
    refused(lambda: load_config(file), str(file), None, "cannot be read (")
    refused(lambda: load_config(tmp_path), str(tmp_path), None, "cannot be read (")


def test_overrides_replace_values_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(TOML)
    config = load_config(
        tmp_path / "run.toml",
        {
            "train.epochs": 3,
            "seed": 1,
            "model.ranker.hidden": [8, 4],
            "samples.history.0.length": 5,
            "model.pooling.history": "sqrt",
        },
    )
    assert (config.train.epochs, config.seed, config.train.logq) == (3, 1, False)
    assert config.model.ranker.hidden == (8, 4)
    assert config.samples.history[0].length == 5
    assert config.model.pooling == {"history": "sqrt"}


def test_no_override_changes_nothing() -> None:
    config = from_dict(Config, MINIMAL)
    assert with_fields(config, {}) == config


def test_overrides_are_checked_together() -> None:
    config = from_changed(tasks=[LIKE])
    changed = with_fields(config, {"model.ranker.experts": 2, "model.ranker.sharing": "mmoe"})
    assert (changed.model.ranker.sharing, changed.model.ranker.experts) == ("mmoe", 2)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("train.batch_sizes", 1, ["no such field"]),
        ("train.epochs.x", 1, ["no such field"]),
        ("tasks.0.share", 2.0, ["no such field"]),
        ("features.9.dimension", 2, ["no such field"]),
        ("train.batch_size", -1, ["greater than or equal to 0"]),
        ("train.batch_size", "64", ["integer"]),
    ],
)
def test_refuses_wrong_overrides(field: str, value: object, words: list[str]) -> None:
    config = from_dict(Config, MINIMAL)
    refused(lambda: with_fields(config, {field: value}), field, value, *words)
