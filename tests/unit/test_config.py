from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hvdrec.config import Config, load, override
from hvdrec.config.schema import Feature
from hvdrec.config.sections import Model, Ranker, Tower
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
SECTIONS = (
    "[name, features, seed, paths, samples, tasks, encode, loader, model, train, parallel, "
    "evaluate, export]"
)

LIKE: dict[str, Any] = {"name": "like", "label": "rating > 3"}

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


def refused(**changes: Any) -> str:
    with pytest.raises(UserError) as error:
        from_dict(Config, {**MINIMAL, **changes})
    return str(error.value)


def test_a_file_with_defaults_and_everything_nested(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(TOML)
    config = load(tmp_path / "run.toml")
    assert (config.name, config.seed) == ("small", 7)
    assert config.features[2] == Feature("history", kind="sequence")
    assert config.samples.derive == {"hour": "timestamp // 3600 % 24"}
    assert config.samples.history[0].length == 20
    assert config.samples.joins[0].on == ("day", "city")
    assert config.samples.split.fractions == (0.8, 0.1, 0.1)
    assert config.model == Model(tower=Tower(hidden=()))
    assert (config.train.learning_rate, type(config.train.learning_rate)) == (1.0, float)
    assert config.train.logq is False
    assert config.train.batch_size == 8192
    assert config.schema.user_key == "user_id"


def test_stages_lie_in_work_unless_they_are_given(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(TOML)
    paths = load(tmp_path / "run.toml").paths
    assert paths.of("samples") == Path("runs/small/samples")
    assert paths.of("bundle") == Path("served")


def test_round_trip_through_json() -> None:
    config = from_dict(
        Config,
        {
            **MINIMAL,
            "samples": {"history": [{"name": "history", "length": 9}], "derive": {"a": "1"}},
            "model": {"ranker": {"hidden": [4, 2], "direct": ["user_id"]}},
            "train": {"learning_rate": 0.25, "objective": "ranking"},
        },
    )
    assert config.model.ranker == Ranker(hidden=(4, 2), direct=("user_id",))
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_to_dict_leaves_out_none_and_gives_plain_lists() -> None:
    plain = to_dict(from_dict(Config, MINIMAL))
    assert "default" not in plain["features"][0]
    assert plain["features"][3]["default"] == 12
    assert plain["model"]["tower"]["hidden"] == [128]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"bogus": 1}, f"unknown key 'bogus'; known: {SECTIONS}"),
        ({"trane": {}}, f"unknown key 'trane'; known: {SECTIONS}; did you mean 'train'?"),
        (
            {"encode": {"shard_row": 5}},
            "unknown key 'encode.shard_row'; known: [shard_rows, row_group_rows]; "
            "did you mean 'shard_rows'?",
        ),
        (
            {"samples": {"joins": [{"table": "a"}]}},
            "key 'samples.joins[0].on' is missing; it must be given",
        ),
        (
            {"samples": {"joins": [{"table": "a", "on": ["b"], "onn": 1}]}},
            "unknown key 'samples.joins[0].onn'; known: [table, on]; did you mean 'on'?",
        ),
        ({"name": 3}, "name = 3: must be of type str"),
        ({"train": 3}, "train: must be a table, is 3"),
        ({"train": {"epochs": "3"}}, "train.epochs = '3': must be of type int"),
        ({"train": {"epochs": 3.0}}, "train.epochs = 3.0: must be of type int"),
        ({"train": {"epochs": True}}, "train.epochs = true: must be of type int"),
        ({"train": {"logq": 1}}, "train.logq = 1: must be of type bool"),
        (
            {"train": {"learning_rate": False}},
            "train.learning_rate = false: must be of type float",
        ),
        (
            {"train": {"objective": "both"}},
            "train.objective = 'both': allowed are [retrieval, ranking, joint]",
        ),
        (
            {"train": {"objective": ["joint"]}},
            "train.objective = ['joint']: allowed are [retrieval, ranking, joint]",
        ),
        ({"features": "user_id"}, "features = 'user_id': must be a list"),
        ({"features": [1]}, "features[0]: must be a table, is 1"),
        (
            {"features": [{"name": "a", "default": [1]}]},
            "features[0].default = [1]: allowed types are [str, int, float]",
        ),
        (
            {"samples": {"split": {"fractions": [0.5, 0.5]}}},
            "samples.split.fractions = [0.5, 0.5]: must hold 3 values",
        ),
        (
            {"samples": {"split": {"fractions": [0.8, 0.1, "x"]}}},
            "samples.split.fractions[2] = 'x': must be of type float",
        ),
        ({"samples": {"derive": ["a"]}}, "samples.derive = ['a']: must be a table"),
        ({"samples": {"derive": {"h": 3}}}, "samples.derive.h = 3: must be of type str"),
        (
            {"paths": {"raw": ["a"] * 40}},
            f"paths.raw = {repr(['a'] * 40)[:57]}...: must be of type str",
        ),
    ],
)
def test_unknown_keys_and_wrong_types(changes: dict[str, Any], text: str) -> None:
    assert refused(**changes) == text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"features": []}, "features: none are declared; add at least one [[features]] table"),
        ({"train": {"batch_size": 0}}, "train.batch_size = 0: must be greater than 0"),
        ({"train": {"learning_rate": -1}}, "train.learning_rate = -1.0: must be greater than 0"),
        ({"train": {"clip_norm": -0.5}}, "train.clip_norm = -0.5: must not be negative"),
        (
            {"train": {"weight_decay": float("nan")}},
            "train.weight_decay = nan: must not be negative",
        ),
        (
            {"model": {"ranker": {"direct": ["user_id"], "matches": True}}},
            "model.ranker.matches: no user's and item's feature of model.ranker.direct share a "
            "table; it is [user_id]: name a history and the item's key there",
        ),
        (
            {"model": {"initial_deviation": 0}},
            "model.initial_deviation = 0.0: must be greater than 0",
        ),
        ({"model": {"unknown_rate": 1}}, "model.unknown_rate = 1.0: must be in [0, 1)"),
        (
            {"model": {"tower": {"hidden": [8, 0]}}},
            "model.tower.hidden[1] = 0: must be greater than 0",
        ),
        ({"evaluate": {"threshold": 2}}, "evaluate.threshold = 2.0: must be in [0, 1]"),
        ({"evaluate": {"k": []}}, "evaluate.k = []: give at least one cut-off"),
        ({"evaluate": {"k": [10, 0]}}, "evaluate.k[1] = 0: must be greater than 0"),
        (
            {"samples": {"split": {"fractions": [0.5, 0.5, 0.1]}}},
            "samples.split.fractions = [0.5, 0.5, 0.1]: must be positive and sum to 1",
        ),
        (
            {"samples": {"split": {"fractions": [1, 0, 0]}}},
            "samples.split.fractions = [1.0, 0.0, 0.0]: must be positive and sum to 1",
        ),
        (
            {"samples": {"split": {"boundaries": [5]}}},
            "samples.split.boundaries = [5.0]: give two values or none",
        ),
        (
            {"model": {"ranker": {"direct": ["hour"]}}},
            "model.ranker.direct: 'hour' is no user or item feature; "
            "known: [user_id, item_id, history]",
        ),
        (
            {"export": {"filters": ["item_id", "hour"]}},
            "export.filters: 'hour' is no item feature of values, or is there twice; "
            "known: [item_id]",
        ),
        (
            {"export": {"filters": ["item_id", "item_id"]}},
            "export.filters: 'item_id' is no item feature of values, or is there twice; "
            "known: [item_id]",
        ),
        (
            {"export": {"trending_days": 0.0}},
            "export.trending_days = 0.0: must be greater than 0",
        ),
        (
            {"export": {"index": "hnsw"}, "train": {"objective": "ranking"}},
            "export.index = 'hnsw': an index is over towers that were trained to retrieve; "
            "set train.objective = 'joint' or 'retrieval', or leave it at 'none'",
        ),
        (
            {"samples": {"history": [{"name": "user_id"}]}},
            "samples.history: no feature of kind 'sequence' is named 'user_id'",
        ),
        (
            {"samples": {"history": [{"name": "past"}]}},
            "samples.history: no feature of kind 'sequence' is named 'past'",
        ),
        (
            {"features": [{"name": "a"}, {"name": "a"}]},
            "feature 'a': declared 2 times",
        ),
        (
            {"model": {"ranker": {"sharing": "mmoe"}}},
            "model.ranker: sharing = 'mmoe', task_hidden = []: there are no [[tasks]] to share "
            "layers; add some or leave both out",
        ),
        (
            {"train": {"metric": "task_auc"}},
            "train.metric = 'task_auc': there are no [[tasks]]; take 'auc'",
        ),
        (
            {"tasks": [LIKE, LIKE]},
            "tasks[0].name = 'like': must be letters, digits and underscores, not 'score', and "
            "occur once",
        ),
        (
            {"tasks": [{"name": "score", "label": "1"}]},
            "tasks[0].name = 'score': must be letters, digits and underscores, not 'score', and "
            "occur once",
        ),
        (
            {"tasks": [LIKE], "features": [{"name": "score_like", "side": "scene"}]},
            "tasks[0].name = 'like': its 'score_like' is the name of a feature or key; "
            "rename the task",
        ),
        (
            {"tasks": [{**LIKE, "share": 0}, {"name": "b", "label": "1", "share": 0}]},
            "tasks: every share is 0; give one a part in the served score",
        ),
        ({"tasks": [{**LIKE, "share": -1}]}, "tasks[0].share = -1.0: must not be negative"),
        ({"tasks": [{**LIKE, "weight": 0}]}, "tasks[0].weight = 0.0: must be greater than 0"),
        (
            {"tasks": [LIKE], "train": {"objective": "retrieval"}},
            "tasks: train.objective = 'retrieval' trains no ranker, which alone has tasks; take "
            "'ranking' or 'joint'",
        ),
        (
            {"tasks": [LIKE], "model": {"ranker": {"hidden": []}}},
            "model.ranker.hidden = []: tasks share hidden layers; give at least one width",
        ),
        (
            {"tasks": [LIKE], "model": {"ranker": {"sharing": "mmoe", "experts": 1}}},
            "model.ranker.experts = 1: mmoe needs at least 2",
        ),
    ],
)
def test_values_that_are_not_allowed(changes: dict[str, Any], text: str) -> None:
    assert refused(**changes) == text


def test_a_required_key_that_is_missing() -> None:
    with pytest.raises(UserError) as error:
        from_dict(Config, {"features": MINIMAL["features"]})
    assert str(error.value) == "key 'name' is missing; it must be given"


def test_a_mistake_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(TOML + "\n[train.extra]\n")
    with pytest.raises(UserError) as error:
        load(file)
    assert str(error.value).startswith(f"{file}: unknown key 'train.extra'; known: [objective, ")


def test_a_file_that_is_missing_no_toml_or_no_text(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    with pytest.raises(UserError) as error:
        load(file)
    assert str(error.value) == f"{file}: no such file; give the TOML file of a run"
    file.write_text("name = ")
    with pytest.raises(UserError) as error:
        load(file)
    assert str(error.value).startswith(f"{file}: no valid TOML: Invalid value")
    file.write_bytes(b"name = '\xff'")
    with pytest.raises(UserError) as error:
        load(file)
    assert str(error.value).startswith(f"{file}: cannot be read (")
    with pytest.raises(UserError) as error:
        load(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: cannot be read (")


def test_overrides_of_every_shape() -> None:
    config = from_dict(Config, MINIMAL)
    arguments = (
        "--train.batch-size 64 --train.logq False --seed 3 --train.learning-rate 1e-2 "
        "--model.tower.hidden 8 4 --evaluate.k 5 --samples.split.method random "
        "--samples.split.fractions 0.6 0.2 0.2 --paths.work elsewhere"
    )
    changed = override(config, arguments.split(), "hvdrec train")
    assert (changed.train.batch_size, changed.train.logq, changed.seed) == (64, False, 3)
    assert changed.train.learning_rate == 0.01
    assert changed.model.tower.hidden == (8, 4)
    assert changed.evaluate.k == (5,)
    assert changed.samples.split.fractions == (0.6, 0.2, 0.2)
    assert changed.paths.of("samples") == Path("elsewhere/samples")
    assert changed.features == config.features


def test_no_override_changes_nothing() -> None:
    config = from_dict(Config, MINIMAL)
    assert override(config, [], "hvdrec train") == config


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train.batch-sizes", "1"], ["--train.batch-sizes", "--train.batch-size"]),
        (["--train.batch-size", "many"], ["--train.batch-size", "'many'"]),
        (["--train.objective", "both"], ["'both'", "--train.objective", "retrieval"]),
        (["--train.batch-size", "0"], ["train.batch_size = 0: must be greater than 0"]),
    ],
)
def test_a_wrong_override_is_told_in_one_line(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as told:
        override(from_dict(Config, MINIMAL), arguments, "hvdrec train")
    assert "\n" not in str(told.value)
    for word in words:
        assert word in str(told.value)
