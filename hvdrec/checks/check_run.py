"""`check`: look at samples before training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import duckdb

from hvdrec.checks.column_checks import column_findings, measure_columns
from hvdrec.checks.drift import measure_drift
from hvdrec.checks.findings import CheckResult, Finding
from hvdrec.checks.row_checks import (
    duplicate_findings,
    label_findings,
    label_rates,
    leakage_findings,
    match_findings,
    measure_periods,
)
from hvdrec.checks.source import SampleSource, open_samples
from hvdrec.config import Config
from hvdrec.config.schema import Column
from hvdrec.errors import invalid_file
from hvdrec.features.sample_checks import check_columns, damaged
from hvdrec.parallel.progress import print_line
from hvdrec.samples.split import SPLITS
from hvdrec.storage.artifacts import read_manifest


def check(config: Config, *, against: str | Path = "", progress: bool = True) -> CheckResult:
    """Check the samples of a run before training.

    It measures missing values, ranges, cardinality, label rates, unseen values, duplicates, match
    rates, leakage between splits and, against another run, drift. The section ``[checks]`` sets the
    limits. At most 2 GB of memory is used, whatever the number of rows.

    Args:
        config: Configuration of the run.
        against: Samples of another run to compare with: their directory, or the run's WORK. Empty:
            no drift is measured.
        progress: Print lines of progress on standard error.

    Raises:
        UserError: There are no samples, or they do not have the columns of the configuration.
    """
    notify = print_line if progress else lambda line: None
    path = config.paths.of("samples")
    manifest = read_manifest(path, "samples")
    other = _samples_of(Path(against)) if against else None
    for split in SPLITS:
        check_columns(path / split, config.schema, [config.schema.own_name("label")])
    try:
        with open_samples(config, path, other) as (source, *others):
            notify("measuring columns")
            columns = measure_columns(source)
            rates, periods = label_rates(source), measure_periods(source)
            findings: list[Finding] = []
            rows = manifest.meta["rows"]
            findings += column_findings(source, columns, config.checks, rows["train"])
            findings += label_findings(rates, periods, config.checks)
            notify("looking for duplicates and leaks")
            findings += duplicate_findings(source, config.checks)
            findings += match_findings(manifest.meta.get("matches", {}), config.checks)
            findings += leakage_findings(source, config.checks)
            if others:
                notify(f"comparing with {other}")
                drifts = dict(_drifts(source, others[0]))
                columns = tuple(replace(c, drift=drifts.get(c.name)) for c in columns)
                findings += _drift_findings(drifts, config)
    except duckdb.Error as error:
        raise damaged(path, error) from None
    stop = config.checks.stop
    findings = [replace(f, status="stop") if f.check in stop else f for f in findings]
    shown = str(other) if other else ""
    return CheckResult(str(path), shown, rows, rates, columns, periods, tuple(findings))


def _samples_of(directory: Path) -> Path:
    """Return the directory itself if it holds samples, otherwise its subdirectory with samples.

    Raises:
        UserError: Neither of them holds samples.
    """
    for folder in (directory, directory / "samples"):
        if (folder / SPLITS[0]).is_dir():
            read_manifest(folder, "samples")
            return folder
    problem = "holds no samples to compare with"
    raise invalid_file(
        directory, problem, "name a directory that hvdrec samples wrote, or its WORK"
    )


def _drifts(source: SampleSource, other: SampleSource) -> Iterator[tuple[str, float]]:
    """Yield the name and the PSI of the label, and of each column except the user key.

    Columns that the other run does not have are left out.

    Raises:
        UserError: The other run has none of the columns.
    """
    label = Column(source.label, "scene", "float")
    known = other.connection.table(other.view).columns
    shared = [c for c in (label, *source.columns()) if c.name in known]
    if len(shared) < 2:
        problem = "has none of the features of this run"
        raise invalid_file(other.path, problem, "name samples with the same columns")
    for column in shared:
        if column.name != source.keys[0]:
            yield column.name, measure_drift(source, other, column)


def _drift_findings(drifts: dict[str, float], config: Config) -> Iterator[Finding]:
    for name, value in drifts.items():
        if value > config.checks.drift:
            text = f"PSI {value:.3f} against the other run"
            yield Finding("drift", name, "train", value, config.checks.drift, text)
