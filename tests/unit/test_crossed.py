"""The kind ``crossed``: codes against plain Python, and scores of stored users and items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdrec.config import Config
from hvdrec.config.data_sections import Samples
from hvdrec.config.schema import Feature, Schema
from hvdrec.config.sections import Export, Model, Ranker, Tower, Train
from hvdrec.errors import UserError
from hvdrec.exporting.graphs import stored_width
from hvdrec.exporting.precision import quantize_ranker
from hvdrec.exporting.serving_graph import ranker
from hvdrec.features import fit as fitting
from hvdrec.features.encoder import Encoder
from hvdrec.features.fit import Fitted, fit
from hvdrec.features.graph import build, output_name
from hvdrec.features.kinds import FittedFeature
from hvdrec.features.kinds.nodes import HASH_PRIME, hash_coefficients
from hvdrec.models.recommender import Recommender
from hvdrec.training.build import build_model

USER = Feature("user")
ITEM = Feature("item", side="item", dtype="int")
PRICE = Feature("price", "item", "numeric", "float", transform="quantile", buckets=4)
HOUR = Feature("hour", side="scene", dtype="int")
SHOP = Feature("shop", "scene", "hashed", "int", buckets=9)


def cross(name: str, side: Any, *columns: str, buckets: int = 50) -> Feature:
    return Feature(name, side, "crossed", columns=columns, buckets=buckets)


CROSSES = (
    cross("item_price", "item", "item", "price"),
    cross("hour_shop", "scene", "hour", "shop"),
    cross("hour_user", "scene", "hour", "user", buckets=7),
    cross("hour_item", "scene", "hour", "item", "price"),
    cross("everything", "scene", "user", "price", "shop", "hour", buckets=1000),
)
SCHEMA = Schema((*CROSSES, USER, ITEM, PRICE, HOUR, SHOP), "user", "item")
RAW = {
    "user": pa.string(),
    "item": pa.int64(),
    "price": pa.float64(),
    "hour": pa.int64(),
    "shop": pa.int64(),
}


def crossed_code(feature: Feature, codes: list[int]) -> int:
    """Return the code of a crossed feature in plain Python."""
    if 0 in codes:
        return 0
    *multipliers, last = hash_coefficients(feature.name, len(codes))
    total = last + sum(a * code for a, code in zip(multipliers, codes, strict=True))
    return 2 + total % HASH_PRIME % feature.buckets


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    folder = tmp_path_factory.mktemp("crossed")
    (folder / "train").mkdir()
    rows = [{"user": "abc"[n % 3], "item": n % 5, "price": n, "hour": n % 4} for n in range(20)]
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(RAW)), folder / "train/part-00000.parquet")
    return fit(folder, SCHEMA)


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "user": st.sampled_from([None, "", "a", "b", "new"]),
            "item": st.sampled_from([None, 0, 4, 99]),
            "price": st.sampled_from([None, float("nan"), 1.0, 8.0, 15.0]),
            "hour": st.sampled_from([None, 0, 3, 99]),
            "shop": st.one_of(st.none(), st.integers(-(2**63) + 1, 2**63 - 1)),
        }
    ),
    max_size=8,
)


@given(rows=ROWS)
@settings(max_examples=60, deadline=None)
def test_codes_are_those_of_plain_python(fitted: Fitted, rows: list[dict[str, Any]]) -> None:
    codes = Encoder(fitted).encode(SCHEMA.features, pa.Table.from_pylist(rows, pa.schema(RAW)))
    assert list(codes) == [feature.name for feature in SCHEMA.features]
    for feature in CROSSES:
        sources = zip(*(codes[name].to_pylist() for name in feature.columns), strict=True)
        assert codes[feature.name].to_pylist() == [crossed_code(feature, [*row]) for row in sources]


def test_one_graph_computes_all_features_from_raw_values(fitted: Fitted) -> None:
    names = [feature.name for feature in SCHEMA.features]
    session = onnxruntime.InferenceSession(build(fitted, names).SerializeToString())
    assert {value.name for value in session.get_inputs()} == RAW.keys()
    raw = {
        "user": np.array(["a", ""], object),
        "item": np.array([4, 4]),
        "price": np.array([9.0, 9.0]),
        "hour": np.array([2, 2]),
        "shop": np.array([-7, -7]),
    }
    codes = dict(zip(names, session.run([output_name(name) for name in names], raw), strict=True))
    for feature in CROSSES:
        for row in range(2):
            expected = crossed_code(feature, [int(codes[name][row]) for name in feature.columns])
            assert codes[feature.name][row] == expected
    assert codes["hour_user"][1] == 0 and codes["hour_user"][0] > 1


def test_fitting_learns_nothing_and_sizes_are_buckets(fitted: Fitted, tmp_path: Path) -> None:
    assert {name: fitted.sizes[name] for name in ("hour_user", "everything")} == {
        "hour_user": 9,
        "everything": 1002,
    }
    fitted.save(tmp_path)
    names = [feature.name for feature in SCHEMA.features]
    again = build(Fitted.load(tmp_path), names)
    assert again.SerializeToString() == build(fitted, names).SerializeToString()


def test_pairs_spread_evenly_over_the_buckets() -> None:
    features = (Feature("a", side="scene"), Feature("b", side="scene"))
    pair = cross("pair", "scene", "a", "b", buckets=100)
    schema = Schema((*features, pair), "user", "item")
    fitted = Fitted(schema, {"pair": FittedFeature(pair, 102)})
    session = onnxruntime.InferenceSession(build(fitted, ["pair"]).SerializeToString())
    a, b = (grid.ravel() for grid in np.meshgrid(np.arange(2, 502), np.arange(2, 502)))
    codes = session.run(None, {output_name("a"): a, output_name("b"): b})[0]
    counts = np.bincount(codes, minlength=102)
    assert counts[:2].tolist() == [0, 0]
    assert counts[2:].min() > 2_200 and counts[2:].max() < 2_800  # 2,500 on average
    # The order of the features matters: (2, 3) and (3, 2) are different pairs.
    assert (codes.reshape(500, 500) == codes.reshape(500, 500).T).mean() < 0.05


def test_a_source_with_too_many_codes_for_float32_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train").mkdir()
    table = pa.table({"user": ["a", "b"], "item": [1, 2], "hour": [3, 4]})
    pq.write_table(table, tmp_path / "train/part-00000.parquet")
    schema = Schema((USER, ITEM, HOUR, cross("x", "scene", "hour", "item")), "user", "item")
    monkeypatch.setattr(fitting, "LARGEST_CARRIED", 4)
    fit(tmp_path, schema)
    monkeypatch.setattr(fitting, "LARGEST_CARRIED", 3)
    with pytest.raises(UserError, match="combine at most 3 codes") as error:
        fit(tmp_path, schema)
    assert error.value.value == "item"


def test_compressed_embeddings_are_refused() -> None:
    config = {"name": "x", "samples": Samples(user="user", item="item")}
    one_side = (*SCHEMA.features[:2], USER, ITEM, PRICE, HOUR, SHOP)
    Config(features=one_side, export=Export(embeddings="int8"), **config)
    with pytest.raises(UserError, match="user, item, price") as error:
        Config(features=SCHEMA.features, export=Export(embeddings="float16"), **config)
    assert (error.value.field, error.value.value) == ("export.embeddings", "float16")


RANKERS = {
    "factored": Ranker(hidden=(6, 5), direct=("user", "item_price")),
    "cross-layers": Ranker(hidden=(6,), cross_layers=2, direct=("user",)),
    "linear": Ranker(hidden=()),
}


def model_of(shape: Ranker, fitted: Fitted, objective: str = "ranking") -> Recommender:
    config = Config(
        name="crossed",
        features=SCHEMA.features,
        samples=Samples(user="user", item="item"),
        model=Model(dimension=4, tower=Tower(hidden=(7,), output=5), ranker=shape),
        train=Train(objective=objective),  # type: ignore[arg-type]
    )
    model = build_model(config, fitted.sizes, with_tables=True)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def scored(graph: onnx.ModelProto, inputs: dict[str, Any]) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    scores: np.ndarray = session.run(["score"], inputs)[0]
    return scores


@pytest.mark.parametrize("name", RANKERS)
@pytest.mark.parametrize("pairs", [[0, 0, 0, 0], [2, 0, 1, 1]], ids=["one", "many"])
def test_stored_codes_and_the_scene_give_the_scores_of_torch(
    fitted: Fitted, name: str, pairs: list[int]
) -> None:
    model = model_of(RANKERS[name], fitted)
    requests, items = max(pairs) + 1, len(pairs)
    random = np.random.default_rng(3)
    codes = {
        "user": random.integers(0, 5, requests),
        "item": random.integers(0, 7, items),
        "price": random.integers(0, 6, items),
    }
    raw = {"hour": np.array([1, 3, 99])[:requests], "shop": np.array([5, -(2**63), 7])[:requests]}
    plain = build(fitted, ["hour", "shop"]).SerializeToString()
    outputs = onnxruntime.InferenceSession(plain).run(
        [output_name("hour"), output_name("shop")], raw
    )
    codes |= {"hour": outputs[0], "shop": outputs[1]}

    users = random.normal(size=(requests, model.user_width())).astype(np.float32)
    vectors = random.normal(size=(items, model.item_width())).astype(np.float32)
    stored_items = [vectors, codes["item"][:, None], codes["price"][:, None]]
    inputs = {
        "user_embedding": np.concatenate([users, codes["user"][:, None]], 1).astype(np.float32),
        "item_embedding": np.concatenate(stored_items, 1).astype(np.float32),
        "request": np.array(pairs),
        **raw,
    }
    assert inputs["user_embedding"].shape[1] == stored_width(model, "user")
    assert inputs["item_embedding"].shape[1] == stored_width(model, "item")

    paired = {
        name: column if name in ("item", "price") else column[pairs]
        for name, column in codes.items()
    }
    for feature in CROSSES:
        rows = zip(*(paired[source].tolist() for source in feature.columns), strict=True)
        paired[feature.name] = np.array([crossed_code(feature, [*row]) for row in rows])
    tensors = {name: torch.from_numpy(column) for name, column in paired.items()}
    with torch.inference_mode():
        logits = model.rank(torch.from_numpy(users[pairs]), torch.from_numpy(vectors), tensors)
    graph = ranker(model, fitted)
    onnx.checker.check_model(graph, full_check=True)
    np.testing.assert_allclose(scored(graph, inputs), logits.sigmoid(), atol=2e-6, rtol=0)


def test_a_model_without_a_ranker_stores_codes_that_nothing_reads(fitted: Fitted) -> None:
    model = model_of(Ranker(), fitted, "retrieval")
    users, items = np.ones((1, 6), np.float32), np.ones((2, 7), np.float32)
    raw = {"hour": np.array([1]), "shop": np.array([1])}
    inputs = {"user_embedding": users, "item_embedding": items, "request": np.zeros(2, np.int64)}
    scores = scored(ranker(model, fitted), {**inputs, **raw})
    expected = 1 / (1 + np.exp(-5 / model.temperature))
    np.testing.assert_allclose(scores, [expected, expected], rtol=1e-6)


def test_pair_lookups_stay_float32_in_an_int8_ranker(fitted: Fitted, tmp_path: Path) -> None:
    file = tmp_path / "ranker.onnx"
    onnx.save(ranker(model_of(Ranker(hidden=(64, 32)), fitted), fitted), str(file))
    quantize_ranker(file)
    nodes = [node.op_type for node in onnx.load(str(file)).graph.node]
    assert nodes.count("MatMulInteger") == 1
