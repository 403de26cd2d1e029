"""Names of features, keys and tasks are the user's: the whole way works with any of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from hvdrec import evaluate, export, make_samples, prepare, train
from hvdrec.cli.request_text import parse_scene
from hvdrec.config import (
    Config,
    Export,
    Feature,
    History,
    Model,
    Paths,
    Ranker,
    Samples,
    Task,
    Tower,
    Train,
)
from hvdrec.scoring import Scorer

ROWS = 240
USER_KEY, ITEM_KEY = "label", "Größe (cm)"
USER = ("key", "embedding", "user_embedding", "weight", "items", "training", "../up")
ITEM = ("title", "train_count", 'quote " and \\', "a/b", "item_index", "keys", "type", "a.b", "a")
SCENE = (
    "score", "request", "item_embedding", "time", "user_index", "first", "shared", "count", "one",
    "requests", "hour__code", "hour", "label_like", "score_like", "\N{GRINNING FACE}", "x=1", "^x$",
    "__row", "__label", "rows", "front/hour/0", "class", "Unnamed: 0", " padded ",
    "fields", "'single'", "{brace}%", "scene", "zwölf",
)  # fmt: skip
LISTS = ("tags, all", "values")


def _feature(name: str, side: Any, number: int) -> Feature:
    """Return a feature whose kind depends on its number; every third is a quantile."""
    if number % 3 == 0:
        return Feature(name, side)
    transform: Any = "quantile" if number % 3 == 1 else "log"
    return Feature(name, side, "numeric", "float", transform=transform, buckets=4)


def _config(folder: Path) -> Config:
    sided = ((USER, "user"), (ITEM, "item"), (SCENE, "scene"))
    single = [_feature(n, side, i) for names, side in sided for i, n in enumerate(names)]
    text = [f.name for f in single if f.kind == "categorical"]
    return Config(
        name="names",
        features=(
            Feature(USER_KEY),
            Feature("pop", kind="sequence", max_length=4),
            Feature(ITEM_KEY, "item"),
            *single,
            *(Feature(name, "item", "categorical_list") for name in LISTS),
            Feature("crossed!", "scene", "crossed", columns=("key", "title", "score")),
        ),
        paths=Paths(str(folder / "raw"), str(folder / "work")),
        samples=Samples(
            interactions="log.parquet",
            user=USER_KEY,
            item=ITEM_KEY,
            time="when",
            title="shown",
            label="liked",
            weight="1.0 + liked",
            derive={"twice it": f"\"{text[0]}\" || '2'"},
            history=(History("pop", length=4),),
        ),
        tasks=(Task("like", "liked"), Task("index", "liked")),
        model=Model(
            4,
            pooling={"values": "attention", "tags, all": "sqrt", "pop": "attention"},
            tower=Tower((8,), 4),
            ranker=Ranker((8, 8), direct=("key", "title", "values")),
        ),
        train=Train(epochs=1, batch_size=64, threads=1, objective="joint"),
        export=Export(filters=("title", "a/b", "values"), parity_rows=20),
    )


def _write_log(config: Config, file: Path) -> pa.Table:
    """Write a log in which each feature has values of its own."""
    rows = np.arange(ROWS)
    key = {"user": rows % 7, "item": rows % 11, "scene": rows}
    log: dict[str, Any] = {}
    for number, feature in enumerate(config.features):
        values = key[feature.side] * (number + 1) % (3 + number)
        if feature.kind == "categorical":
            log[feature.name] = [f"{feature.name}{value}" for value in values]
        elif feature.kind == "numeric":
            log[feature.name] = values / 4
        elif feature.kind == "categorical_list":
            log[feature.name] = [[f"{value}", "all"] for value in values]
    log |= {USER_KEY: key["user"], ITEM_KEY: key["item"]}
    log |= {"when": 1_700_000_000 + rows, "liked": rows % 3 % 2}
    log["shown"] = [f"Film {value}" for value in key["item"]]
    file.parent.mkdir()
    pq.write_table(pa.table(log), file)
    return pa.table(log)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, pa.Table]:
    """Run all stages to a bundle."""
    folder = tmp_path_factory.mktemp("names")
    config = _config(folder)
    log = _write_log(config, folder / "raw" / "log.parquet")
    make_samples(config, progress=False)
    prepare(config, workers=1, progress=False)
    train(config)
    evaluate(config.paths.of("run"), baselines=False)
    export(config.paths.of("run"), allow_worse=True, workers=1, progress=False)
    return config, log


def test_samples_keep_the_values_of_every_name(named: tuple[Config, pa.Table]) -> None:
    config, log = named
    own = config.schema.own_name
    folder = config.paths.of("samples")
    samples = pa.concat_tables(
        ds.dataset(str(folder / split), format="parquet").to_table()
        for split in ("train", "validation", "test")
    ).sort_by(own("time"))
    assert own("time") != "time"
    assert samples[own("time")].equals(log["when"])
    assert samples[own("label")].to_pylist() == log["liked"].to_pylist()
    assert samples[own("weight")].to_pylist() == [1.0 + liked for liked in log["liked"].to_pylist()]
    for column in config.schema.columns():
        if column.name in (USER_KEY, ITEM_KEY):
            assert samples[column.name].equals(log[column.name].cast(pa.string()))
        elif column.name in log.column_names:
            assert samples[column.name].to_pylist() == log[column.name].to_pylist(), column.name
    items = pq.read_table(folder / "items.parquet")
    assert set(items[own("title")].to_pylist()) == set(log["shown"].to_pylist())
    assert set(items["title"].to_pylist()) <= set(log["title"].to_pylist())


def test_every_name_has_known_codes(named: tuple[Config, pa.Table]) -> None:
    config, log = named
    shards = ds.dataset(str(config.paths.of("features") / "train"), format="parquet").to_table()
    for feature in config.features:
        if feature.kind == "categorical":
            codes = set(shards[feature.name].to_pylist())
            assert min(codes) >= 2, feature.name
            expected = set(log[feature.name].slice(0, shards.num_rows).to_pylist())
            assert len(codes) == len(expected), feature.name


def test_bundle_scores_requests_and_files_with_every_name(named: tuple[Config, pa.Table]) -> None:
    config, log = named
    bundle = config.paths.of("bundle")
    scorer = Scorer.load(str(bundle), verify=True)
    names = [field.name for field in scorer.info.side("scene")]
    assert sorted(names) == sorted(SCENE)
    row = log.slice(0, 1).to_pylist()[0]
    scene = {name: row[name] for name in SCENE}
    found = scorer.recommend("0", scene, k=3, allowed={"title": [row["title"]]})
    assert found[0].title is not None and found[0].title.startswith("Film")
    assert len(scorer.recommend("0", scene, k=99, allowed={"a/b": ["a/b0"]})) < scorer.items
    user = {USER_KEY: "0", **{name: row[name] for name in USER}}
    alone = scorer.score_tasks(user, [str(row[ITEM_KEY])], scene)
    assert set(alone) == {"score", "like", "index"}
    changed = {name: None for name in scene}
    assert scorer.score(user, ["0"], scene) != scorer.score(user, ["0"], changed)
    text = [f"{name}={scene[name]}" for name in ("x=1", " padded ", "score")]
    assert parse_scene(scorer, text) == {n: scene[n] for n in ("x=1", " padded ", "score")}


def test_manifest_says_which_names_gave_way(named: tuple[Config, pa.Table]) -> None:
    bundle = Path(str(named[0].paths.of("bundle")))
    meta = json.loads((bundle / "manifest.json").read_text())["meta"]
    assert meta["names"]["request"] == "__hvdrec_request"
    assert "a/b" in meta["filters"]
    assert "title" not in meta["filters"]
