"""Measure `Scorer.score` beside the bare ONNX session and the same model in torch.

The model is that of configs/movielens-1m.toml with random weights, on random tables of
MovieLens-1M's shape, taken through every stage to a real bundle. All measurements run on one
thread, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import torch
from onnx import TensorProto, helper, numpy_helper
from synthetic import write_tables

from hvdrec.config import Config, load_config
from hvdrec.exporting import ranker_graph
from hvdrec.exporting.graphs import inner
from hvdrec.exporting.writer import write_bundle
from hvdrec.features.encode import encode
from hvdrec.features.fit import Fitted
from hvdrec.features.graph import output_name
from hvdrec.features.raw import rows_to_inputs
from hvdrec.models.recommender import Recommender
from hvdrec.samples import make_samples
from hvdrec.scoring import Scorer
from hvdrec.training.build import build_model

CONFIG = Path(__file__).parents[2] / "configs" / "movielens-1m.toml"
CANDIDATES = 500
SCENE = {"hour": 21, "weekday": 4}
Inputs = dict[str, np.ndarray]


def measure(turns: int = 5, seconds: float = 1.0) -> dict[str, Any]:
    """Return the figures of ``score``: ratios, and microseconds per call."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hvdrec-score-") as folder:
        config, model, fitted = prepared(Path(folder))
        bundles = {
            kind: exported(config, model, kind) for kind in ("float32", "float16", "int8", "rank8")
        }
        return _measured(config, model, fitted, bundles, turns, seconds)


def _measured(
    config: Config,
    model: Recommender,
    fitted: Fitted,
    bundles: Mapping[str, Path],
    turns: int,
    seconds: float,
) -> dict[str, Any]:
    scorers = {kind: Scorer.load(path) for kind, path in bundles.items()}
    scorer = scorers["float32"]
    keys = np.load(bundles["float32"] / "items/keys.npy").astype(str)
    items = np.random.default_rng(0).permutation(keys)[:CANDIDATES].tolist()
    user = str(np.load(bundles["float32"] / "users/keys.npy").astype(str)[7])
    inputs = _ready(scorer, user, items)
    single = _ready(scorer, user, items[:1])
    session = _session(bundles["float32"] / "ranker.onnx")
    whole = _session(_unfactored(model, fitted, bundles["float32"].parent))
    stored, stored_inputs = _item_part_stored(model, bundles["float32"], inputs)
    few = [(user, items[i : i + 10], SCENE) for i in range(50)]

    def in_torch() -> np.ndarray:
        return _torch_scores(model, inputs, codes)

    codes = _codes(config, fitted)
    calls: dict[str, Callable[[], Any]] = {
        "bare": lambda: session.run(["score"], inputs),
        "score": lambda: scorer.score(user, items, SCENE),
        "torch": in_torch,
        "unfactored": lambda: whole.run(["score"], inputs),
        "item_part_stored": lambda: stored.run(["score"], stored_inputs),
        "bare_single": lambda: session.run(["score"], single),
        "score_single": lambda: scorer.score(user, items[:1], SCENE),
        "float16_embeddings": lambda: scorers["float16"].score(user, items, SCENE),
        "int8_embeddings": lambda: scorers["int8"].score(user, items, SCENE),
        "int8_ranker": lambda: scorers["rank8"].score(user, items, SCENE),
        "one_by_one": lambda: [scorer.score(*request) for request in few],
        "score_many": lambda: scorer.score_many(few),
    }
    reference = calls["score"]()
    for name in ("bare", "torch", "unfactored", "item_part_stored"):
        np.testing.assert_allclose(np.ravel(calls[name]()), reference, atol=1e-5)
    found = _in_turns(calls, turns, seconds)
    return {
        "over_bare": found["score"] / found["bare"],
        "over_torch": found["torch"] / found["score"],
        "single_over_bare_us": found["score_single"] - found["bare_single"],
        "brings": {
            "user_and_scene_once": found["unfactored"] / found["bare"],
            "item_part_stored": found["bare"] / found["item_part_stored"],
            "int8_ranker": found["score"] / found["int8_ranker"],
            "int8_embeddings": found["score"] / found["int8_embeddings"],
            "float16_embeddings": found["score"] / found["float16_embeddings"],
            "score_many_of_50x10": found["one_by_one"] / found["score_many"],
        },
        "microseconds": found,
        "candidates": CANDIDATES,
        "turns": turns,
    }


def _in_turns(
    calls: Mapping[str, Callable[[], Any]], turns: int, seconds: float
) -> dict[str, float]:
    """Return the median, over turns, of each call's median time in microseconds."""
    medians: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            times, end = [], time.perf_counter() + seconds
            while (start := time.perf_counter()) < end or len(times) < 20:
                call()
                times.append(time.perf_counter() - start)
            medians[name].append(statistics.median(times) * 1e6)
    return {name: statistics.median(values) for name, values in medians.items()}


def prepared(folder: Path) -> tuple[Config, Recommender, Fitted]:
    """Return a configuration with samples and features on disk, and a model of random weights."""
    write_tables(folder / "raw")
    config = load_config(CONFIG)
    paths = replace(config.paths, raw=str(folder / "raw"), work=str(folder))
    config = replace(config, paths=paths, export=replace(config.export, parity_rows=200))
    make_samples(config)
    encode(config.paths.of("samples"), config.paths.of("features"), config)
    fitted = Fitted.load(config.paths.of("features"))
    torch.manual_seed(0)
    return config, build_model(config, fitted.sizes, with_tables=True).eval(), fitted


def exported(config: Config, model: Recommender, kind: str) -> Path:
    smaller = {"ranker": "int8"} if kind == "rank8" else {"embeddings": kind}
    out = Path(config.paths.work) / f"bundle-{kind}"
    config = replace(
        config,
        paths=replace(config.paths, bundle=str(out)),
        export=replace(config.export, **smaller),  # type: ignore[arg-type]
    )
    write_bundle(config, model, checkpoint="random", metrics={})
    return out


def _ready(scorer: Scorer, user: str, items: list[str]) -> Inputs:
    """Return the ranker's inputs for one request."""
    return {
        "user_embedding": scorer.embed_user(user)[None],
        "item_embedding": scorer.embed_items(items),
        "request": np.zeros(len(items), dtype=np.int64),
        **{name: np.array([value]) for name, value in SCENE.items()},
    }


def _session(graph: Path | bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source = str(graph) if isinstance(graph, Path) else graph
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _unfactored(model: Recommender, fitted: Fitted, folder: Path) -> Path:
    """Write the ranker as torch computes it: user and scene are gathered for each candidate."""
    factored = ranker_graph.factored
    try:
        ranker_graph.factored = lambda _: None  # type: ignore[assignment]
        onnx.save(ranker_graph.ranker(model, fitted), str(folder / "whole.onnx"))
    finally:
        ranker_graph.factored = factored
    return folder / "whole.onnx"


def _item_part_stored(model: Recommender, bundle: Path, inputs: Inputs) -> tuple[Any, Inputs]:
    """Return a ranker whose input is the precomputed item W_i, and its inputs."""
    graph = onnx.load(str(bundle / "ranker.onnx"))
    branch = next(n for n in graph.graph.node if n.op_type == "If")
    then = next(a.g for a in branch.attribute if a.name == "then_branch")
    kept = [n for n in then.node if n.op_type not in ("Pad", "Add", "Gemm")]
    del then.node[:]
    then.node.extend(
        [
            *kept,
            helper.make_node(
                "Gemm", ["item_embedding", inner("of_products"), inner("shared")], ["rest"]
            ),
            helper.make_node("Add", ["rest", "item_part"], [inner("first_of_one")]),
        ]
    )
    weight = next(w for w in graph.graph.initializer if w.name == inner("item_weight"))
    part = inputs["item_embedding"] @ numpy_helper.to_array(weight)
    shape = ["rows", part.shape[1]]
    graph.graph.input.append(helper.make_tensor_value_info("item_part", TensorProto.FLOAT, shape))
    return _session(graph.SerializeToString()), {**inputs, "item_part": part}


def _codes(config: Config, fitted: Fitted) -> dict[str, torch.Tensor]:
    """Return the scene's codes as torch tensors of one row."""
    scene = config.schema.side("scene")
    session = _session(Path(config.paths.of("features")) / "preprocess.onnx")
    columns = config.schema.columns("scene")
    everything = {column.name: pa.array([SCENE.get(column.name)]) for column in columns}
    raw = rows_to_inputs(columns, pa.table(everything))
    names = [output_name(f.name) for f in scene]
    wanted = {value.name for value in session.get_inputs()}
    blank = {
        value.name: _blank(value)
        for value in session.get_inputs()
        if value.name in wanted - set(raw)
    }
    outputs = session.run(names, {**blank, **raw})
    return {f.name: torch.from_numpy(o) for f, o in zip(scene, outputs, strict=True)}


def _blank(value: Any) -> np.ndarray:
    dtypes = {"tensor(string)": object, "tensor(int64)": np.int64, "tensor(double)": np.float64}
    missing = {"tensor(string)": "", "tensor(int64)": -(2**63), "tensor(double)": np.nan}
    shape = (1,) * len(value.shape)
    return np.full(shape, missing[value.type], dtype=dtypes[value.type])


def _torch_scores(
    model: Recommender, inputs: Inputs, codes: Mapping[str, torch.Tensor]
) -> np.ndarray:
    with torch.inference_mode():
        items = torch.from_numpy(inputs["item_embedding"])
        user = torch.from_numpy(inputs["user_embedding"]).expand(len(items), -1)
        paired = {name: code.expand(len(items)) for name, code in codes.items()}
        return np.asarray(model.rank(user, items, paired).sigmoid())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds per call and turn")
    options = parser.parse_args()
    print(json.dumps({"score": measure(options.turns, options.seconds)}, indent=1))
