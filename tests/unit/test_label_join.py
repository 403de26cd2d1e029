"""The label join: DuckDB against a plain reference, worked examples, runs that continue others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdrec.config import Config
from hvdrec.config.durations import duration_text, microseconds, rounded_up
from hvdrec.config.label_join import Exposures, Feedback
from hvdrec.config.structure import from_dict, to_dict
from hvdrec.errors import UserError
from hvdrec.samples import make_samples
from hvdrec.samples.engine import connect
from hvdrec.samples.exposures import LabelledExposures, join_feedback
from hvdrec.samples.label_tables import META, UNSETTLED, open_tables
from hvdrec.samples.spec import SampleSpec
from hvdrec.storage.artifacts import write_artifact
from tests.label_logs import (
    Action,
    Faults,
    Joined,
    Row,
    join_labels,
    make_log,
    small_logs,
    small_options,
)

TYPES: dict[str, pa.DataType] = {
    "request_id": pa.string(),
    "user_id": pa.string(),
    "item_id": pa.string(),
    "asset": pa.string(),
    "t": pa.int64(),
    "position": pa.int64(),
    "value": pa.int64(),
}
SPLITS = ("train", "validation", "test")
COLUMNS = {
    "exposures": ("request_id", "user_id", "item_id", "t", "position"),
    "click": ("request_id", "item_id", "t", "value"),
    "buy": ("user_id", "asset", "t", "value"),
}


def write_log(raw: Path, exposures: Sequence[Row], feedback: Mapping[str, Sequence[Row]]) -> None:
    """Write the tables of a log as Parquet files."""
    raw.mkdir(parents=True, exist_ok=True)
    for name, rows in {"exposures": exposures, **feedback}.items():
        schema = pa.schema([(column, TYPES[column]) for column in COLUMNS[name]])
        pq.write_table(pa.Table.from_pylist(list(rows), schema), raw / f"{name}.parquet")


def config_of(options: Sequence[Feedback], exposures: Exposures | None = None) -> Config:
    """Build a configuration for the label join."""
    return from_dict(
        Config,
        {
            "name": "test",
            "features": [{"name": "user_id"}, {"name": "item_id", "side": "item"}],
            "samples": {
                "interactions": "exposures.parquet",
                "time": "t",
                "label": "click_count > 0",
                "feedback": [to_dict(each) for each in options],
                "exposures": to_dict(exposures or Exposures()),
            },
        },
    )


def run(
    raw: Path, config: Config, out: Path | None = None
) -> tuple[list[Row], list[Row], LabelledExposures]:
    """Join the tables in `raw`; return settled rows, unsettled rows and the result."""
    spec = SampleSpec.of(config)
    with connect() as engine:
        exposures = engine.read(raw, "exposures.parquet")
        tables = open_tables(engine, spec, raw, exposures, raw / "exposures.parquet")
        joined = join_feedback(engine, spec, tables)
        if out is not None:
            with write_artifact(out, "samples", {META: joined.facts}) as draft:
                joined.save(engine, draft / UNSETTLED)
        settled = pa.table(engine.collect(joined.table)).to_pylist()
        unsettled = pa.table(engine.collect(joined.unsettled)).to_pylist()
    return settled, unsettled, joined


def ordered(rows: Sequence[Row]) -> list[str]:
    """Return rows as sorted text, to compare them as multisets."""
    return sorted(str(sorted(row.items())) for row in rows)


def require_equal(result: tuple[list[Row], list[Row], LabelledExposures], expected: Joined) -> None:
    """Compare a result with that of the reference: rows, counts and times."""
    settled, unsettled, joined = result
    assert ordered(settled) == ordered(expected.settled)
    assert ordered(unsettled) == ordered(expected.unsettled)
    assert joined.facts["feedback"] == expected.counts
    assert joined.facts["settled_before"] == expected.settled_before
    for counts in expected.counts.values():
        assert counts["rows"] == sum(n for name, n in counts.items() if name != "rows")


@pytest.mark.parametrize("examples", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_duckdb_gives_the_rows_of_the_reference_also_in_a_second_run(
    tmp_path_factory: pytest.TempPathFactory, examples: int
) -> None:
    @settings(max_examples=examples, deadline=None)
    @given(log=small_logs(), options=small_options(), cut=st.integers(5, 25))
    def check(
        log: tuple[list[Row], dict[str, list[Row]]], options: tuple[Feedback, Feedback], cut: int
    ) -> None:
        require_reference(tmp_path_factory.mktemp("join"), log, options, cut)

    check()


def require_reference(
    folder: Path,
    log: tuple[list[Row], dict[str, list[Row]]],
    options: tuple[Feedback, Feedback],
    cut: int,
) -> None:
    """Run the join on the log before `cut`, then on the rest; compare with the reference."""
    exposures, feedback = log

    def part(rows: Sequence[Row], first: bool) -> list[Row]:
        return [row for row in rows if (row["t"] is None or row["t"] < cut) == first]

    old = part(exposures, True), {name: part(rows, True) for name, rows in feedback.items()}
    new = part(exposures, False), {name: part(rows, False) for name, rows in feedback.items()}
    before = join_labels(*old, options, end=cut)
    write_log(folder / "old", *old)
    config = config_of(options, Exposures(end=str(cut)))
    if before.settled:
        require_equal(run(folder / "old", config, folder / "samples"), before)
    else:
        with pytest.raises(UserError):
            run(folder / "old", config)
        return
    write_log(folder / "new", *new)
    after = join_labels(*new, options, end=60, previous=before)
    config = config_of(options, Exposures(end="60", unsettled=str(folder / "samples")))
    if after.settled:
        require_equal(run(folder / "new", config), after)


@settings(max_examples=100, deadline=None)
@given(log=small_logs(), options=small_options(), cut=st.integers(5, 25))
def test_two_runs_give_the_labels_of_one(
    log: tuple[list[Row], dict[str, list[Row]]], options: tuple[Feedback, Feedback], cut: int
) -> None:
    """The reference itself: what a run carries over is enough, and nothing counts twice."""
    exposures, feedback = log
    options = (options[0], replace(options[1], key=()))
    rows = {name: [r for r in rows if r["t"] is not None] for name, rows in feedback.items()}

    def part(rows: Sequence[Row], first: bool) -> list[Row]:
        return [row for row in rows if (row["t"] < cut) == first]

    one = join_labels(exposures, rows, options, end=60)
    first = join_labels(
        part(exposures, True), {n: part(r, True) for n, r in rows.items()}, options, end=cut
    )
    second = join_labels(
        part(exposures, False),
        {n: part(r, False) for n, r in rows.items()},
        options,
        end=60,
        previous=first,
    )
    assert ordered(first.settled + second.settled) == ordered(one.settled)
    assert not second.unsettled


CLICK = Feedback("click", "click.parquet", ("request_id", "item_id"), "10s")
BUY = Feedback("buy", "buy.parquet", ("user_id", "item_id = asset"), "20s", value="value")


def shown(t: int, request: str = "a", position: int = 0) -> Row:
    """Return an exposure of item x to user u."""
    keys = {"request_id": request, "user_id": "u", "item_id": "x"}
    return {**keys, "t": t, "position": position}


def clicked(t: int | None, request: str | None = "a") -> Row:
    """Return a click on item x."""
    return {"request_id": request, "item_id": "x", "t": t, "value": None}


def bought(t: int, value: int | None = 1) -> Row:
    """Return a purchase of item x by user u."""
    return {"user_id": "u", "asset": "x", "t": t, "value": value}


def labels(
    raw: Path,
    exposures: Sequence[Row],
    clicks: Sequence[Row] = (),
    buys: Sequence[Row] = (),
    click: Feedback = CLICK,
    buy: Feedback = BUY,
) -> tuple[dict[tuple[int, str], Row], Mapping[str, Any]]:
    """Join a log that ends at second 1000; return (t, request) -> row, and the facts."""
    write_log(raw, exposures, {"click": clicks, "buy": buys})
    settled, _, joined = run(raw, config_of((click, buy), Exposures(end="1000")))
    return {(row["t"], row["request_id"]): row for row in settled}, joined.facts


def test_the_window_includes_its_ends_and_counts_sums_and_delays(tmp_path: Path) -> None:
    clicks = [clicked(105), clicked(110), clicked(111), clicked(99)]
    buys = [bought(120, 5), bought(101, 7), bought(102, None), bought(121, 9)]
    rows, facts = labels(tmp_path, [shown(100)], clicks, buys)
    row = rows[100, "a"]
    assert (row["click_count"], row["click_delay"]) == (2, 5.0)
    assert (row["buy_count"], row["buy_delay"], row["buy_value"]) == (3, 1.0, 12.0)
    assert "click_value" not in row
    assert facts["feedback"]["click"]["early"] == facts["feedback"]["click"]["late"] == 1


def test_an_exposure_without_feedback_has_count_zero_and_no_delay(tmp_path: Path) -> None:
    rows, _ = labels(
        tmp_path, [shown(100)], [clicked(100, "other"), clicked(None), clicked(1, None)]
    )
    row = rows[100, "a"]
    assert (row["click_count"], row["click_delay"]) == (0, None)
    assert (row["buy_count"], row["buy_delay"], row["buy_value"]) == (0, None, 0.0)


def test_rows_that_repeat_others_count_once(tmp_path: Path) -> None:
    exposures = [shown(100, position=1), shown(100, position=0), shown(100, position=0)]
    rows, facts = labels(tmp_path, exposures, [clicked(101), clicked(101), clicked(102)])
    assert rows[100, "a"]["position"] == 0
    assert rows[100, "a"]["click_count"] == 2
    assert facts["exposures"] == {
        "rows": 3, "skipped": 0, "duplicates": 2, "settled": 1, "unsettled": 0
    }  # fmt: skip
    assert facts["feedback"]["click"]["duplicates"] == 1


def test_a_key_of_exposures_keeps_the_earliest_row(tmp_path: Path) -> None:
    write_log(tmp_path, [shown(103), shown(100)], {"click": [clicked(104)], "buy": []})
    exposures = Exposures(key=("request_id", "item_id"), end="1000")
    [row], _, _ = run(tmp_path, config_of((CLICK, BUY), exposures))
    assert (row["t"], row["click_count"]) == (100, 1)


def test_skew_lets_feedback_be_earlier_than_its_exposure(tmp_path: Path) -> None:
    tolerant = replace(CLICK, skew="3s")
    for click, count in ((CLICK, 0), (tolerant, 1)):
        rows, facts = labels(tmp_path, [shown(100)], [clicked(97), clicked(96)], click=click)
        assert rows[100, "a"]["click_count"] == count
        assert facts["feedback"]["click"]["early"] == 2 - count
    assert rows[100, "a"]["click_delay"] == 0.0


@pytest.mark.parametrize(
    ("touch", "counts"),
    [("last", [0, 2, 0]), ("first", [2, 0, 0]), ("every", [2, 2, 1])],
)
def test_feedback_in_several_windows_counts_for_the_touch(
    tmp_path: Path, touch: Any, counts: list[int]
) -> None:
    exposures = [shown(100, "a"), shown(105, "b"), shown(112, "c")]
    buy = replace(BUY, touch=touch, skew="1s")
    rows, facts = labels(tmp_path, exposures, [], [bought(106), bought(111)], buy=buy)
    # The purchase at 111 is in the window of "c" because of the skew, but others come before it.
    assert [row["buy_count"] for _, row in sorted(rows.items())] == counts
    assert facts["feedback"]["buy"]["matched"] == 2


def test_exposures_at_the_end_of_the_log_are_unsettled(tmp_path: Path) -> None:
    write_log(tmp_path, [shown(100), shown(979), shown(980)], {"click": [clicked(981)], "buy": []})
    settled, unsettled, joined = run(tmp_path, config_of((CLICK, BUY), Exposures(end="1000")))
    assert [row["t"] for row in settled] != [100]
    assert sorted(row["t"] for row in settled) == [100, 979]
    assert [row["t"] for row in unsettled] == [980]
    late = Exposures(end="1000", lateness="30s")
    assert [row["t"] for row in run(tmp_path, config_of((CLICK, BUY), late))[0]] == [100]
    assert joined.facts["settled_before"] == 980 * 1_000_000


def test_a_log_shorter_than_the_window_is_an_error(tmp_path: Path) -> None:
    write_log(tmp_path, [shown(100)], {"click": [clicked(101)], "buy": []})
    with pytest.raises(UserError, match="longer than the window") as caught:
        run(tmp_path, config_of((CLICK, BUY)))
    assert (caught.value.field, caught.value.value) == ("samples.feedback", "20s")


@pytest.mark.parametrize(
    ("dtype", "unit", "scale"),
    [
        (pa.int64(), "s", 1), (pa.int64(), "ms", 1_000), (pa.float64(), "s", 1),
        (pa.timestamp("us"), "s", 1_000_000), (pa.timestamp("ns", "Europe/Paris"), "s", 10**9),
    ],
)  # fmt: skip
def test_times_have_any_type_and_unit(
    tmp_path: Path, dtype: pa.DataType, unit: Any, scale: int
) -> None:
    base = 1_700_000_000
    for name, times in {"exposures": [base, base + 900], "click": [base + 7]}.items():
        size = len(times)
        table = pa.table(
            {
                "request_id": ["a"] * size, "user_id": ["u"] * size, "item_id": ["x"] * size,
                "t": pa.array([t * scale for t in times]).cast(dtype),
            }
        )  # fmt: skip
        pq.write_table(table, tmp_path / f"{name}.parquet")
    config = config_of((CLICK,))
    config = replace(config, samples=replace(config.samples, time_unit=unit))
    [row], _, joined = run(tmp_path, config)
    assert (row["click_count"], row["click_delay"]) == (1, 7.0)
    assert joined.facts["end"] == (base + 900) * 1_000_000


def test_milliseconds_declared_as_seconds_are_an_error(tmp_path: Path) -> None:
    write_log(tmp_path, [shown(1_700_000_000_000)], {"click": [], "buy": []})
    with pytest.raises(UserError, match="ms") as caught:
        run(tmp_path, config_of((CLICK, BUY)))
    assert (caught.value.field, caught.value.value) == ("samples.time_unit", "s")


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"on": ("session",)}, "exposures.parquet", "session"),
        ({"on": ("item_id = nothing",)}, "click.parquet", "nothing"),
        ({"on": ("item_id = t > 3",)}, "click.parquet", "same type"),
        ({"time": "request_id"}, "click.parquet", "a time is"),
        ({"where": "request_id"}, "samples.feedback[0].where", "condition"),
        ({"value": "request_id || 'x'"}, "samples.feedback[0].value", "number"),
        ({"value": "nothing + 1"}, "samples.feedback[0].value", "nothing"),
        ({"table": "missing.parquet"}, "missing.parquet", "no such file"),
    ],
)
def test_mistakes_name_the_field(
    tmp_path: Path, change: dict[str, Any], field: str, words: str
) -> None:
    write_log(tmp_path, [shown(100), shown(500)], {"click": [clicked(101)]})
    with pytest.raises(UserError, match=words) as caught:
        run(tmp_path, config_of((replace(CLICK, **change),)))
    assert caught.value.field.endswith(field)


def test_samples_have_labels_from_feedback_and_continue_the_previous_run(tmp_path: Path) -> None:
    """Two runs over the parts of a log give the samples of one run over all of it."""
    action = {"click": Action(rate=0.4), "buy": Action(rate=0.1)}
    log = make_log(1, requests=60, actions=action, faults=Faults(duplicates=0.1))
    click = Feedback("click", "click.csv", ("request_id", "item_id"), "10m", value="value")
    buy = Feedback("buy", "buy.csv", ("user_id", "item_id"), "2h")

    def samples(name: str, start: float, end: float, unsettled: str = "") -> tuple[Any, list[Row]]:
        raw = tmp_path / f"raw-{name}"
        raw.mkdir()
        for kind, rows in {"exposures": log.exposures, **log.feedback}.items():
            table = pa.Table.from_pylist([row for row in rows if start <= row["t"] < end])
            pyarrow.csv.write_csv(table, raw / f"{kind}.csv")
        config = config_of((click, buy), Exposures(end=str(end), unsettled=unsettled))
        changed = replace(
            config.samples,
            interactions="exposures.csv",
            label="click_value > 20 OR buy_count > 0",
            weight="1 + buy_count",
        )
        paths = replace(config.paths, raw=str(raw), samples=str(tmp_path / name))
        result = make_samples(replace(config, samples=changed, paths=paths), progress=False)
        files = [f for split in SPLITS for f in (tmp_path / name / split).glob("*.parquet")]
        return result, [row for file in files for row in pq.read_table(file).to_pylist()]

    whole, rows = samples("whole", 0, 86_400)
    _, first = samples("first", 0, 50_000)
    second, rest = samples("second", 50_000, 86_400, str(tmp_path / "first"))
    assert ordered(first + rest) == ordered(rows)
    assert 0 < sum(row["label"] for row in rows) < len(rows)
    joined = whole.label_join["exposures"]
    assert joined["settled"] == sum(whole.rows.values()) == len(rows)
    assert joined["unsettled"] == second.label_join["exposures"]["unsettled"] > 0
    assert set(whole.label_join["feedback"]) == {"click", "buy"}


def test_only_samples_with_feedback_can_be_continued(tmp_path: Path) -> None:
    with write_artifact(tmp_path / "old", "samples", {}) as draft:
        (draft / "items.parquet").touch()
    write_log(tmp_path, [shown(100)], {"click": [], "buy": []})
    with pytest.raises(UserError, match="feedback") as caught:
        run(tmp_path, config_of((CLICK, BUY), Exposures(unsettled=str(tmp_path / "old"))))
    assert caught.value.field == "samples.exposures.unsettled"


def test_durations_are_numbers_with_a_unit() -> None:
    assert microseconds("1.5h") == 5_400_000_000
    assert [rounded_up(s * 1e6) for s in (1734, 100_000, 86_399, 3.2)] == [
        "29m", "28h", "1d", "3200ms"
    ]  # fmt: skip
    assert duration_text(5_400_000_000) == "1.5h"
    for text in ("30", "m", "-1s", "1 fortnight"):
        with pytest.raises(UserError) as caught:
            from_dict(Feedback, {**to_dict(CLICK), "window": text})
        assert (caught.value.field, caught.value.value) == ("window", text)


def test_a_share_of_the_negatives_is_kept_with_the_weight_that_undoes_it(tmp_path: Path) -> None:
    rows = [{**shown(t, f"r{t}"), "user_id": f"u{t % 97}"} for t in range(2000)]
    clicks = [clicked(t + 1, f"r{t}") for t in range(0, 2000, 10)]

    def samples(name: str, order: int, **negatives: Any) -> list[tuple[str, str, float]]:
        write_log(tmp_path / name, rows[::order], {"click": clicks})
        config = config_of((CLICK,), Exposures(end="5000"))
        changed = replace(config.samples, negatives=replace(config.samples.negatives, **negatives))
        paths = replace(config.paths, raw=str(tmp_path / name), samples=str(tmp_path / "s" / name))
        make_samples(replace(config, samples=changed, paths=paths), progress=False)
        files = (tmp_path / "s" / name).glob("*/part-*.parquet")
        columns = ["user_id", "time", "label", "weight"]
        table = pa.concat_tables(pq.read_table(file, columns=columns) for file in files)
        return sorted(tuple(row.values()) for row in table.to_pylist())

    kept = samples("a", 1, rate=0.25, seed=3)
    assert kept == samples("b", -1, rate=0.25, seed=3)
    assert sum(label for _, _, label, _ in kept) == 200
    weights = {(label, weight) for _, _, label, weight in kept}
    assert weights == {(1.0, 1.0), (0.0, 4.0)}
    assert abs(len(kept) - 200 - 450) < 4 * (1800 * 0.25 * 0.75) ** 0.5
    assert kept != samples("c", 1, rate=0.25, seed=4)
