"""Options of the command line for the fields of a configuration."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from hvdrec.cli.fields import describe_fields, field_options
from hvdrec.cli.parser import parse
from hvdrec.config import Config, with_fields
from hvdrec.config.structure import from_dict
from hvdrec.errors import UserError

RAW: dict[str, Any] = {
    "name": "small",
    "features": [
        {"name": "user_id"},
        {"name": "item_id", "side": "item"},
        {"name": "history", "kind": "sequence"},
    ],
    "tasks": [{"name": "like", "label": "a"}, {"name": "love", "label": "b"}],
    "train": {"epochs": 77},
}


def parse_overrides(arguments: Sequence[str]) -> Mapping[str, object]:
    overrides: Mapping[str, object] = parse(["train", "run.toml", *arguments]).overrides
    return overrides


def test_options_of_every_type() -> None:
    tasks_without_hidden_layer = ["--model.ranker.hidden", "--resume"]
    arguments = shlex.split(
        "--train.batch-size 64 --train.logq False --seed 3 --train.learning-rate 1e-2 "
        "--model.tower.hidden 8 4 --evaluate.k 5 --samples.split.method random "
        "--samples.split.fractions 0.6 0.2 0.2 --paths.work=elsewhere --train.log_every 7 "
        "--tasks.1.share 2 --features.2.dimension 32 --features.1.side item "
        "--model.pooling.history sqrt"
    )
    config = from_dict(Config, RAW)
    with pytest.raises(UserError, match=r"model\.ranker\.hidden"):
        with_fields(config, parse_overrides([*arguments, *tasks_without_hidden_layer]))
    changed = with_fields(config, parse_overrides(arguments))
    assert (changed.train.batch_size, changed.train.logq, changed.seed) == (64, False, 3)
    assert (changed.train.learning_rate, changed.train.log_every) == (0.01, 7)
    assert changed.model.tower.hidden == (8, 4)
    assert changed.evaluate.k == (5,)
    assert changed.samples.split.fractions == (0.6, 0.2, 0.2)
    assert str(changed.paths.of("samples")) == "elsewhere/samples"
    assert [task.share for task in changed.tasks] == [1.0, 2.0]
    assert changed.features[2].dimension == 32
    assert changed.model.pooling == {"history": "sqrt"}
    assert changed.train.epochs == 77


@pytest.mark.parametrize(
    ("arguments", "field", "value", "words"),
    [
        (["--train.batch-sizes", "1"], "--train.batch-sizes", None, ["unknown", "batch-size"]),
        (["--train", "1"], "", None, ["--train"]),
        (["--model.pooling", "history"], "--model.pooling", ["history"], ["pairs"]),
        (["--train.warm-start", "x"], "--train.warm-start", None, ["table", "history"]),
        (["--trane.epochs", "1"], "--trane", None, ["unknown", "did you mean 'train'?"]),
        (["--train.batch-size", "many"], "--train.batch-size", "many", ["integer"]),
        (["--train.objective", "both"], "--train.objective", "both", ["'retrieval'"]),
        (["--train.logq", "maybe"], "--train.logq", "maybe", ["boolean"]),
        (["--model.tower.hidden", "8", "x"], "--model.tower.hidden[1]", "x", ["integer"]),
        (["--train.batch-size"], "", None, ["--train.batch-size", "expected one argument"]),
    ],
)
def test_refuses_wrong_options_in_one_line(
    arguments: list[str], field: str, value: object, words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        parse_overrides(arguments)
    assert (caught.value.field, caught.value.value) == (field, value)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_help_lists_every_field_with_type_default_and_documentation() -> None:
    parser = argparse.ArgumentParser()
    describe_fields(parser, from_dict(Config, RAW))
    text = " ".join(parser.format_help().split())
    for field in field_options():
        assert field.doc, field.dotted
        assert "--" + field.dotted.replace("_", "-") in text
    for part in (
        "--train.epochs INT Maximum passes",
        "(default: 77)",
        "--train.objective {retrieval,ranking,joint}",
        "--model.tower.hidden [INT ...]",
        "--model.pooling.NAME {mean,sqrt,attention,self-attention}",
        "--features.N.dimension INT",
        "--samples.history.N.length INT",
        "--train.logq {true,false}",
    ):
        assert part in text


def test_help_can_be_limited_to_some_fields() -> None:
    parser = argparse.ArgumentParser()
    describe_fields(parser, None, ("export.", "tasks.N.share"))
    text = parser.format_help()
    assert "--export.embeddings" in text
    assert "--tasks.N.share" in text
    assert "--train" not in text


def test_options_for_fields_and_other_arguments_come_in_any_order() -> None:
    options = parse(["train", "run.toml", "--model.tower.hidden", "8", "4"])
    assert (str(options.config), options.overrides) == ("run.toml", {"model.tower.hidden": (8, 4)})
    options = parse(["train", "--train.epochs", "3", "run.toml", "--resume"])
    assert (str(options.config), options.overrides) == ("run.toml", {"train.epochs": 3})


def test_export_takes_only_fields_that_can_change_after_training() -> None:
    arguments = ["export", "run", "--export.embeddings", "int8", "--tasks.0.share", "2"]
    overrides = {"export.embeddings": "int8", "tasks.0.share": 2.0}
    assert parse(arguments).overrides == overrides
    for option in ("--train.epochs", "--tasks.0.weight", "--model.ranker.hidden"):
        with pytest.raises(UserError, match="cannot change after training") as caught:
            parse(["export", "run", option, "2"])
        assert caught.value.field == option
        assert "--export.embeddings" in str(caught.value)
