"""`hvdrec score`: the types, the missing and the unknown columns of a Parquet file."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvdrec.errors import UserError
from hvdrec.exporting.score_file import score_table
from hvdrec.scoring import Scorer
from hvdrec.storage.artifacts import read_manifest, write_manifest
from tests.bundles import write_bundle

ROWS: dict[str, Any] = {
    "user_id": ["1", "2", "1"],
    "item_id": ["10", "20", "30"],
    "hour": [12, 21, 3],
    "place": ["home", "home", None],
    "temperature": [1.0, 2.5, 4.0],
}
USER: dict[str, Any] = {"age": [20.0, 40.0, None], "history": [["10"], [], None]}
ITEM: dict[str, Any] = {"genres": [["Drama"], ["War"], []], "year": [2000, 2010, None]}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("score") / "bundle")


def scores(bundle: Path, columns: dict[str, Any], folder: Path, **options: Any) -> np.ndarray:
    """Score columns from a file and return the scores."""
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    facts = score_table(bundle, folder / "rows.parquet", folder / "scored.parquet", **options)
    scored = pq.read_table(folder / "scored.parquet")
    assert facts["rows"] == scored.num_rows == len(columns["user_id"])
    kept = scored.drop_columns(facts["columns"])
    assert kept.to_pydict() == pa.table(columns).to_pydict()
    result: np.ndarray = scored[facts["columns"][0]].to_numpy()
    return result


def refused(bundle: Path, columns: dict[str, Any], folder: Path, **options: Any) -> str:
    """Return the error; nothing is written."""
    with pytest.raises(UserError) as error:
        scores(bundle, columns, folder, **options)
    assert error.value.field == str(folder / "rows.parquet")
    assert sorted(file.name for file in folder.iterdir()) == ["rows.parquet"]
    assert "\n" not in str(error.value)
    return str(error.value)


def test_rows_have_the_scores_of_the_scorer(bundle: Path, tmp_path: Path) -> None:
    scorer = Scorer.load(bundle)
    found = scores(bundle, {**ROWS, **USER, **ITEM}, tmp_path)
    for i, score in enumerate(found):
        user = {name: column[i] for name, column in {"user_id": ROWS["user_id"], **USER}.items()}
        item = {name: column[i] for name, column in {"item_id": ROWS["item_id"], **ITEM}.items()}
        scene = {name: ROWS[name][i] for name in ("hour", "place", "temperature")}
        assert score == pytest.approx(scorer.score(user, [item], scene)[0], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("user_id", pa.array([1, 2, 1], pa.uint64())),
        ("user_id", pa.array([1, 2, 1], pa.int8())),
        ("user_id", pa.array([decimal.Decimal(n) for n in (1, 2, 1)], pa.decimal128(10, 0))),
        ("user_id", pa.array(["1", "2", "1"]).dictionary_encode()),
        ("user_id", pa.array(["1", "2", "1"], pa.large_string())),
        ("item_id", pa.array([10, 20, 30], pa.int32()).dictionary_encode()),
        ("temperature", pa.array([decimal.Decimal(n) for n in ("1", "2.5", "4")])),
        ("temperature", pa.array([1.0, 2.5, 4.0], pa.float32())),
        ("hour", pa.array([12, 21, 3], pa.uint8())),
        ("place", pa.array(["home", "home", None]).dictionary_encode()),
    ],
)
def test_every_type_of_samples_gives_the_same_scores(
    bundle: Path, tmp_path: Path, name: str, values: pa.Array
) -> None:
    expected = scores(bundle, ROWS, tmp_path)
    assert scores(bundle, {**ROWS, name: values}, tmp_path).tolist() == expected.tolist()


def test_booleans_nulls_and_lists_are_converted(bundle: Path, tmp_path: Path) -> None:
    flags = pa.array([True, False, True])
    numbers = pa.array([1, 0, 1])
    assert (
        scores(bundle, {**ROWS, "hour": flags}, tmp_path).tolist()
        == scores(bundle, {**ROWS, "hour": numbers}, tmp_path).tolist()
    )
    nulls: dict[str, Any] = {"age": pa.nulls(3), "history": pa.nulls(3), "place": pa.nulls(3)}
    texts = pa.array([[]] * 3, pa.list_(pa.string()))
    typed = {"age": pa.nulls(3, pa.float64()), "history": texts, "place": pa.nulls(3, pa.string())}
    assert (
        scores(bundle, {**ROWS, **nulls}, tmp_path).tolist()
        == scores(bundle, {**ROWS, **typed}, tmp_path).tolist()
    )
    lists = pa.array([[10], [], None], pa.large_list(pa.int16()))
    assert (
        scores(bundle, {**ROWS, **USER, "history": lists}, tmp_path).tolist()
        == scores(bundle, {**ROWS, **USER}, tmp_path).tolist()
    )


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("user_id", [1.0, 2.0, 1.0], "'user_id' is float"),
        ("hour", ["12", "21", "3"], "'hour' is string"),
        ("hour", [2**63, 1, 2], "'hour'"),
        ("temperature", [datetime.date(2026, 1, 1)] * 3, "'temperature' is date"),
        ("place", [["home"]] * 3, "takes one value"),
    ],
)
def test_types_that_samples_refuses_are_refused(
    bundle: Path, tmp_path: Path, name: str, values: Any, words: str
) -> None:
    array = pa.array(values, pa.uint64()) if values[0] == 2**63 else pa.array(values)
    text = refused(bundle, {**ROWS, name: array}, tmp_path)
    assert words in text
    assert text.endswith("convert the column when you write the file")


def test_a_misspelt_column_is_refused_with_the_nearest_name(bundle: Path, tmp_path: Path) -> None:
    for name, wrong in (("hour", "hours"), ("place", "Place"), ("temperature", "temprature")):
        rows = {wrong if key == name else key: values for key, values in ROWS.items()}
        text = refused(bundle, rows, tmp_path)
        assert f"'{name}' is missing" in text
        assert f"did you mean '{wrong}'" in text
    text = refused(bundle, {**ROWS, "ages": [1, 2, 3]}, tmp_path)
    assert "'ages' is unknown" in text
    assert "did you mean 'age'" in text
    for key in ("user_id", "item_id"):
        rows = {name: values for name, values in ROWS.items() if name != key}
        assert f"'{key}' is missing" in refused(bundle, rows, tmp_path, defaults=True)


def test_defaults_stand_for_missing_columns_and_unknown_ones_are_copied(
    bundle: Path, tmp_path: Path
) -> None:
    rows = {name: values for name, values in ROWS.items() if name not in ("hour", "place")}
    missing = pa.nulls(3, pa.string())
    expected = scores(bundle, {**ROWS, "hour": [12] * 3, "place": missing}, tmp_path)
    found = scores(bundle, {**rows, "hours": [1, 2, 3]}, tmp_path, defaults=True)
    assert found.tolist() == expected.tolist()


def test_some_features_of_a_user_are_refused_and_the_remedies_work(
    bundle: Path, tmp_path: Path
) -> None:
    stored = scores(bundle, ROWS, tmp_path)
    half = {**ROWS, "age": [99.0, 98.0, 97.0]}
    (tmp_path / "scored.parquet").unlink()
    text = refused(bundle, half, tmp_path)
    assert "'history' is missing, a user feature" in text
    assert "--defaults" in text
    assert "--pass-through 'age'" in text
    assert scores(bundle, half, tmp_path, pass_through=["age"]).tolist() == stored.tolist()
    assert scores(bundle, half, tmp_path, defaults=True).tolist() != stored.tolist()


def test_unknown_columns_can_be_passed_through(bundle: Path, tmp_path: Path) -> None:
    rows = {**ROWS, "note!": ["a", "b", "c"]}
    assert "--pass-through 'note!'" in refused(bundle, rows, tmp_path)
    assert scores(bundle, rows, tmp_path, pass_through=["note!"]).tolist()
    (tmp_path / "scored.parquet").unlink()
    text = refused(bundle, rows, tmp_path, pass_through=["note"])
    assert "'note' of pass_through is missing" in text


def test_columns_of_the_log_are_known_and_kept(tmp_path: Path) -> None:
    log = ["clicked", "score", "ts", "note!"]
    bundle = write_bundle(tmp_path / "bundle", log_columns=log)
    rows = {**ROWS, **{name: [0, 1, 0] for name in log}}
    folder = tmp_path / "out"
    folder.mkdir()
    assert scores(bundle, rows, folder).tolist() == scores(bundle, ROWS, folder).tolist()
    assert json.loads((bundle / "manifest.json").read_text())["meta"]["log_columns"] == log
    (folder / "scored.parquet").unlink()
    assert "'hours' is unknown" in refused(bundle, {**rows, "hours": [1, 2, 3]}, folder)


def test_a_derived_column_of_the_same_name_is_pointed_out_in_the_log(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", log_columns=["clicked", "hour"])
    meta = dict(read_manifest(bundle, "bundle").meta)
    derive = {"hour": "hour % 24", "late": "hour > 20", "place": "lower(town)"}
    write_manifest(bundle, "bundle", {**meta, "config": {"samples": {"derive": derive}}})

    def warnings(columns: dict[str, Any]) -> list[str]:
        source = tmp_path / "rows.parquet"
        pq.write_table(pa.table(columns), source)
        facts = score_table(bundle, source, tmp_path / "scored.parquet")
        return [line for line in facts["warnings"] if "read as it is" in line]

    (line,) = warnings({**ROWS, "clicked": [0, 1, 0]})
    assert "'hour'" in line and "hour % 24" in line
    assert warnings(ROWS) == []  # not the log


def test_a_score_of_an_earlier_run_is_replaced(bundle: Path, tmp_path: Path) -> None:
    expected = scores(bundle, ROWS, tmp_path)
    facts = score_table(bundle, tmp_path / "scored.parquet", tmp_path / "again.parquet")
    assert facts["columns"] == ["score"]
    assert pq.read_table(tmp_path / "again.parquet")["score"].to_pylist() == expected.tolist()
