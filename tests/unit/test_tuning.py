"""What can be searched, what is tried next, and what is remembered."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdrec.cli.parser import parse
from hvdrec.cli.reports import render_search
from hvdrec.config import Config, load_config, with_fields
from hvdrec.errors import UserError
from hvdrec.tuning import search as search_module
from hvdrec.tuning.search import (
    FILE,
    Search,
    State,
    Trial,
    Validation,
    first_difference,
    is_hopeless,
    next_values,
)
from hvdrec.tuning.space import (
    Choices,
    Range,
    as_overrides,
    as_toml,
    parse_space,
    size,
    values_of,
)
from tests.small_data import TOML

RATE = "train.embedding-learning-rate=log:0.05:0.8"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    file = tmp_path_factory.mktemp("tuning") / "small.toml"
    file.write_text(TOML.format(raw="raw", work="work"))
    return load_config(file)


# ------------------------------------------------------------------------------------- the space


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RATE, Range(0.05, 0.8, None, True)),
        ("model.ranker.dropout=0:0.4", Range(0.0, 0.4)),
        ("model.ranker.dropout=0:0.4:0.1", Range(0.0, 0.4, 0.1)),
        ("train.batch_size=log:256:8192", Range(256, 8192, None, True, True)),
        ("--model.ranker.cross-layers=0:3", Range(0, 3, None, False, True)),
        ("model.dimension=16,32,64", Choices((16, 32, 64))),
        ("model.tower.normalize=true,false", Choices((True, False))),
        ("train.schedule=linear,cosine", Choices(("linear", "cosine"))),
        ("model.ranker.hidden=[256, 128],[],[400]", Choices(([256, 128], [], [400]))),
        ('model.ranker.direct=["age"],[]', Choices((["age"], []))),
        ("loader.shuffle_rows=1000,2000", Choices((1000, 2000))),
    ],
)
def test_ranges_and_choices(config: Config, text: str, expected: Range | Choices) -> None:
    field = text.partition("=")[0].removeprefix("--").replace("-", "_")
    assert parse_space([text], config) == {field: expected}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model.dimension",
            "--search 'model.dimension': must be FIELD=RANGE or FIELD=A,B,C: train",
        ),
        ("model.dimenson=1,2", "is no field; .*; did you mean 'model.dimension'\\?$"),
        (
            "samples.label=a,b",
            "decides what the samples and features are, .* \\[model\\.\\*, train",
        ),
        ("features.dimension=8,16", "decides what the samples and features are, which all"),
        ("paths.work=a,b", "decides what the samples and features are"),
        ("export.index=none,hnsw", "changes nothing that trials are compared by; fields that"),
        (
            "train.metric=auc,gauc",
            "decides what trials are compared by; set it in the file instead",
        ),
        ("model.tower=1,2", "is a table; name one of its fields: \\[model\\.tower\\.hidden, "),
        ("train.schedule=linear,steep", "train.schedule = 'steep': must be 'constant', "),
        ("model.ranker.dropout=0:1", "model.ranker.dropout = 1.0: must be less than 1$"),
        ("model.ranker.dropout=0.4:0.1", "0.4 must be less than 0.1"),
        ("model.ranker.dropout=log:0:0.1", "a logarithmic range must begin above 0"),
        ("model.ranker.dropout=log:0.1:0.2:0.1", "a range is LOW:HIGH, LOW:HIGH:STEP or"),
        ("model.ranker.dropout=0:0.4:0.5", "the step 0.5 must be in \\(0, 0.4\\]"),
        ("model.dimension=16:3.5", "'3.5' must be of type int"),
        ("model.dimension=16", "give a range, or two different values: 16,32"),
        ("model.dimension=16,16", "give a range, or two different values"),
        ("model.ranker.hidden=256,128", "'256' must be a list such as \\[256,128\\]"),
        ("model.tower.normalize=yes,no", "'yes' must be of type bool"),
    ],
)
def test_what_cannot_be_searched_is_told(config: Config, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        parse_space([text], config)
    assert str(raised.value).startswith("--search ")


def test_a_field_has_one_range(config: Config) -> None:
    with pytest.raises(UserError, match=r"'model.dimension' is there twice; give one range"):
        parse_space(["model.dimension=16,32", "model.dimension=8,16"], config)


def test_values_can_be_pasted(config: Config, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "train.embedding_learning_rate": 1e-05,
        "train.schedule": "cosine",
        "model.tower.normalize": True,
        "model.ranker.hidden": [256, 128],
        "model.ranker.direct": [],
    }
    expected = with_fields(config, values)
    options = parse(["train", "run.toml", *shlex.split(as_overrides(values))])
    assert with_fields(config, options.overrides) == expected
    assert as_toml(values) == (
        '[train]\nembedding_learning_rate = 1e-05\nschedule = "cosine"\n\n'
        "[model.tower]\nnormalize = true\n\n"
        "[model.ranker]\nhidden = [256, 128]\ndirect = []"
    )
    file = tmp_path / "pasted.toml"
    bare = TOML.partition("[model]")[0].format(raw="raw", work="work")
    file.write_text(f"{bare}\n{as_toml(values)}\n")
    assert values_of(load_config(file), dict.fromkeys(values, Choices(()))) == values


def test_size_counts_combinations(config: Config) -> None:
    space = ["model.dimension=8,16,32", "model.ranker.dropout=0:0.4:0.1", "model.tower.output=4:6"]
    assert size(parse_space(space, config)) == 3 * 5 * 3
    assert size(parse_space([RATE], config)) == float("inf")


# ------------------------------------------------------------------------------------ the search


def _search(config: Config, *space: str) -> Search:
    return Search(config, "abc", space or (RATE, "model.dimension=8,16,32"), "auc")


def _filled(search: Search, count: int, quality: Callable[[dict[str, Any]], float]) -> Search:
    for number in range(len(search.trials), count):
        values = next_values(search)
        assert values is not None
        search = search.with_trial(
            Trial(number, values, "complete", quality(values), 10 * number, 1.0)
        )
    return search


def _quality(values: dict[str, Any]) -> float:
    return -abs(float(values["train.embedding_learning_rate"]) - 0.2) - values["model.dimension"]


def test_the_first_trial_is_the_configuration_as_it_stands(config: Config) -> None:
    assert next_values(_search(config)) == {
        "train.embedding_learning_rate": 0.5,
        "model.dimension": 8,
    }
    outside = _search(config, "train.embedding_learning_rate=log:0.001:0.01")
    search = _filled(outside, 3, lambda values: 0.5)
    first, *others = (trial.values["train.embedding_learning_rate"] for trial in search.trials)
    assert first == 0.5
    assert all(0.001 <= value <= 0.01 for value in others)


def test_a_search_goes_on_as_if_it_had_not_been_interrupted(config: Config, tmp_path: Path) -> None:
    whole = _filled(_search(config), 15, _quality)
    broken = _filled(_search(config), 12, _quality)
    broken.save(tmp_path)
    read = search_module.load(tmp_path)
    assert read == broken
    assert read is not None
    assert _filled(read, 15, _quality) == whole
    # Nothing is tried twice, and it comes nearer to what is good.
    assert len({json.dumps(trial.values) for trial in whole.trials}) == 15
    assert whole.best is not None
    assert whole.best.values["model.dimension"] == 8


def test_other_seeds_try_other_values(config: Config) -> None:
    first = _filled(_search(config), 3, _quality)
    second = _filled(_search(replace(config, seed=1)), 3, _quality)
    assert first.trials[0].values == second.trials[0].values
    assert first.trials[2].values != second.trials[2].values


def test_a_search_ends_when_all_has_been_tried(config: Config) -> None:
    search = _search(config, "model.dimension=8,16,32", "model.tower.normalize=true,false")
    search = _filled(search, 6, lambda values: 0.5)
    assert len({json.dumps(trial.values) for trial in search.trials}) == 6
    assert next_values(search) is None


def test_failed_and_pruned_trials_count_as_tried(config: Config) -> None:
    search = _search(config, "model.dimension=8,16,32")
    states: list[State] = ["complete", "failed", "pruned"]
    for number, state in enumerate(states):
        values = next_values(search)
        assert values is not None
        search = search.with_trial(
            Trial(number, values, state, None if state == "failed" else 0.9 - number)
        )
    assert next_values(search) is None
    assert [trial.state for trial in search.result("").ranked()] == ["complete", "pruned", "failed"]
    assert search.best == search.trials[0]


def test_the_lowest_loss_is_the_best(config: Config) -> None:
    search = replace(_search(config), metric="log_loss", is_loss=True)
    for number, value in enumerate((0.5, 0.3, 0.4)):
        search = search.with_trial(Trial(number, {}, "complete", value))
    assert [trial.number for trial in search.result("").ranked()] == [1, 2, 0]


def test_a_trial_below_the_median_is_hopeless_once_five_are_complete(config: Config) -> None:
    search = _search(config)
    values = [
        {"train.embedding_learning_rate": 0.1 * number, "model.dimension": 8}
        for number in range(1, 7)
    ]
    for number, each in enumerate(values[:5]):
        curve = (Validation(0, 0.5 + number / 10), Validation(1, 0.6 + number / 10))
        done = Trial(number, each, "complete", curve[-1].value, 1, 1.0, curve)
        search = search.with_trial(done)
        running = Trial(number + 1, values[5]).validated(0, 0.69)
        # Medians: 0.7 after the first epoch, 0.8 after the second.
        assert is_hopeless(search, running) == (number == 4)
    assert not is_hopeless(search, running.validated(0, 0.71))
    assert is_hopeless(search, running.validated(0, 0.71).validated(1, 0.79))
    assert not is_hopeless(search, running.validated(0, 0.71).validated(1, 0.81))


@given(st.lists(st.integers(0, 2), max_size=12))
def test_a_trial_that_gets_nowhere_is_given_up(steps: list[int]) -> None:
    trial = Trial(0, {})
    for count, step in enumerate(steps, start=1):
        trial = trial.started(step)
        stuck = count >= 3 and steps[count - 3] == steps[count - 2] == step
        if stuck:
            assert trial.state == "failed"
            assert trial.reason == f"was started 3 times from step {step} and got no further"
            return
        assert trial.state == "running"


def test_a_validation_that_is_repeated_is_kept_once() -> None:
    trial = Trial(0, {}).validated(0, 0.1).validated(1, 0.2).validated(2, 0.3).validated(1, 0.25)
    assert trial.validations == (Validation(0, 0.1), Validation(1, 0.25))


def test_the_first_difference_is_named(config: Config) -> None:
    other = replace(config, train=replace(config.train, epochs=9))
    assert first_difference(config, config) is None
    assert first_difference(config, other) == "train.epochs = 2, now 9"


def test_trials_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"config": 3}', '{"trials": []}'):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(UserError, match=r"trials.json: cannot be read \(.*--overwrite starts"):
            search_module.load(tmp_path)


def test_the_report_ends_with_what_to_paste(config: Config) -> None:
    search = _search(config)
    values = {"train.embedding_learning_rate": 0.2, "model.dimension": 16}
    search = search.with_trial(Trial(0, {**values, "model.dimension": 8}, "complete", 0.7, 9, 3.0))
    search = search.with_trial(Trial(1, values, "complete", 0.8, 9, 4.0))
    bad = Trial(2, {**values, "model.dimension": 32}, "failed", reason="too large")
    search = search.with_trial(bad)
    assert render_search(search.result("work/tune/trials.json")) == (
        "3 trials by validation auc\n"
        "trial      auc  embedding_learning_rate  dimension  seconds  state\n"
        "-----  -------  -----------------------  ---------  -------  --------\n"
        "    1  0.80000                      0.2         16        4  complete\n"
        "    0  0.70000                      0.2          8        3  complete\n"
        "    2                               0.2         32        0  failed\n"
        "\n"
        "The best trial, as options:\n"
        "--train.embedding-learning-rate 0.2 --model.dimension 16\n"
        "\n"
        "and as TOML:\n"
        "[train]\nembedding_learning_rate = 0.2\n\n[model]\ndimension = 16\n"
        "\n"
        "wrote work/tune/trials.json"
    )
    assert search_module.describe_trial(search, bad) == (
        "trial 2 failed (too large): --train.embedding-learning-rate 0.2 --model.dimension 32; "
        "best 0.80000 of trial 1"
    )
