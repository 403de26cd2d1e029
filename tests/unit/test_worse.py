"""Before export, retrieval is compared with popularity: by event if the split follows time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hvdrec.config import Config, Evaluate, Feature, History, Model, Paths, Samples, Split, Train
from hvdrec.config.sections import Tower
from hvdrec.errors import UserError
from hvdrec.evaluation.evaluate import measure_model, validation_metric
from hvdrec.evaluation.popularity import popularity_by_event
from hvdrec.exporting.worse import compare_with_baselines
from hvdrec.features.prepare import prepare
from hvdrec.models.recommender import Recommender
from hvdrec.samples.make import make_samples
from hvdrec.storage.artifacts import Manifest
from hvdrec.training.build import build_model
from hvdrec.training.labels import read_label_facts, with_defined_metric, with_popularity_by_event
from hvdrec.training.pointers import Checkpoint

USERS, CHAIN, TAKEN = 60, 8, 4
ITEMS = [*(f"a{i}" for i in range(CHAIN)), *(f"b{i}" for i in range(CHAIN)), "popular"]
BY_LIST = {"baseline": "popularity", "metric": "recall@1", "task": "", "value": 0.1, "model": 0.0}
BY_EVENT = {**BY_LIST, "metric": "events.hit_rate@1"}


def chain(name: str, user: int) -> list[str]:
    """Items that a user takes one after the other."""
    return [f"{name}{(user + step) % CHAIN}" for step in range(TAKEN)]


def log() -> list[dict[str, Any]]:
    """Return a log in which users take part of chain a, later part of chain b.

    Half of the users take the popular item in the training split, the others at the end of the
    validation split. So the state of a user at the end of training does not predict what comes in
    the validation split, but its item before each event does.
    """
    rows = []
    for user in range(USERS):
        late = user % 2
        first = [*([] if late else ["popular"]), *chain("a", user)]
        then = [*chain("b", user), *(["popular"] if late else [])]
        rows += [(user, item, time) for time, item in enumerate(first)]
        rows += [(user, item, 200 + time) for time, item in enumerate(then)]
    for user in range(USERS, USERS + CHAIN):
        rows += [(user, item, time) for time, item in enumerate(["popular", *chain("b", user)])]
        rows.append((user, "a0", 400))
    return [{"user": f"u{u:02}", "item": item, "t": time, "liked": 1} for u, item, time in rows]


@dataclass(frozen=True)
class Prepared:
    config: Config
    code: dict[str, int]

    def model(self, after: Sequence[int]) -> Recommender:
        """Return a model for which ITEMS[after[i]] comes right after ITEMS[i]."""
        width = len(ITEMS)
        sizes = {"user": USERS + CHAIN + 2, "item": width + 2}
        model = build_model(self.config, sizes, with_tables=True).eval()
        weights = dict(model.named_parameters())
        with torch.no_grad():
            for name in ("user_tower.head", "item_tower.head"):
                weights[f"{name}.weight"].zero_()
                weights[f"{name}.bias"].zero_()
            weights["tables.tables.item.weight"].zero_()
            for i, item in enumerate(ITEMS):
                weights["tables.tables.item.weight"][self.code[item], i] = 1
                weights["item_tower.head.weight"][i, i] = 1
                weights["user_tower.head.weight"][after[i], width + i] = 1
        return model

    def with_fields(self, objective: str, method: str = "temporal", **paths: str) -> Config:
        config = self.config
        split = replace(config.samples.split, method=method)
        return replace(
            config,
            train=replace(config.train, objective=objective),
            samples=replace(config.samples, split=split),
            paths=replace(config.paths, **paths),
        )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("worse")
    pq.write_table(pa.Table.from_pylist(log()), folder / "log.parquet")
    config = Config(
        "worse",
        (
            Feature("user"),
            Feature("history", kind="sequence", max_length=1, shares="item"),
            Feature("item", side="item"),
        ),
        paths=Paths(raw=str(folder), work=str(folder / "work")),
        samples=Samples(
            interactions="log.parquet",
            user="user",
            item="item",
            label="liked",
            time="t",
            history=(History("history", length=1),),
            split=Split(boundaries=(100.0, 300.0)),
        ),
        model=Model(dimension=len(ITEMS), tower=Tower(hidden=(), output=len(ITEMS))),
        train=Train(objective="retrieval"),
        evaluate=Evaluate(k=(1,)),
    )
    make_samples(config, progress=False)
    prepare(config, workers=1, progress=False)
    items = pq.read_table(folder / "work/features/items.parquet").to_pydict()
    return Prepared(config, dict(zip(items["key"], items["item"], strict=True)))


def next_in_chain() -> list[int]:
    """Return, for each item, the item that follows it; the popular item follows itself."""
    after = [(i + 1) % CHAIN + chain * CHAIN for chain in range(2) for i in range(CHAIN)]
    return [*after, len(ITEMS) - 1]


def shuffled() -> list[int]:
    """Return the following items, moved by three places within each chain."""
    after = next_in_chain()
    return [after[(i + 3) % CHAIN + i // CHAIN * CHAIN] for i in range(2 * CHAIN)] + after[-1:]


def compare(
    config: Config,
    model: Recommender,
    metrics: dict[str, Any],
    *,
    allow_worse: bool = False,
) -> tuple[list[dict[str, Any]] | None, list[str]]:
    """Compare a model whose checkpoint records some metrics; also return the lines to the user."""
    manifest = Manifest("checkpoint", {"metrics": metrics}, {}, 1)
    said: list[str] = []
    found = compare_with_baselines(
        config,
        model,
        Checkpoint(Path("step-00000001"), manifest),
        allow_worse=allow_worse,
        notify=said.append,
    )
    return found, said


@pytest.mark.parametrize("objective", ["retrieval", "joint"])
def test_a_model_that_is_better_by_event_is_exported(prepared: Prepared, objective: str) -> None:
    model = prepared.model(next_in_chain())
    # By one list per user, popularity finds more.
    with pytest.raises(UserError, match=r"popularity \(recall@1 0 against 0.1"):
        compare(prepared.with_fields("joint", "random"), model, {"worse_than": []})
    # A checkpoint of an earlier version records that.
    found, _ = compare(prepared.with_fields(objective), model, {"worse_than": [BY_LIST]})
    assert found == []
    other = {**BY_LIST, "baseline": "item_mean", "metric": "auc"}
    with pytest.raises(UserError, match="item_mean") as error:
        compare(prepared.with_fields(objective), model, {"worse_than": [other, BY_LIST]})
    assert "popularity" not in str(error.value)


@pytest.mark.parametrize("objective", ["retrieval", "joint"])
@pytest.mark.parametrize("recorded", [{}, {"worse_than": []}])
def test_a_shuffled_model_is_refused(
    prepared: Prepared, objective: str, recorded: dict[str, Any]
) -> None:
    with pytest.raises(UserError) as error:
        compare(prepared.with_fields(objective), prepared.model(shuffled()), recorded)
    # 30 of 270 events are the popular item.
    assert "popularity (hit_rate@1 by event 0 against 0.1111)" in str(error.value)
    assert "--allow-worse" in str(error.value)


def test_what_training_recorded_by_event_is_used(prepared: Prepared) -> None:
    config, model = prepared.with_fields("retrieval"), prepared.model(next_in_chain())
    with pytest.raises(UserError, match=r"hit_rate@1 by event 0 against 0.1"):
        compare(config, model, {"worse_than": [BY_EVENT], "events": {"hit_rate@1": 0.0}})


def test_one_list_per_user_is_compared_where_events_cannot_be_read(prepared: Prepared) -> None:
    model = prepared.model(next_in_chain())
    with pytest.raises(UserError, match=r"recall@1 0 against 0.1"):
        compare(prepared.with_fields("retrieval", "random"), model, {"worse_than": [BY_LIST]})
    config = prepared.with_fields("retrieval", samples="/nowhere")
    found, said = compare(config, model, {"worse_than": [BY_LIST]}, allow_worse=True)
    assert found == [BY_LIST]
    assert "one list per user" in said[0] and "/nowhere" in said[0]


def test_training_and_evaluation_compare_by_event(prepared: Prepared) -> None:
    config = prepared.config
    chosen, facts, _ = with_defined_metric(config, read_label_facts(config))
    facts, by_event, said = with_popularity_by_event(chosen, facts)
    assert by_event is not None and not said
    [reference] = facts.references
    assert (reference.metric, reference.value) == ("events.hit_rate@1", pytest.approx(30 / 270))
    model = prepared.model(next_in_chain())
    _, metrics = validation_metric(model, chosen, "recall@1", events=by_event.events)
    # The first item of chain b and the popular item cannot be foreseen.
    assert metrics["recall@1"] == 0
    assert metrics["events"]["hit_rate@1"] == pytest.approx(USERS * (TAKEN - 1) / 270)
    for after, worse in ((next_in_chain(), []), (shuffled(), ["events.hit_rate@1"])):
        report = measure_model(prepared.model(after), config, "validation").report
        assert [each["metric"] for each in report["worse_than"]] == worse
    plain = replace(config, evaluate=replace(config.evaluate, events=0))
    assert popularity_by_event(plain) == (None, "")
    report = measure_model(model, plain, "validation").report
    assert [each["metric"] for each in report["worse_than"]] == ["recall@1"]
