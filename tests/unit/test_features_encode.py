"""Encoding samples into shards: contents, sizes, and samples that are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hvdrec.config import Config
from hvdrec.config.data_sections import Encode, Samples, Task
from hvdrec.config.schema import Feature
from hvdrec.config.structure import to_dict
from hvdrec.errors import UserError
from hvdrec.features.encode import SPLITS, encode, even_sizes
from hvdrec.features.encoder import Encoder
from hvdrec.features.fit import Fitted
from hvdrec.features.graph import output_name
from hvdrec.features.raw import rows_to_inputs
from hvdrec.storage.artifacts import write_artifact, write_manifest

FEATURES = (
    Feature("item", side="item", dtype="int"),
    Feature("seen", kind="sequence", dtype="int", max_length=3),
    Feature("words", kind="categorical_list", max_length=2, min_count=2),
    Feature("age", kind="numeric", dtype="float"),
    Feature("price", side="item", kind="numeric", dtype="int", transform="quantile", buckets=4),
)
USERS, ITEMS = 9, 7


def config(shard_rows: int = 1000, row_group_rows: int = 1000) -> Config:
    return Config(
        name="test",
        features=FEATURES,
        # The user key is not a feature.
        samples=Samples(user="user", item="item"),
        encode=Encode(shard_rows=shard_rows, row_group_rows=row_group_rows),
    )


def drawn(seed: int, rows: int) -> pa.Table:
    """Return random samples with nulls, missing values, empty lists and lists that are too long."""
    random = np.random.default_rng(seed)

    def some(values: list[Any], length: int) -> list[Any]:
        return [values[n] for n in random.integers(0, len(values), length)]

    def lists(values: list[Any]) -> list[Any]:
        kept = [some(values, int(n)) for n in random.integers(0, 6, rows)]
        return [None if random.random() < 0.1 else row for row in kept]

    numbers = [None, *range(ITEMS), -1]
    return pa.table(
        {
            "time": pa.array(range(rows), pa.int64()),
            "user": pa.array([f"u{n}" for n in random.integers(0, USERS, rows)], pa.string()),
            "item": pa.array(random.integers(0, ITEMS, rows), pa.int64()),
            "seen": pa.array(lists(numbers), pa.list_(pa.int64())),
            "words": pa.array(lists([None, "", "a", "b", "ü"]), pa.list_(pa.string())),
            "age": pa.array(some([None, float("nan"), float("inf"), 1.5, 3.0], rows), pa.float64()),
            "price": pa.array(some(numbers, rows), pa.int64()),
            "label": pa.array(random.integers(0, 2, rows), pa.float32()),
            "weight": pa.array(random.uniform(0, 2, rows), pa.float32()),
        }
    )


def samples(folder: Path, tables: dict[str, pa.Table], part_rows: int = 10**6) -> Path:
    """Write a samples artifact with a split's rows in parts."""
    out = folder / "samples"
    with write_artifact(out, "samples") as draft:
        for split, table in tables.items():
            (draft / split).mkdir()
            for part in range(max(1, -(-len(table) // part_rows))):
                piece = table.slice(part * part_rows, part_rows)
                file = draft / split / f"part-{part:05d}.parquet"
                pq.write_table(piece, file, row_group_size=4)
        users = drawn(1, USERS).drop(["user", "item", "price", "time"])
        users = users.append_column("user", pa.array([f"u{n}" for n in range(USERS)]))
        pq.write_table(users, draft / "users_train.parquet")
        items = pa.table({"item": range(ITEMS), "price": range(ITEMS)})
        pq.write_table(items, draft / "items.parquet")
    return out


def splits(rows: int = 10) -> dict[str, pa.Table]:
    return {split: drawn(n, rows) for n, split in enumerate(SPLITS)}


def check_rows(
    graph: Path, features: tuple[Feature, ...], raw: pa.Table, encoded: pa.Table
) -> None:
    """Compare encoded rows with the output of the written graph for the raw rows."""
    session = onnxruntime.InferenceSession(str(graph))
    for feature in features:
        names = [output_name(feature.name)]
        inputs = rows_to_inputs(feature.definition.columns(feature), raw)
        others = {
            i.name: _empty(i.type, len(raw), len(i.shape))
            for i in session.get_inputs()
            if i.name != feature.name
        }
        [codes] = session.run(names, {**others, **inputs})
        got = encoded[feature.name]
        if feature.is_list:
            assert got.type.value_type == pa.int32()
            assert not got.type.value_field.nullable
            assert got.to_pylist() == [[code for code in row if code] for row in codes.tolist()]
        else:
            assert got.type == (pa.int32() if feature.is_embedded else pa.float32())
            assert got.to_pylist() == codes.tolist()


def _empty(kind: str, rows: int, rank: int) -> np.ndarray:
    types = {"tensor(string)": object, "tensor(int64)": np.int64, "tensor(double)": np.float64}
    return np.full((rows, 0) if rank == 2 else rows, 0, types[kind])


@given(
    sizes=st.tuples(*[st.integers(0, 15)] * 3),
    part_rows=st.integers(1, 12),
    shard_rows=st.integers(1, 12),
    row_group_rows=st.integers(1, 12),
)
# No shrinking: each example writes up to 50 files.
@settings(max_examples=8, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
def test_shards_contain_the_outputs_of_the_graph_in_the_order_of_the_samples(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: tuple[int, int, int],
    part_rows: int,
    shard_rows: int,
    row_group_rows: int,
) -> None:
    folder = tmp_path_factory.mktemp("encode")
    tables = {
        split: drawn(n, rows) for n, (split, rows) in enumerate(zip(SPLITS, sizes, strict=True))
    }
    done: list[int] = []
    meta = encode(
        samples(folder, tables, part_rows),
        folder / "features",
        config(shard_rows, row_group_rows),
        progress=done.append,
    )
    out = folder / "features"
    assert meta["rows"] == dict(zip(SPLITS, sizes, strict=True))
    assert sum(done) == sum(sizes)
    for split, table in tables.items():
        files = sorted((out / split).glob("*.parquet"))
        rows = [pq.read_metadata(file).num_rows for file in files]
        assert rows == meta["shards"][split]
        assert len(rows) == max(1, -(-len(table) // shard_rows))
        assert max(rows) - min(rows) <= 1
        for file in files:
            facts = pq.read_metadata(file)
            groups = [facts.row_group(n).num_rows for n in range(facts.num_row_groups)]
            assert len(groups) == max(1, -(-facts.num_rows // row_group_rows))
            assert max(groups) - min(groups) <= 1
        encoded = pa.concat_tables([pq.read_table(file) for file in files])
        check_rows(out / "preprocess.onnx", FEATURES, table, encoded)
        assert encoded["user_index"].to_pylist() == [int(u[1:]) for u in table["user"].to_pylist()]
        for name, source in (("item_index", "item"), ("label", "label"), ("weight", "weight")):
            assert encoded[name].to_pylist() == table[source].to_pylist()
        assert encoded.schema.field("item_index").type == pa.int64()
        assert not any(encoded.schema.field(name).nullable for name in encoded.column_names)
    items = pq.read_table(out / "items.parquet")
    assert items["key"].to_pylist() == list(range(ITEMS))
    train = tables["train"].to_pydict()
    positives = [i for i, y in zip(train["item"], train["label"], strict=True) if y]
    assert items["train_count"].to_pylist() == [positives.count(n) for n in range(ITEMS)]
    users = pq.read_table(out / "users.parquet")
    assert users.column_names == ["key", "seen", "words", "age"]
    assert users["key"].to_pylist() == [f"u{n}" for n in range(USERS)]
    sides = tuple(feature for feature in FEATURES if feature.side == "user")
    check_rows(
        out / "preprocess.onnx", sides, pq.read_table(folder / "samples/users_train.parquet"), users
    )


@given(st.integers(0, 1000), st.integers(1, 50))
def test_even_sizes_are_as_few_as_possible_and_even(total: int, most: int) -> None:
    sizes = even_sizes(total, most)
    assert sum(sizes) == total
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == max(1, -(-total // most))


def test_chunks_and_slices_of_a_column_do_not_change_its_codes(tmp_path: Path) -> None:
    table = drawn(3, 40)
    encode(samples(tmp_path, {**splits(), "train": table}), tmp_path / "features", config())
    encoder = Encoder(Fitted.load(tmp_path / "features"))
    chunked = pa.concat_tables([table.slice(3, 5), table.slice(0, 0), table.slice(20, 11)])
    for feature in FEATURES:
        whole = encoder.encode([feature], table)[feature.name]
        expected = pa.concat_arrays([whole.slice(3, 5), whole.slice(20, 11)])
        assert encoder.encode([feature], chunked)[feature.name].equals(expected)


def test_entries_hidden_under_a_null_list_are_ignored(tmp_path: Path) -> None:
    encode(samples(tmp_path, splits()), tmp_path / "features", config())
    encoder = Encoder(Fitted.load(tmp_path / "features"))
    hidden = pa.ListArray.from_buffers(
        pa.list_(pa.int64()),
        2,
        [pa.py_buffer(b"\x02"), pa.py_buffer(np.array([0, 2, 4], np.int32))],
        children=[pa.array([1, 2, 3, 4])],
    )
    assert hidden.to_pylist() == [None, [3, 4]]
    table = pa.table({"seen": pa.chunked_array([hidden])})
    codes = encoder.encode([FEATURES[1]], table)["seen"].to_pylist()
    assert [len(row) for row in codes] == [0, 2]
    [column] = FEATURES[1].definition.columns(FEATURES[1])
    assert rows_to_inputs([column], table)["seen"][1].tolist() == [3, 4]


def test_labels_of_tasks_become_columns_of_shards(tmp_path: Path) -> None:
    tables = {}
    for split, table in splits(rows=9).items():
        label = pa.array([None, 1.0, 0.0] * 3, pa.float32())
        tables[split] = table.append_column("label_late", label)
    folder = samples(tmp_path, tables)
    task = Task("late", "t > 3")
    tasked = replace(config(4, 2), tasks=(task,))
    text = "samples: has no label for task 'late', the configuration has 't > 3'; run"
    with pytest.raises(UserError, match=text):
        encode(folder, tmp_path / "features", tasked)
    write_manifest(folder, "samples", {"config": to_dict(tasked)})
    encode(folder, tmp_path / "features", tasked)
    encoded = pq.read_table(tmp_path / "features/train")
    assert encoded.column_names[-3:] == ["label", "weight", "label_late"]
    assert encoded["label_late"].null_count == 0
    np.testing.assert_array_equal(encoded["label_late"].to_numpy(), [np.nan, 1.0, 0.0] * 3)
    encode(folder, tmp_path / "plain", config(4, 2))
    assert pq.read_table(tmp_path / "plain/train").equals(encoded.drop(["label_late"]))
    # A label with another definition is another task.
    with pytest.raises(UserError, match="has label 't > 3' for task 'late', the config"):
        other = replace(tasked, tasks=(replace(task, label="t > 4"),))
        encode(folder, tmp_path / "features", other, overwrite=True)


def replace_file(folder: Path, name: str, table: pa.Table) -> None:
    """Replace a file of the samples by a table."""
    pq.write_table(table, folder / name)
    write_manifest(folder, "samples", {})


@pytest.mark.parametrize(
    ("name", "table", "text"),
    [
        (
            "users_train.parquet",
            pa.table({"user": ["u1"], "seen": [[1]], "words": [["a"]], "age": [1.0]}),
            r"users_train.parquet: has no row for user 'u\d' of the samples; make",
        ),
        (
            "items.parquet",
            pa.table({"item": pa.array([], pa.int64()), "price": pa.array([], pa.int64())}),
            "items.parquet: has no rows; make the samples again",
        ),
        (
            "items.parquet",
            pa.table({"price": [1]}),
            r"items.parquet: column 'item' is missing; the file has \[price\]; make the samples",
        ),
        (
            "users_train.parquet",
            pa.table({"user": [1], "seen": [[1]], "words": [["a"]], "age": [1.0]}),
            "users_train.parquet: 'user' is int64 here, string in the samples; make",
        ),
        (
            "users_train.parquet",
            pa.table({"user": [1.0], "seen": [[1]], "words": [["a"]], "age": [1.0]}),
            "users_train.parquet: the key is double, must be string or int64; make the samples",
        ),
        (
            "test/part-00000.parquet",
            drawn(0, 3).drop(["label"]),
            r"test/part-00000.parquet: column 'label' is missing; the file has \[time, user, item,",
        ),
    ],
)
def test_inconsistent_samples_are_refused(
    tmp_path: Path, name: str, table: pa.Table, text: str
) -> None:
    folder = samples(tmp_path, splits())
    encode(folder, tmp_path / "features", config())
    before = (tmp_path / "features/manifest.json").read_bytes()
    replace_file(folder, name, table)
    with pytest.raises(UserError, match=text):
        encode(folder, tmp_path / "features", config(), overwrite=True)
    assert (tmp_path / "features/manifest.json").read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["features", "samples"]


def test_damaged_rows_are_refused(tmp_path: Path) -> None:
    folder = samples(tmp_path, splits())
    file = folder / "test/part-00000.parquet"
    content = bytearray(file.read_bytes())
    place = pq.read_metadata(file).row_group(1).column(2).data_page_offset
    content[place : place + 20] = b"\xff" * 20
    file.write_bytes(content)
    with pytest.raises(
        UserError, match=r"test/part-00000.parquet: contents differ .*; run hvdrec samples"
    ) as e:
        encode(folder, tmp_path / "features", config())
    assert "\n" not in str(e.value)
    assert not (tmp_path / "features").exists()
