"""The report about delays: known delays, censoring, intervals, and what the command writes."""

from __future__ import annotations

import html.parser
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hvdrec
from hvdrec.cli.main import main
from hvdrec.config import Config
from hvdrec.config.structure import from_dict
from hvdrec.errors import UserError
from hvdrec.samples.delay import DelayResult
from hvdrec.samples.delay_curve import RATIO, delay_bin, estimate
from tests.label_logs import Action, Faults, make_log

MEAN = 600.0
"""Mean delay of a click, in seconds, in the logs of these tests."""
TRUE_WINDOW = -MEAN * math.log(0.05)
"""The window that catches 95 % of the clicks: a quantile of the exponential distribution."""


def write_toml(folder: Path, duration: float, faults: Faults | None = None) -> Path:
    """Write a log and a configuration for it; return the path of the configuration."""
    action = {"click": Action(rate=0.5, delay=MEAN, again=0.0)}
    log = make_log(7, requests=4000, duration=duration, actions=action, faults=faults)
    folder.mkdir(exist_ok=True)
    for name, rows in {"exposures": log.exposures, **log.feedback}.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    file = folder / "log.toml"
    file.write_text(
        f"""
name = "log"
paths.raw = {json.dumps(str(folder))}
features = [{{ name = "user_id" }}, {{ name = "item_id", side = "item" }}]
[samples]
interactions = "exposures.parquet"
time = "t"
label = "click_count > 0"
[[samples.feedback]]
name = "click"
table = "click.parquet"
on = ["request_id", "item_id"]
window = "10m"
"""
    )
    return file


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a log of a day with 6,000 clicks."""
    return write_toml(tmp_path_factory.mktemp("delays"), 86_400.0)


@pytest.fixture(scope="module")
def result(config_file: Path) -> DelayResult:
    """The report about this log."""
    config = hvdrec.load_config(config_file)
    return hvdrec.measure_delays(config, within="2h", progress=False)


def test_the_recommended_window_is_the_true_one_within_5_percent(result: DelayResult) -> None:
    [click] = result.actions
    assert click.seconds is not None
    assert abs(click.seconds / TRUE_WINDOW - 1) < 0.05
    assert click.low is not None and click.high is not None
    assert click.low < TRUE_WINDOW < click.high
    assert click.recommended.endswith("m")


def test_each_window_catches_its_share_of_an_exponential_delay(result: DelayResult) -> None:
    [click] = result.actions
    assert {"1m", "10m", "30m", "1h", click.recommended} <= {each.window for each in click.choices}
    for choice in click.choices:
        truth = 1 - math.exp(-choice.seconds / MEAN)
        assert choice.caught == pytest.approx(truth, abs=0.02)
        assert choice.low <= choice.caught <= choice.high
        assert choice.missed == pytest.approx(1 - choice.caught)
        wrong = 0.5 * math.exp(-choice.seconds / MEAN) / (1 - 0.5 * truth)
        assert choice.wrong_negatives == pytest.approx(wrong, abs=0.02)
        assert choice.unsettled == pytest.approx(choice.seconds / 86_400, abs=0.01)


def test_a_log_that_ends_before_the_feedback_gives_the_same_window(tmp_path: Path) -> None:
    """Half of the exposures were observed for less than the true window."""
    config = hvdrec.load_config(write_toml(tmp_path, 2 * TRUE_WINDOW))
    result = hvdrec.measure_delays(config, within="1h", progress=False)
    assert result.actions[0].seconds == pytest.approx(TRUE_WINDOW, rel=0.05)


def test_repeated_lost_and_shuffled_rows_do_not_change_the_window(tmp_path: Path) -> None:
    faults = Faults(duplicates=0.3, lost=0.3)
    config = hvdrec.load_config(write_toml(tmp_path, 86_400.0, faults))
    result = hvdrec.measure_delays(config, within="2h", progress=False)
    assert result.actions[0].seconds == pytest.approx(TRUE_WINDOW, rel=0.05)


def test_without_censoring_the_estimate_is_the_share_of_exposures() -> None:
    events = {delay_bin(10): 30, delay_bin(1000): 20}
    curve = estimate(events, {delay_bin(10**6) + 1: 50}, delay_bin(10**6))
    assert curve is not None
    assert curve.incidence[[curve.at(5), curve.at(10), curve.at(999_999)]] == pytest.approx(
        [0, 0.3, 0.5]
    )
    low, high = curve.interval()
    assert (low[0], high[-1]) == (0, 1)
    assert high[0] == pytest.approx(1 - low[-1])
    # Of 50 positives, none is later: a true share of low[-1] gives this with probability 0.025.
    assert low[-1] ** 50 == pytest.approx(0.025)
    # Greenwood's variance of an uncensored share is binomial: p (1 - p) / n.
    spread = (1 - curve.incidence[-1]) ** 2 * curve.error[-1]
    assert spread == pytest.approx(0.5 * 0.5 / 100)


def test_the_estimate_of_kaplan_and_meier_equals_a_worked_example() -> None:
    """Of 10 exposures: 2 clicks at 10, 4 leave at 100, 2 of the other 4 click at 1000."""
    curve = estimate(
        {delay_bin(10): 2, delay_bin(1000): 2}, {delay_bin(100): 4, delay_bin(2e4): 2}, 5000
    )
    assert curve is not None
    assert curve.incidence[-1] == pytest.approx(1 - (8 / 10) * (2 / 4))
    assert curve.smallest(0.3)[0] == pytest.approx(10, rel=RATIO - 1)
    assert curve.smallest(0.5)[0] == pytest.approx(1000, rel=RATIO - 1)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    draw, held = np.random.default_rng(1), 0
    for _ in range(200):
        delay = np.where(draw.random(2000) < 0.3, draw.exponential(1e6, 2000), np.inf)
        seen = draw.uniform(0, 1e7, 2000)
        events = [delay_bin(d) for d in delay[delay <= seen]]
        censored = [delay_bin(s) for s in seen[delay > seen]]
        curve = estimate(count(events), count(censored), delay_bin(8e6))
        assert curve is not None
        _, low, high = curve.smallest(0.9)
        truth = -1e6 * math.log(1 - 0.9 * (1 - math.exp(-8)))
        held += low <= truth and (high is None or truth <= high)
    assert held >= 182  # 95 % of 200 are 190, with a standard deviation of 3


def count(bins: list[int]) -> dict[int, int]:
    """Count equal numbers."""
    values, counts = np.unique(np.array(bins), return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


class _Page(html.parser.HTMLParser):
    """Collects the tags and links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_command_prints_the_report_and_writes_a_page(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "delays.html"
    with pytest.raises(SystemExit) as done:
        main(["delay", str(config_file), "--share", "0.9", "--html", str(page)])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "catches 90%" in text and str(page) in text
    found = _Page()
    found.feed(page.read_text())
    assert "polyline" in found.tags and not found.links
    with pytest.raises(SystemExit):
        main(["delay", str(config_file), "--share", "0.9", "--json"])
    [click] = json.loads(capsys.readouterr().out)["actions"]
    assert f'window = "{click["recommended"]}"' in text
    assert click["seconds"] == pytest.approx(-MEAN * math.log(0.1), rel=0.05)


def test_no_feedback_gives_a_note_and_mistakes_name_the_option(config_file: Path) -> None:
    config = hvdrec.load_config(config_file)
    [options] = config.samples.feedback

    def changed(**values: str) -> Config:
        samples = replace(config.samples, feedback=(replace(options, **values),))
        return replace(config, samples=samples)

    [click] = hvdrec.measure_delays(changed(where="value < 0"), progress=False).actions
    assert (click.positives, click.seconds) == (0, None) and "no feedback" in click.notes[0]
    for values, field in (({"share": 1.0}, "share"), ({"within": "long"}, "within")):
        with pytest.raises(UserError) as caught:
            hvdrec.measure_delays(config, progress=False, **values)
        assert caught.value.field == field
    bare = from_dict(Config, {"name": "bare", "features": [{"name": "user_id"}]})
    with pytest.raises(UserError) as caught:
        hvdrec.measure_delays(bare, progress=False)
    assert caught.value.field == "samples.feedback"
