"""Sections of a report about the run itself: its model and data, and the course of training."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hvdrec import __version__
from hvdrec.config.structure import to_dict
from hvdrec.reporting.page import columns, details, table, text
from hvdrec.reporting.run_data import RunData
from hvdrec.reporting.svg import line_chart
from hvdrec.storage.artifacts import Manifest, read_manifest
from hvdrec.storage.json_text import json_text
from hvdrec.storage.urls import Location
from hvdrec.training.run_history import clock

PACKAGES = ("torch", "horovod", "numpy", "pyarrow", "onnx", "onnxruntime", "duckdb", "petastorm")
CPU_FACTS = Path("/proc/cpuinfo")


def about(data: RunData) -> str:
    """Show data, artifacts, versions, hardware, features and configuration."""
    config, start = data.config, data.history.start
    manifest = read_manifest(config.paths.of("features"), "features")
    trained = [
        ["checkpoint", f"{data.checkpoint.name} of {data.run}"],
        ["evaluated on", f"{data.split} split"],
        ["rows", ", ".join(f"{name} {rows:,}" for name, rows in manifest.meta["rows"].items())],
        ["split", config.samples.split.method],
        ["label", config.samples.label],
        ["parameters", f"{start['parameters']:,}" if start else "n/a"],
        ["trained", start.get("time", "n/a")],
        ["ranks", f"{start['world_size']} ({start['device']})" if start else "n/a"],
    ]
    features = [
        [each.name, each.side, each.kind, manifest.meta["sizes"].get(each.name)]
        for each in config.schema.features
    ]
    return columns(
        ("What was trained", table(["", ""], trained)),
        ("Artifacts", table(["kind", "identity", "written by"], _artifacts(data))),
        ("Versions of this report", table(["", ""], _versions())),
        ("Features", table(["name", "side", "kind", "table rows"], features)),
    ) + details("Configuration", json_text(to_dict(config), indent=1))


def training(data: RunData) -> str:
    """Draw loss and validation metric; show the speed and shares of the time."""
    history = data.history
    if not history.start:
        return text("The run has no log.", "none")
    losses = [(e["step"], e["loss"]) for e in history.steps if e.get("loss") is not None]
    name = history.metric
    values = [(e["step"], e[name]) for e in history.validations if e.get(name) is not None]
    facts: list[list[Any]] = [["wall time", clock(history.seconds)], ["steps", history.step]]
    speeds = [each["rows_per_second"] for each in history.steps]
    if speeds:
        facts.append(["rows per second, all ranks", int(sum(speeds) / len(speeds))])
    shares = [each["time_shares"] for each in history.steps if "time_shares" in each]
    for part in shares[0] if shares else ():
        mean = sum(each[part] for each in shares) / len(shares)
        facts.append([f"time of rank 0: {part}", f"{mean:.1%}"])
    return columns(
        ("Training loss", line_chart({"loss": losses}, x="step", y="loss")),
        (f"Validation {name}", line_chart({name: values}, x="step", y=name)),
        ("Speed and waiting", table(["", ""], facts)),
    )


def _artifacts(data: RunData) -> list[list[str]]:
    paths = data.config.paths
    kinds: tuple[tuple[str, Location], ...] = (
        ("samples", paths.of("samples")),
        ("features", paths.of("features")),
        ("bundle", paths.of("bundle")),
    )
    rows = []
    for kind, path in kinds:
        manifest = _manifest(path, kind)
        if manifest is not None:
            rows.append([kind, manifest.identity, manifest.written_by])
    own = data.checkpoint.manifest
    return [*rows, ["checkpoint", own.identity, own.written_by]]


def _manifest(path: Location, kind: str) -> Manifest | None:
    try:
        return read_manifest(path, kind)
    except (ValueError, OSError):
        return None


def _versions() -> list[list[str]]:
    rows = [["hvdrec", __version__], ["Python", platform.python_version()]]
    for package in PACKAGES:
        try:
            rows.append([package, version(package)])
        except PackageNotFoundError:
            continue
    rows.append(["machine", f"{_cpu()}, {os.cpu_count()} CPUs, {platform.system()}"])
    return rows


def _cpu() -> str:
    try:
        lines = CPU_FACTS.read_text().splitlines()
    except OSError:
        return platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
