"""A search: its space, the next trial, and its stored state."""

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
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from hvdrec.cli.parser import parse
from hvdrec.cli.reports import render_search
from hvdrec.config import Config, load_config, with_fields
from hvdrec.errors import UserError
from hvdrec.tuning.search import (
    FILE,
    Search,
    State,
    Trial,
    TuneResult,
    Validation,
    best_trial,
    describe_trial,
    first_difference,
    is_hopeless,
    load_search,
    next_values,
    ranked,
)
from hvdrec.tuning.space import (
    Distribution,
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


def _choices(*values: Any) -> CategoricalDistribution:
    return CategoricalDistribution([json.dumps(value) for value in values])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RATE, FloatDistribution(0.05, 0.8, log=True)),
        ("model.ranker.dropout=0:0.4", FloatDistribution(0.0, 0.4)),
        ("model.ranker.dropout=0:0.4:0.1", FloatDistribution(0.0, 0.4, step=0.1)),
        ("train.batch_size=log:256:8192", IntDistribution(256, 8192, log=True)),
        ("train.warmup_steps=0:200:50", IntDistribution(0, 200, step=50)),
        ("--model.ranker.cross-layers=0:3", IntDistribution(0, 3)),
        ("model.dimension=16,32,64", _choices(16, 32, 64)),
        ("model.tower.normalize=true,false", _choices(True, False)),
        ("train.schedule=linear,cosine", _choices("linear", "cosine")),
        ("model.ranker.hidden=[256, 128],[],[400]", _choices([256, 128], [], [400])),
        ('model.ranker.direct=["age"],[]', _choices(["age"], [])),
        ("loader.shuffle_rows=1000,2000", _choices(1000, 2000)),
    ],
)
def test_texts_are_parsed_to_distributions(
    config: Config, text: str, expected: Distribution
) -> None:
    field = text.partition("=")[0].removeprefix("--").replace("-", "_")
    assert parse_space([text], config) == {field: expected}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model.dimension", ["'model.dimension'", "FIELD=RANGE or FIELD=A,B,C"]),
        ("model.dimenson=1,2", ["model.dimenson", "unknown", "did you mean 'model.dimension'?"]),
        ("samples.label=a,b", ["decides what the samples and features are", "model.*, train.*"]),
        ("features.dimension=8,16", ["decides what the samples and features are", "trials share"]),
        ("paths.work=a,b", ["decides what the samples and features are"]),
        ("export.index=none,hnsw", ["does not change the metric that compares trials"]),
        ("train.metric=auc,gauc", ["decides which metric compares", "set it in the config"]),
        ("model.tower=1,2", ["is a table", "name one of its fields: [model.tower.hidden, "]),
        ("train.schedule=linear,steep", ["train.schedule = 'steep': must be 'constant', "]),
        ("model.ranker.dropout=0:1", ["model.ranker.dropout = 1.0: must be less than 1"]),
        ("model.ranker.dropout=0.4:0.1", ["low=0.4", "high=0.1"]),
        ("model.ranker.dropout=log:0:0.1", ["`low > 0` must hold"]),
        ("model.ranker.dropout=log:0.1:0.2:0.1", ["a range is LOW:HIGH, LOW:HIGH:STEP or"]),
        ("model.ranker.dropout=0:0.4:0.5", ["model.ranker.dropout = '0:0.4:0.5': holds one value"]),
        ("model.ranker.dropout=0.1:0.1", ["holds one value"]),
        ("model.ranker.dropout=0:nan", ["model.ranker.dropout"]),
        ("model.ranker.dropout=0:inf", ["model.ranker.dropout"]),
        ("model.dimension=16:3.5", ["model.dimension = '3.5': must be", "integer"]),
        ("model.dimension=16", ["give a range, or two different values"]),
        ("model.dimension=16,16", ["give a range, or two different values"]),
        ("model.ranker.hidden=256,128", ["'256': must be a list such as [256,128]"]),
        ("model.tower.normalize=maybe,no", ["model.tower.normalize = 'maybe': must be"]),
    ],
)
def test_a_search_that_is_not_possible_is_refused(
    config: Config, text: str, parts: list[str]
) -> None:
    with pytest.raises(UserError) as raised:
        parse_space([text], config)
    assert raised.value.field == "search"
    for part in parts:
        assert part in str(raised.value)


def test_a_field_is_given_once(config: Config) -> None:
    with pytest.raises(UserError, match=r"'model.dimension' is given twice; give one range"):
        parse_space(["model.dimension=16,32", "model.dimension=8,16"], config)


def test_values_can_be_pasted_as_options_and_as_toml(config: Config, tmp_path: Path) -> None:
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
    assert values_of(load_config(file), values) == values


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


def test_the_first_trial_is_the_configuration_as_it_is(config: Config) -> None:
    assert next_values(_search(config)) == {
        "train.embedding_learning_rate": 0.5,
        "model.dimension": 8,
    }
    outside = _search(config, "train.embedding_learning_rate=log:0.001:0.01")
    search = _filled(outside, 3, lambda values: 0.5)
    first, *others = (trial.values["train.embedding_learning_rate"] for trial in search.trials)
    assert first == 0.5
    assert all(0.001 <= value <= 0.01 for value in others)


def test_a_stored_search_proposes_the_same_values(config: Config, tmp_path: Path) -> None:
    uninterrupted = _filled(_search(config), 15, _quality)
    interrupted = _filled(_search(config), 12, _quality)
    interrupted.save(tmp_path)
    read = load_search(tmp_path)
    assert read == interrupted
    assert read is not None
    assert _filled(read, 15, _quality) == uninterrupted
    # No combination repeats, and the best one is near the optimum.
    assert len({json.dumps(trial.values) for trial in uninterrupted.trials}) == 15
    best = best_trial(uninterrupted.trials, "auc")
    assert best is not None
    assert best.values["model.dimension"] == 8


def test_the_seed_decides_the_proposals(config: Config) -> None:
    first = _filled(_search(config), 3, _quality)
    second = _filled(_search(replace(config, seed=1)), 3, _quality)
    assert first.trials[0].values == second.trials[0].values
    assert first.trials[2].values != second.trials[2].values


def test_a_search_ends_when_all_combinations_were_tried(config: Config) -> None:
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
    assert [trial.state for trial in ranked(search.trials, search.metric)] == [
        "complete",
        "pruned",
        "failed",
    ]
    assert best_trial(search.trials, "auc") == search.trials[0]


def test_the_lowest_loss_ranks_first(config: Config) -> None:
    search = replace(_search(config), metric="log_loss", is_loss=True)
    for number, value in enumerate((0.5, 0.3, 0.4)):
        search = search.with_trial(Trial(number, {}, "complete", value))
    assert [trial.number for trial in ranked(search.trials, search.metric)] == [1, 2, 0]


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
def test_a_trial_without_progress_fails_after_three_starts(steps: list[int]) -> None:
    trial = Trial(0, {})
    for count, step in enumerate(steps, start=1):
        trial = trial.started(step)
        stuck = count >= 3 and steps[count - 3] == steps[count - 2] == step
        if stuck:
            assert trial.state == "failed"
            assert trial.reason == f"was started 3 times from step {step} without progress"
            return
        assert trial.state == "running"


def test_a_repeated_validation_replaces_the_earlier_one() -> None:
    trial = Trial(0, {}).validated(0, 0.1).validated(1, 0.2).validated(2, 0.3).validated(1, 0.25)
    assert trial.validations == (Validation(0, 0.1), Validation(1, 0.25))


def test_the_first_difference_is_named(config: Config) -> None:
    other = replace(config, train=replace(config.train, epochs=9))
    assert first_difference(config, config) is None
    assert first_difference(config, other) == "train.epochs = 2, now 9"


def test_a_damaged_trials_file_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"config": 3}', '{"trials": []}'):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(UserError, match=r"trials.json: cannot be read \(.*--overwrite starts"):
            load_search(tmp_path)


def test_the_report_ends_with_values_to_paste(config: Config) -> None:
    search = _search(config)
    values = {"train.embedding_learning_rate": 0.2, "model.dimension": 16}
    search = search.with_trial(Trial(0, {**values, "model.dimension": 8}, "complete", 0.7, 9, 3.0))
    search = search.with_trial(Trial(1, values, "complete", 0.8, 9, 4.0))
    bad = Trial(2, {**values, "model.dimension": 32}, "failed", reason="too large")
    search = search.with_trial(bad)
    assert render_search(TuneResult("work/tune/trials.json", "auc", search.trials)) == (
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
    assert describe_trial(search, bad) == (
        "trial 2 failed (too large): --train.embedding-learning-rate 0.2 --model.dimension 32; "
        "best 0.80000 of trial 1"
    )
