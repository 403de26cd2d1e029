"""Measure opening a bundle of a million users and items, the import time, and many threads.

The bundle is synthetic but has the shape of an export: towers with a vocabulary of all keys as
strings and a row for each, 64-dimensional embeddings, titles, counts, and seen items. Each figure
comes from new processes, and ratios from processes in turns. Bytecode is cached, as after an
installation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hvdrec.storage.artifacts import write_manifest

ENTRIES, WIDTH, HIDDEN = 1_000_000, 64, (200, 80)
SEEN = 20
CANDIDATES = 500
IMPORTS = 11
CORES = len(os.sched_getaffinity(0))

RESIDENT = """
def resident_mb():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024
"""
LOAD = """
import json, sys, time
from hvdrec.scoring import Scorer
imported = resident_mb()
start = time.perf_counter()
scorer = Scorer.load(sys.argv[1])
loaded, resident = time.perf_counter(), resident_mb()
scorer.score("user 0000007", [f"item {n:07d}" for n in range(0, 500_000, 1000)], {"hour": 21})
first = time.perf_counter()
scorer.warm()
warm = time.perf_counter()
print(json.dumps({"seconds": loaded - start, "resident_mb": resident, "imported_mb": imported,
    "first_request_seconds": first - loaded, "warm_seconds": warm - first,
    "warm_resident_mb": resident_mb()}))
"""
IMPORT = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
THREADS = """
import json, random, sys, threading, time
from hvdrec.scoring import Scorer
scorer = Scorer.load(sys.argv[1])
threads, requests, entries, candidates = map(int, sys.argv[2:])
barrier, took = threading.Barrier(threads), []
def work(thread):
    chosen = random.Random(thread)
    asked = [(f"user {chosen.randrange(entries):07d}",
              [f"item {chosen.randrange(entries):07d}" for _ in range(candidates)])
             for _ in range(requests + 50)]
    barrier.wait()
    own = []
    for user, items in asked:
        start = time.perf_counter()
        scorer.score(user, items, {"hour": 21})
        own.append(time.perf_counter() - start)
    took.extend(own[50:])
running = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
for thread in running: thread.start()
for thread in running: thread.join()
took.sort()
p50, p99 = took[len(took) // 2], took[len(took) * 99 // 100]
print(json.dumps({"p50_us": p50 * 1e6, "p99_us": p99 * 1e6}))
"""


def measure(turns: int = 5, entries: int = ENTRIES) -> dict[str, Any]:
    """Return the figures ``load``, ``import_ratio`` and ``threads``: medians over the turns."""
    with tempfile.TemporaryDirectory(prefix="hvdrec-loading-") as name:
        folder = Path(name)
        bundle = write_bundle(folder / "bundle", entries)
        loads = [_json(folder, RESIDENT + LOAD, bundle) for _ in range(turns)]
        ratio, seconds = _imports(folder, max(IMPORTS, turns))
        asked = [CORES, 1000, entries, CANDIDATES]
        threads = [_json(folder, THREADS, bundle, *asked) for _ in range(turns)]
        return {
            "load": {**_medians(loads), "users": entries, "items": entries},
            "import_ratio": ratio,
            "import": seconds,
            "threads": {
                "p99_over_p50": statistics.median(t["p99_us"] / t["p50_us"] for t in threads),
                **_medians(threads),
                "threads": CORES,
            },
        }


def _imports(folder: Path, turns: int) -> tuple[float, dict[str, float]]:
    """Return the import time of hvdrec.scoring over that of onnxruntime, and both in seconds."""
    names = ("onnxruntime", "hvdrec.scoring")
    took: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns + 1):
        for name in names:
            seconds = float(_run(folder, IMPORT.format(name)))
            if turn:  # the first one writes the bytecode
                took[name].append(seconds)
    middle = {name: statistics.median(values) for name, values in took.items()}
    return middle["hvdrec.scoring"] / middle["onnxruntime"], middle


def _medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def _json(folder: Path, program: str, *arguments: object) -> dict[str, float]:
    found: dict[str, float] = json.loads(_run(folder, program, *arguments))
    return found


def _run(folder: Path, program: str, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return done.stdout


def write_bundle(path: Path, entries: int) -> Path:
    """Write a bundle with the given numbers of users and items and return its path."""
    path.mkdir()
    random = np.random.default_rng(0)
    for side in ("user", "item"):
        vectors = random.standard_normal((entries, WIDTH), dtype=np.float32) / np.float32(8)
        keys = [f"{side} {n:07d}" for n in range(entries)]
        (path / f"{side}s").mkdir()
        np.save(path / f"{side}s" / "keys.npy", np.array(keys, dtype=np.bytes_))
        np.save(path / f"{side}s" / "embeddings.npy", vectors)
        onnx.save(_tower(f"{side}_id", keys, vectors), str(path / f"{side}_tower.onnx"))
    onnx.save(_ranker(random), str(path / "ranker.onnx"))
    _write_catalogue(path, entries, random)
    features = [
        {"name": name, "side": side, "kind": "categorical", "dtype": dtype, "max_length": 50}
        for name, side, dtype in (
            ("user_id", "user", "string"),
            ("item_id", "item", "string"),
            ("hour", "scene", "int"),
        )
    ]
    meta = {
        "name": "a million",
        "schema": {"user_key": "user_id", "item_key": "item_id", "features": features},
        **dict.fromkeys(("user_width", "item_width", "retrieval_width"), WIDTH),
        "users": entries,
        "items": entries,
    }
    write_manifest(path, "bundle", meta)
    return path


def _write_catalogue(path: Path, entries: int, random: np.random.Generator) -> None:
    titles = [f"Title of item {n}".encode() for n in range(entries)]
    ends = np.cumsum([0, *map(len, titles)], dtype=np.int64)
    np.save(path / "items" / "titles.npy", np.frombuffer(b"".join(titles), dtype=np.uint8))
    np.save(path / "items" / "titles_offsets.npy", ends)
    for name in ("popularity", "trending"):
        np.save(path / "items" / f"{name}.npy", random.integers(0, 1000, entries))
    rows = random.integers(0, entries, entries * SEEN, dtype=np.int32)
    np.save(path / "users" / "seen_rows.npy", rows)
    np.save(path / "users" / "seen_offsets.npy", np.arange(entries + 1) * SEEN)


def _tower(name: str, keys: list[str], vectors: np.ndarray) -> onnx.ModelProto:
    """Build a tower like an exported one: a vocabulary, an embedding table, and a layer."""
    rows = np.concatenate([np.zeros((2, WIDTH), dtype=np.float32), vectors])
    nodes = [
        helper.make_node(
            "LabelEncoder",
            [name],
            ["code"],
            domain="ai.onnx.ml",
            keys_strings=["", *keys],
            values_int64s=[0, *range(2, len(keys) + 2)],
            default_int64=1,
        ),
        helper.make_node("Gather", ["table", "code"], ["row"]),
        helper.make_node("MatMul", ["row", "layer"], ["embedding"]),
    ]
    constants = {"table": rows, "layer": np.eye(WIDTH, dtype=np.float32)}
    return _model(nodes, {name: (TensorProto.STRING, ["n"])}, "embedding", constants)


def _ranker(random: np.random.Generator) -> onnx.ModelProto:
    """Build a ranker: user and scene once per request, item and product once per candidate."""

    def weights(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[0]))

    first, second = HIDDEN
    constants = {
        "hours": weights(26, first),
        "of_user": weights(WIDTH, first),
        "of_item": weights(WIDTH, first),
        "of_product": weights(WIDTH, first),
        "inner": weights(first, second),
        "head": weights(second, 1),
        "one": np.array([1], dtype=np.int64),
    }
    make = helper.make_node
    nodes = [
        make(
            "LabelEncoder",
            ["hour"],
            ["code"],
            domain="ai.onnx.ml",
            keys_int64s=[-(2**63), *range(24)],
            values_int64s=[0, *range(2, 26)],
            default_int64=1,
        ),
        make("Gather", ["hours", "code"], ["scene"]),
        make("MatMul", ["user_embedding", "of_user"], ["user"]),
        make("Add", ["user", "scene"], ["once"]),
        make("Gather", ["once", "request"], ["shared"]),
        make("Gather", ["user_embedding", "request"], ["users"]),
        make("Mul", ["users", "item_embedding"], ["product"]),
        make("MatMul", ["product", "of_product"], ["paired"]),
        make("MatMul", ["item_embedding", "of_item"], ["item"]),
        make("Sum", ["shared", "paired", "item"], ["first"]),
        make("Relu", ["first"], ["first_out"]),
        make("MatMul", ["first_out", "inner"], ["second"]),
        make("Relu", ["second"], ["second_out"]),
        make("MatMul", ["second_out", "head"], ["logits"]),
        make("Squeeze", ["logits", "one"], ["logit"]),
        make("Sigmoid", ["logit"], ["score"]),
    ]
    inputs = {
        "user_embedding": (TensorProto.FLOAT, ["r", WIDTH]),
        "item_embedding": (TensorProto.FLOAT, ["n", WIDTH]),
        "request": (TensorProto.INT64, ["n"]),
        "hour": (TensorProto.INT64, ["r"]),
    }
    return _model(nodes, inputs, "score", constants)


def _model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[Any]]],
    output: str,
    constants: dict[str, np.ndarray],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "synthetic",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5, help="new processes per measurement")
    parser.add_argument("--entries", type=int, default=ENTRIES, help="number of users (and items)")
    options = parser.parse_args()
    print(json.dumps(measure(options.turns, options.entries), indent=1))
