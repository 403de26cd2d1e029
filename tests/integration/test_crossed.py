"""Crossed features from the configuration to scores: all sides, stored and unknown users."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvdrec.scoring import Scorer
from tests.integration.conftest import hvdrec, succeed

CROSSES = {
    "item_price": ("item", ["item_id", "price"]),
    "hour_shop": ("scene", ["hour", "shop"]),
    "hour_user": ("scene", ["hour", "user_id"]),
    "hour_item": ("scene", ["hour", "item_id"]),
    "user_price_hour": ("scene", ["user_id", "price", "hour"]),
}
TABLES = "".join(
    f"""[[features]]
name = "{name}"
side = "{side}"
kind = "crossed"
columns = {columns}
buckets = 300

"""
    for name, (side, columns) in CROSSES.items()
).replace("'", '"')


@pytest.fixture
def bundle(small_config: Callable[..., Path]) -> Path:
    config = small_config(("[model]\n", f"{TABLES}[model]\n"))
    work = config.parent / "work"
    succeed("samples", config)
    sizes = succeed("prepare", config)["sizes"]
    assert {sizes[name] for name in CROSSES} == {302}
    succeed("train", config, "--train.epochs", 1)
    # Export compares the scores of raw rows with torch's and refuses a difference above 1e-5.
    export = succeed("export", work / "run")
    assert export["parity"]["rows"] == 1800
    refused = hvdrec("export", work / "run", "--export.embeddings", "int8", "--overwrite")
    assert refused.returncode == 2 and "export.embeddings" in refused.stderr
    return work / "bundle"


def test_crosses_are_served_without_fields_of_their_own(bundle: Path, tmp_path: Path) -> None:
    scorer = Scorer.load(bundle, verify=True)
    assert not CROSSES.keys() & {field.name for field in scorer.schema}
    # Tower and direct features, then the codes: of an item its key and price, of a user the key.
    assert (scorer.info.user_width, scorer.info.item_width) == (8 + 1 + 1, 8 + 8 + 2)
    items = np.load(bundle / "items/embeddings.npy")
    assert sorted(items[:, -2].tolist()) == list(range(2, 42))
    assert set(items[:, -1].tolist()) <= set(range(6))

    raw = pq.read_table(bundle.parent / "samples/items.parquet").to_pylist()
    for user in ("u1", {"user_id": "never seen", "age": 33.0}, {"age": 33.0}, None):
        for hour in (3, 15, None):
            scene = {"hour": hour, "shop": 2}
            by_key = scorer.score(user, [row["item_id"] for row in raw], scene)
            features = [{k: row[k] for k in ("item_id", "tags", "price")} for row in raw]
            np.testing.assert_allclose(scorer.score(user, features, scene), by_key, atol=1e-6)
            one = [scorer.score(user, [row["item_id"]], scene)[0] for row in raw]
            np.testing.assert_allclose(one, by_key, atol=1e-6)
    order = [found.item for found in scorer.recommend("u1", {"hour": 3}, k=5, candidates=40)]
    every = sorted(zip(-scorer.score("u1", list(KEYS), {"hour": 3}), KEYS, strict=True))
    assert order == [key for _, key in every[:5]]

    rows = pa.table({"user_id": ["u1", "u2"], "item_id": ["101", "102"], "hour": [3, 4]})
    pq.write_table(rows, tmp_path / "rows.parquet")
    succeed("score", bundle, tmp_path / "rows.parquet", tmp_path / "scored.parquet", "--defaults")
    scores = pq.read_table(tmp_path / "scored.parquet")["score"].to_numpy()
    expected = [
        scorer.score(row["user_id"], [row["item_id"]], {"hour": row["hour"]})[0]
        for row in rows.to_pylist()
    ]
    np.testing.assert_allclose(scores, expected, atol=1e-6)


KEYS = [str(key) for key in range(100, 140)]
