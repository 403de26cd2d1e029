"""``hvdrec report``: one HTML file whose figures are those of ``hvdrec evaluate``."""

from __future__ import annotations

import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hvdrec.config.structure import to_dict
from hvdrec.errors import UserError
from hvdrec.reporting.report import report, require_same_samples
from hvdrec.storage.artifacts import read_manifest, write_manifest
from hvdrec.storage.checksums import sealed
from hvdrec.training.checkpoint import read_config
from tests.integration.conftest import SmallRun, hvdrec


class Cells(HTMLParser):
    """Collects the rows of all tables, and the addresses that the page would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.loads: list[str] = []
        self._open = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name == "src"]
        self.loads += [value or "" for name, value in attrs if tag == "link" and name == "href"]
        if tag == "tr":
            self.rows.append([])
        self._open = tag in ("td", "th")
        if self._open:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self._open and self.rows:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._open = False


def test_the_figures_of_the_report_are_those_of_evaluate(
    small_run: SmallRun, tmp_path: Path
) -> None:
    run = small_run.work / "run"
    written = report(run, to=tmp_path / "report.html", against=run, progress=False)
    page = Path(written.path).read_text()
    cells = Cells(page)
    assert cells.loads == [] and "<script" not in page  # nothing is fetched or run
    assert len(page.encode()) == written.bytes < 5e6
    baselines = small_run.report["baselines"]
    for stage in ("ranking", "retrieval"):
        shown = [name for name, each in baselines.items() if stage in each]
        for metric, value in small_run.report[stage].items():
            values = [value, *(baselines[name][stage].get(metric) for name in shown)]
            texts = [
                "n/a" if v is None else f"{v:.4f}" if isinstance(v, float) else f"{v:,}"
                for v in values
            ]
            assert [metric, *texts] in cells.rows
    events = next(row for row in cells.rows if row[0] == "model" and "[" in row[1])
    assert events[1].startswith(f"{small_run.report['events']['hit_rate@5']:.4f} [")
    same = next(row for row in cells.rows if any("+0.0000 [" in cell for cell in row))
    assert same[0] == "hit_rate@5" and same[5] == "no"
    card = Path(written.card).read_text()
    assert f"| {small_run.report['ranking']['auc']:.4f} |" in card
    assert "Item " in page  # lists show titles


def copied(small_run: SmallRun, to: Path) -> Path:
    """Copy the configuration of the run and its features to another working directory."""
    (to / "run").mkdir(parents=True)
    config = read_config(small_run.work / "run")
    config = replace(config, paths=replace(config.paths, work=str(to)))
    (to / "run/config.json").write_text(sealed(to_dict(config)))
    shutil.copytree(small_run.work / "features", to / "features")
    return to


def test_another_runs_samples_cannot_be_compared(small_run: SmallRun, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        report(small_run.work / "run", against=tmp_path / "nothing", progress=False)
    assert str(tmp_path / "nothing") in str(error.value)
    # The same samples, moved: the identity decides, not the path.
    moved = copied(small_run, tmp_path / "moved")
    require_same_samples(small_run.work / "run", moved / "run")
    # Other samples at the same path.
    meta = dict(read_manifest(moved / "features", "features").meta)
    meta["made_from"] = {**meta["made_from"], "samples": "another"}
    write_manifest(moved / "features", "features", meta)
    runs = (small_run.work / "run", moved / "run")
    for run, against in (runs, runs[::-1]):
        with pytest.raises(UserError, match="another") as error:
            report(run, against=against, progress=False)
        assert (error.value.field, error.value.value) == ("--against", str(against))
    done = hvdrec("report", tmp_path / "nothing")
    assert done.returncode == 2 and len(done.stderr.splitlines()[-1]) > 0
