"""A bundle small enough to compute its scores by hand, for the tests of scoring and serving.

``python tests/bundles.py OUT`` writes it with string keys to the new directory OUT. The tests in
tests/slim run without onnx and read it from there, with ``HVDREC_TEST_BUNDLE=OUT``.

The graphs compute, with the vectors of values in `USERS` ... `PLACES`:

- user: [h0, h0 + h1, age / 100], where [h0, h1] = USERS[user_id] + half the sum of ITEMS over the
  last three of the history + half of ITEMS[newest].
- item: [g0, g1, (year - 2000) / 10], where [g0, g1] = ITEMS[item_id] + half the sum of GENRES over
  the first two genres + half of GENRES[first].
- score: sigmoid(inner product + HOURS[hour] + PLACES[place] + temperature / 10). With tasks, each
  task has such a score, with its number in TASKS added to the logit; score is their product.

A missing value adds zero; an unknown value has the vector of UNKNOWN. Retrieval uses the first two
entries of an embedding.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hvdrec.storage.artifacts import write_artifact

UNKNOWN = "unknown"
USERS = {UNKNOWN: [0.5, 0.5], "1": [1.0, 0.0], "2": [0.0, 1.0]}
ITEMS = {UNKNOWN: [0.25, 0.25], "10": [1.0, 0.0], "20": [0.0, 1.0], "30": [1.0, 1.0]}
GENRES = {UNKNOWN: [-0.25, 0.0], "Drama": [0.5, 0.0], "War": [0.0, 0.5]}
HOURS = {UNKNOWN: [-1.0], "12": [0.5], "21": [1.0]}
PLACES = {UNKNOWN: [-0.5], "home": [0.25]}

MISSING_INT = -(2**63)
Row = dict[str, Any]

STORED_USERS: dict[str, Row] = {
    "1": {"age": 20.0, "history": ["10"]},
    "2": {"age": 40.0, "history": []},
}
STORED_ITEMS: dict[str, Row] = {
    "10": {"genres": ["Drama"], "year": 2000},
    "20": {"genres": ["Drama", "War"], "year": 2010},
    "30": {"genres": [], "year": MISSING_INT},
    "40": {"genres": ["War"], "year": 1990},
}
TITLES = {"10": "Ten", "20": "Zwölf", "30": "", "40": "Forty"}
POPULARITY = {"10": 5, "20": 2, "30": 7, "40": 0}
TRENDING = {"10": 1, "20": 4, "30": 1, "40": 0}
SEEN = {"1": ["30", "10"], "2": []}
FILTERS = ("genres", "year")
TASKS = {"click": 0.0, "love": -1.0}


def features(key_dtype: str) -> list[Row]:
    """Return the features in the form of the manifest."""
    rows: list[tuple[str, str, str, str, int]] = [
        ("user_id", "user", "categorical", key_dtype, 50),
        ("age", "user", "numeric", "float", 50),
        ("history", "user", "sequence", key_dtype, 3),
        ("item_id", "item", "categorical", key_dtype, 50),
        ("genres", "item", "categorical_list", "string", 2),
        ("year", "item", "numeric", "int", 50),
        ("hour", "scene", "categorical", "int", 50),
        ("place", "scene", "categorical", "string", 50),
        ("temperature", "scene", "numeric", "float", 50),
    ]
    names = ("name", "side", "kind", "dtype", "max_length")
    listed = [dict(zip(names, row, strict=True)) for row in rows]
    listed[6]["default"] = 12
    return listed


def write_bundle(
    path: Path,
    *,
    key_dtype: str = "string",
    retrieval_width: int = 2,
    users: Mapping[str, Row] = STORED_USERS,
    items: Mapping[str, Row] = STORED_ITEMS,
    titles: Mapping[str, str] | None = TITLES,
    trending: Mapping[str, int] | None = TRENDING,
    seen: Mapping[str, Sequence[str]] | None = SEEN,
    filters: Sequence[str] = FILTERS,
    tasks: bool = False,
    log_columns: Sequence[str] | None = None,
) -> Path:
    """Write the bundle to ``path`` and return the path.

    Args:
        path: A directory that does not exist.
        key_dtype: "string" or "int".
        retrieval_width: Number of entries used for retrieval; 0 for none.
        users: Raw features of the stored users by key.
        items: Raw features of the stored items by key.
        titles: Titles by item key; None for a bundle without titles.
        trending: Trending counts by item key; None for a bundle without them.
        seen: Keys of seen items by user key; None for a bundle without them.
        filters: Item features with a filter.
        tasks: True for a ranker that predicts two labels, whose product is the score.
        log_columns: Columns of the log; None for a bundle that does not record them.
    """
    meta = {
        "name": "tiny",
        "schema": {
            "user_key": "user_id",
            "item_key": "item_id",
            "features": features(key_dtype),
        },
        "user_width": 3,
        "item_width": 3,
        "retrieval_width": retrieval_width,
        "users": len(users),
        "items": len(items),
        "metrics": {},
        "parity": {"rows": 0, "largest_difference": 0.0},
        "config": {},
    }
    if log_columns is not None:
        meta["log_columns"] = list(log_columns)
    if tasks:
        meta |= {"tasks": [{"name": name, "share": 1.0} for name in TASKS], "combine": "product"}
    with write_artifact(path, "bundle", meta) as draft:
        onnx.save(_user_tower(key_dtype), str(draft / "user_tower.onnx"))
        onnx.save(_item_tower(key_dtype), str(draft / "item_tower.onnx"))
        onnx.save(_ranker(tasks), str(draft / "ranker.onnx"))
        user_order = _write_side(draft, "user", users, key_dtype)
        order = _write_side(draft, "item", items, key_dtype)
        popularity = np.array([POPULARITY.get(key, 0) for key in order], dtype=np.int64)
        np.save(draft / "items" / "popularity.npy", popularity)
        if trending is not None:
            counts = np.array([trending.get(key, 0) for key in order], dtype=np.int64)
            np.save(draft / "items" / "trending.npy", counts)
        if seen is not None:
            lists = [[order.index(i) for i in seen.get(u, ()) if i in order] for u in user_order]
            _write_lists(draft / "users" / "seen_{}.npy", lists)
        for name in filters:
            _write_filter(draft / "items" / "filters" / name, [items[key][name] for key in order])
        if titles is not None:
            texts = [titles.get(key, "").encode() for key in order]
            offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
            np.save(draft / "items" / "titles.npy", np.frombuffer(b"".join(texts), dtype=np.uint8))
            np.save(draft / "items" / "titles_offsets.npy", offsets)
    return path


def _write_side(draft: Path, side: str, rows: Mapping[str, Row], key_dtype: str) -> list[str]:
    """Write keys and the tower's embeddings in ascending order of keys; return the order."""
    order = sorted(rows, key=int if key_dtype == "int" else str.encode)
    folder = draft / f"{side}s"
    folder.mkdir()
    if key_dtype == "int":
        keys: NDArray[Any] = np.array([int(key) for key in order], dtype=np.int64)
    else:
        keys = np.array([key.encode() for key in order], dtype=np.bytes_ if order else "S1")
    np.save(folder / "keys.npy", keys)
    session = onnxruntime.InferenceSession(str(draft / f"{side}_tower.onnx"))
    embeddings = np.empty((len(order), 3), dtype=np.float32)
    for i, key in enumerate(order):
        raw = {f"{side}_id": key, **rows[key]}
        inputs = {value.name: _raw_input(value, raw) for value in session.get_inputs()}
        embeddings[i] = session.run(["embedding"], inputs)[0][0]
    np.save(folder / "embeddings.npy", embeddings)
    return order


def _write_lists(file: Path, lists: Sequence[Sequence[int]]) -> None:
    """Write lists of ascending rows: the concatenated rows, and offsets into them."""
    offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
    np.save(str(file).format("offsets"), offsets)
    rows = [row for entries in lists for row in sorted(entries)]
    np.save(str(file).format("rows"), np.array(rows, dtype=np.int32))


def _write_filter(folder: Path, values: Sequence[Any]) -> None:
    """Write the rows of each value of an item feature; a row has one value or a list."""
    folder.mkdir(parents=True)
    lists = [value if isinstance(value, list) else [value] for value in values]
    distinct = sorted({value for entries in lists for value in entries if value != MISSING_INT})
    if folder.name == "year":
        np.save(folder / "values.npy", np.array(distinct, dtype=np.int64))
    else:
        texts = [value.encode() for value in distinct]
        np.save(folder / "values.npy", np.array(texts, dtype=np.bytes_ if texts else "S1"))
    rows = [[row for row, entries in enumerate(lists) if value in entries] for value in distinct]
    _write_lists(folder / "{}.npy", rows)


def _raw_input(value: Any, raw: Row) -> NDArray[Any]:
    dtypes = {"tensor(string)": object, "tensor(int64)": np.int64, "tensor(double)": np.float64}
    entries = raw[value.name]
    if value.type == "tensor(int64)":
        entries = [int(e) for e in entries] if isinstance(entries, list) else int(entries)
    if not isinstance(entries, list):
        return np.array([entries], dtype=dtypes[value.type])
    missing = MISSING_INT if value.type == "tensor(int64)" else ""
    return np.array([entries or [missing]], dtype=dtypes[value.type])


class _Nodes:
    """Builds an ONNX graph: collects its nodes and constants."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, array: Any, dtype: Any = np.float32) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(array, dtype=dtype), name))
        return name

    def node(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def vectors(self, name: str, dtype: str, table: Mapping[str, Sequence[float]]) -> str:
        """Look up the raw values of an input in a table; zeros for a missing value."""
        values = [key for key in table if key != UNKNOWN]
        raw = ["", *values] if dtype == "string" else [MISSING_INT, *map(int, values)]
        codes = self.node(
            "LabelEncoder",
            name,
            domain="ai.onnx.ml",
            values_int64s=[0, *range(2, len(values) + 2)],
            default_int64=1,
            **{"keys_strings" if dtype == "string" else "keys_int64s": raw},
        )
        zeros = [0.0] * len(table[UNKNOWN])
        rows = [zeros, table[UNKNOWN], *(table[value] for value in values)]
        return self.node("Gather", self.constant(rows), codes)

    def number(self, name: str, dtype: str) -> str:
        """Convert an input to float32, minus 2000 for an integer; 0 for a missing value."""
        if dtype == "int":
            present = self.node("Greater", name, self.constant(MISSING_INT, np.int64))
            above = self.node("Sub", name, self.constant(2000, np.int64))
            value = self.node("Cast", above, to=TensorProto.FLOAT)
            return self.node("Where", present, value, self.constant(0.0))
        value = self.node("Cast", name, to=TensorProto.FLOAT)
        return self.node("Where", self.node("IsNaN", value), self.constant(0.0), value)

    def pooled(self, vectors: str, counted_twice: int) -> str:
        """Return half the sum over a list [N, L, 2] plus half of one column, [N, 2]."""
        total = self.node("ReduceSum", vectors, self.constant([1], np.int64), keepdims=0)
        column = self.node("Gather", vectors, self.constant(counted_twice, np.int64), axis=1)
        return self.node("Mul", self.node("Add", total, column), self.constant(0.5))

    def columns(self, *parts: str) -> str:
        """Concatenate [N, 2] and [N] to the output, [N, 3]."""
        last = self.node("Unsqueeze", parts[1], self.constant([1], np.int64))
        return self.node("Concat", parts[0], last, output="embedding", axis=1)

    def model(self, inputs: Mapping[str, tuple[str, int]], *outputs: str) -> onnx.ModelProto:
        """Build the model; inputs map names to (type, number of dimensions)."""
        types = {
            "string": TensorProto.STRING,
            "int": TensorProto.INT64,
            "float": TensorProto.DOUBLE,
            "vector": TensorProto.FLOAT,
        }
        graph = helper.make_graph(
            self.nodes,
            "tiny",
            [
                helper.make_tensor_value_info(
                    name, types[dtype], [f"{name}_{axis}" for axis in range(dimensions)]
                )
                for name, (dtype, dimensions) in inputs.items()
            ],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None) for output in outputs],
            self.constants,
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 3)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _user_tower(key_dtype: str) -> onnx.ModelProto:
    g = _Nodes()
    last_three = g.node(
        "Slice",
        "history",
        *(g.constant([value], np.int64) for value in (-3, 2**31 - 1, 1)),
    )
    history = g.pooled(g.vectors(last_three, key_dtype, ITEMS), counted_twice=-1)
    both = g.node("Add", g.vectors("user_id", key_dtype, USERS), history)
    mixed = g.node("MatMul", both, g.constant([[1.0, 1.0], [0.0, 1.0]]))
    g.columns(mixed, g.node("Mul", g.number("age", "float"), g.constant(0.01)))
    inputs = {"user_id": (key_dtype, 1), "age": ("float", 1), "history": (key_dtype, 2)}
    return g.model(inputs, "embedding")


def _item_tower(key_dtype: str) -> onnx.ModelProto:
    g = _Nodes()
    first_two = g.node("Slice", "genres", *(g.constant([value], np.int64) for value in (0, 2, 1)))
    genres = g.pooled(g.vectors(first_two, "string", GENRES), counted_twice=0)
    both = g.node("Add", g.vectors("item_id", key_dtype, ITEMS), genres)
    g.columns(both, g.node("Mul", g.number("year", "int"), g.constant(0.1)))
    inputs = {"item_id": (key_dtype, 1), "genres": ("string", 2), "year": ("int", 1)}
    return g.model(inputs, "embedding")


def _ranker(tasks: bool) -> onnx.ModelProto:
    g = _Nodes()
    users = g.node("Gather", "user_embedding", "request")
    product = g.node("Mul", users, "item_embedding")
    axis = g.constant([1], np.int64)
    inner = g.node("ReduceSum", product, axis, keepdims=0)
    scene = g.node("Mul", g.number("temperature", "float"), g.constant(0.1))
    for name, dtype, table in (("hour", "int", HOURS), ("place", "string", PLACES)):
        scene = g.node("Add", scene, g.node("Squeeze", g.vectors(name, dtype, table), axis))
    logit = g.node("Add", inner, g.node("Gather", scene, "request"))
    outputs = ["score"]
    if tasks:
        outputs += [f"score_{name}" for name in TASKS]
        for name, added in TASKS.items():
            moved = g.node("Add", logit, g.constant(added))
            g.node("Sigmoid", moved, output=f"score_{name}")
        g.node("Mul", *outputs[1:], output="score")
    else:
        g.node("Sigmoid", logit, output="score")
    inputs = {
        "user_embedding": ("vector", 2),
        "item_embedding": ("vector", 2),
        "request": ("int", 1),
        "hour": ("int", 1),
        "place": ("string", 1),
        "temperature": ("float", 1),
    }
    return g.model(inputs, *outputs)


if __name__ == "__main__":
    print(write_bundle(Path(sys.argv[1])))
