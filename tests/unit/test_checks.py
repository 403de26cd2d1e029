"""`hvdrec check`: quiet on clean samples, and each check finds its planted fault."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hvdrec
from hvdrec.checks.drift import FLOOR, psi
from hvdrec.checks.findings import CheckResult, Finding
from hvdrec.cli.check_command import check as check_command
from hvdrec.cli.parser import parse
from hvdrec.config import Checks, Config, Feature, History, Paths, Samples, Split, with_fields
from hvdrec.errors import UserError
from hvdrec.storage.artifacts import read_manifest, write_artifact

ROWS, USERS, ITEMS, DAY = 3000, 25, 30, 86_400
START = 1_700_000_000 // DAY * DAY
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Samples of 20 days without faults."""
    folder = tmp_path_factory.mktemp("checks")
    draw = np.random.default_rng(5)
    user, item = draw.integers(0, USERS, ROWS), draw.integers(0, ITEMS, ROWS)
    log = {
        "user": [f"u{u}" for u in user],
        "item": [f"i{i}" for i in item],
        "t": START + np.arange(ROWS) * (20 * DAY // ROWS),
        "click": draw.random(ROWS) < 0.3,
        "device": [("phone", "desktop")[d] for d in draw.integers(0, 2, ROWS)],
        "price": np.round(draw.uniform(1, 9, ROWS), 2),
    }
    log["price"][:2] = [0.5, 9.5]
    pq.write_table(pa.table(log), folder / "log.parquet")
    users = pa.table({"user": [f"u{u}" for u in range(USERS)], "age": np.arange(USERS) + 18})
    pq.write_table(users, folder / "users.parquet")
    config = Config(
        "clean",
        (
            Feature("user"),
            Feature("age", kind="numeric", dtype="float"),
            Feature("clicks", kind="sequence"),
            Feature("item", "item"),
            Feature("price", "item", kind="numeric", dtype="float"),
            Feature("device", "scene"),
        ),
        paths=Paths(raw=str(folder), work=str(folder / "work")),
        samples=Samples(
            interactions="log.parquet",
            users="users.parquet",
            user="user",
            item="item",
            time="t",
            label="click",
            history=(History("clicks", length=20),),
        ),
    )
    hvdrec.make_samples(config, progress=False)
    return config


def edited(
    config: Config, folder: Path, split: str, change: Callable[[Rows], Rows], **more: Any
) -> Config:
    """Copy the samples, change the rows of one split, and return a configuration of the copy."""
    source = config.paths.of("samples")
    copy = folder / f"copy{len([*folder.iterdir()])}"
    meta = {**read_manifest(source, "samples").meta, **more}
    with write_artifact(copy, "samples", meta, overwrite=False) as draft:
        for each_file in source.rglob("*.parquet"):
            target = draft / each_file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(each_file, target)
        [file] = (draft / split).glob("*.parquet")
        table = pq.read_table(file)
        rows = change(sorted(table.to_pylist(), key=lambda row: row["time"]))
        pq.write_table(pa.Table.from_pylist(rows, table.schema), file)
    return with_fields(config, {"paths.samples": str(copy)})


def found(config: Config, **options: Any) -> list[tuple[str, str, str]]:
    return [(f.check, f.what, f.split) for f in run(config, **options).findings]


def run(config: Config, **options: Any) -> CheckResult:
    return hvdrec.check(config, progress=False, **options)


def each(column: str, value: Any, start: float = 0.0) -> Callable[[Rows], Rows]:
    """Set a column from a share of the rows on; a function computes the value from the row."""

    def change(rows: Rows) -> Rows:
        for row in rows[int(start * len(rows)) :]:
            row[column] = value(row) if callable(value) else value
        return rows

    return change


def test_clean_samples_have_no_findings(clean: Config) -> None:
    result = run(clean, against=clean.paths.of("samples"))
    assert result.findings == ()
    assert not result.is_stopped
    assert result.rows == {"train": 2400, "validation": 300, "test": 300}
    facts = {column.name: column for column in result.columns}
    assert (facts["age"].low, facts["age"].high) == (18, 42)
    assert facts["age"].nulls == {"train": 0, "validation": 0, "test": 0}
    assert facts["user"].unseen == {"validation": 0, "test": 0}
    assert facts["device"].drift == pytest.approx(0, abs=1e-12)
    assert facts["user"].drift is None
    assert len(result.periods) == 20
    assert sum(period.rows for period in result.periods) == ROWS
    positives = sum(period.rows * period.label_rate for period in result.periods)
    assert positives / ROWS == pytest.approx(
        sum(rate * result.rows[split] for split, rate in result.label_rate.items()) / ROWS
    )


@pytest.mark.parametrize(
    ("split", "change", "expected"),
    [
        ("test", each("device", None, 0.4), ("nulls", "device", "test")),
        ("train", each("age", math.nan, 0.4), ("nulls", "age", "train")),
        ("test", each("price", 99.0, 0.9), ("ranges", "price", "test")),
        ("train", each("device", "phone"), ("scene", "device", "train")),
        ("test", each("label", 0.0), ("labels", "label", "test")),
        ("test", each("item", lambda row: "new", 0.4), ("unseen", "item", "test")),
        ("validation", lambda rows: rows + rows[:30], ("duplicates", "rows", "validation")),
    ],
)
def test_a_planted_fault_is_found(
    clean: Config,
    tmp_path: Path,
    split: str,
    change: Callable[[Rows], Rows],
    expected: tuple[str, str, str],
) -> None:
    assert expected in found(edited(clean, tmp_path, split, change))


def test_a_feature_that_identifies_its_row_is_found(clean: Config, tmp_path: Path) -> None:
    number = iter(range(ROWS))
    changed = edited(clean, tmp_path, "train", each("device", lambda row: f"d{next(number)}"))
    assert ("cardinality", "device", "train") in found(changed)


def test_a_day_with_another_label_rate_is_found(clean: Config, tmp_path: Path) -> None:
    day = START + 3 * DAY

    def change(rows: Rows) -> Rows:
        for row in rows:
            if day <= row["time"] < day + DAY:
                row["label"] = 1.0
        return rows

    changed = edited(clean, tmp_path, "train", change)
    [finding] = run(changed).findings
    assert (finding.check, finding.what) == ("labels", "2023-11-17")
    assert 3 < finding.value < 4


def test_rows_of_train_in_test_are_found(clean: Config, tmp_path: Path) -> None:
    taken: Rows = []
    edited(clean, tmp_path, "train", lambda rows: taken.extend(rows[:9]) or rows)
    changed = edited(clean, tmp_path, "test", lambda rows: rows + taken)
    findings = [f for f in run(changed).findings if f.check == "leakage"]
    assert [(f.what, f.split) for f in findings] == [("time", "validation"), ("rows", "test")] or [
        (f.what, f.split) for f in findings
    ] == [("rows", "test"), ("time", "validation")]
    [copied] = [f for f in findings if f.what == "rows"]
    assert copied.value == pytest.approx(9 / 309)


def test_training_rows_of_the_future_are_found(clean: Config, tmp_path: Path) -> None:
    changed = edited(clean, tmp_path, "train", each("time", START + 19 * DAY, 0.99))
    assert ("leakage", "time", "train") in found(changed)


def test_later_items_in_histories_are_found(clean: Config, tmp_path: Path) -> None:
    # The first row of each user cannot have a history, so its own item is an item of the future.
    seen: set[str] = set()

    def change(rows: Rows) -> Rows:
        for row in rows:
            if row["user"] not in seen:
                seen.add(row["user"])
                row["clicks"] = [row["item"]]
        return rows

    changed = edited(clean, tmp_path, "train", change)
    [finding] = run(changed).findings
    assert (finding.check, finding.what, finding.split) == ("leakage", "clicks", "train")
    assert finding.value == pytest.approx(USERS / 2400)


def test_held_out_items_in_histories_of_a_random_split_are_found(
    clean: Config, tmp_path: Path
) -> None:
    work = str(tmp_path / "work")
    config = with_fields(
        clean, {"samples.split": {"method": "random"}, "paths.work": work, "paths.samples": ""}
    )
    assert config.samples.split == Split(method="random")
    hvdrec.make_samples(config, progress=False)
    assert found(config) == []
    held_out = pq.read_table(f"{work}/samples/test").to_pylist()
    pairs = {(r["user"], r["item"]) for r in pq.read_table(f"{work}/samples/train").to_pylist()}
    others = {r["user"]: r["item"] for r in held_out if (r["user"], r["item"]) not in pairs}
    assert others
    changed = edited(
        config,
        tmp_path,
        "train",
        each("clicks", lambda row: [others.get(row["user"], "i0")]),
    )
    assert ("leakage", "clicks", "train") in found(changed)


def test_few_matches_of_a_table_are_found(clean: Config, tmp_path: Path) -> None:
    matches = {"samples.users": {"file": "users.parquet", "rows": 3000, "matched": 30}}
    changed = edited(clean, tmp_path, "test", lambda rows: rows, matches=matches)
    [finding] = run(changed).findings
    assert (finding.check, finding.what) == ("matches", "samples.users")
    assert finding.value == pytest.approx(0.01)


def test_drift_against_another_run_is_found(clean: Config, tmp_path: Path) -> None:
    changed = edited(clean, tmp_path, "train", each("device", "watch", 0.5))
    findings = [f for f in run(changed, against=clean.paths.work).findings if f.check == "drift"]
    assert [f.what for f in findings] == ["device"]
    other = edited(clean, tmp_path, "train", each("price", lambda row: row["price"] / 3))
    drifted = found(other, against=clean.paths.work)
    assert ("drift", "price", "train") in drifted


def test_limits_and_stops_come_from_the_configuration(clean: Config, tmp_path: Path) -> None:
    changed = edited(clean, tmp_path, "test", each("device", None, 0.4))
    assert not run(changed).is_stopped
    stopped = run(with_fields(changed, {"checks.stop": ["nulls"]}))
    assert stopped.is_stopped
    assert [f.status for f in stopped.findings if f.check == "nulls"] == ["stop"]
    assert json.loads(json.dumps(stopped.to_dict()))["is_stopped"]
    relaxed = with_fields(changed, {"checks.stop": ["nulls"], "checks.nulls": 0.7})
    assert found(relaxed) == []
    with pytest.raises(UserError) as raised:
        Checks(stop=("null",))  # type: ignore[arg-type]
    assert "stop" in raised.value.field


def test_the_command_prints_findings_and_exits_with_1(
    clean: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = edited(clean, tmp_path, "test", each("device", None, 0.4))
    monkeypatch.setattr("hvdrec.cli.check_command.load_config", lambda options: changed)
    options = parse(["check", "run.toml", "--against", clean.paths.work])
    answer = check_command.run(options)
    assert answer.status == 0
    assert "60.0% of the values are missing" in answer.text
    stopping = with_fields(changed, {"checks.stop": ["nulls"]})
    monkeypatch.setattr("hvdrec.cli.check_command.load_config", lambda options: stopping)
    answer = check_command.run(options)
    assert answer.status == 1
    assert answer.facts["findings"][0]["status"] == "stop"


def test_samples_to_compare_with_must_exist(clean: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        run(clean, against=tmp_path)
    assert raised.value.field == str(tmp_path)
    with pytest.raises(UserError):
        run(with_fields(clean, {"paths.samples": str(tmp_path / "none")}))


shares = st.lists(st.integers(0, 1000), min_size=2, max_size=8).filter(any)


@given(st.data())
def test_the_stability_index(data: st.DataObject) -> None:
    first = data.draw(shares)
    second = data.draw(st.lists(st.integers(0, 1000), min_size=len(first), max_size=len(first)))
    if not any(second):
        second = first
    assert psi(first, first) == 0
    assert psi(first, second) >= 0
    assert psi(first, second) == pytest.approx(psi(second, first))


def test_the_stability_index_by_hand() -> None:
    # (0.6 - 0.5) ln(0.6 / 0.5) + (0.4 - 0.5) ln(0.4 / 0.5)
    assert psi([5, 5], [6, 4]) == pytest.approx(0.0182322 + 0.0223144, abs=1e-6)
    assert psi([1, 1], [2, 0]) == pytest.approx(0.5 * math.log(2) + 0.4999 * math.log(0.5 / FLOOR))


def test_findings_say_what_is_wrong() -> None:
    finding = Finding("nulls", "age", "test", 0.6, 0.5, "60.0% of the values are missing")
    assert finding.status == "warning"
