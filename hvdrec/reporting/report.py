"""Write the report of a run: one self-contained HTML file, and a model card."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hvdrec.errors import invalid_value
from hvdrec.evaluation.item_item import LARGEST_CATALOGUE
from hvdrec.evaluation.result import Split
from hvdrec.parallel.progress import show_progress
from hvdrec.reporting import quality_sections, retrieval_sections, run_sections
from hvdrec.reporting.model_card import model_card
from hvdrec.reporting.page import page
from hvdrec.reporting.run_data import RunData, read_run
from hvdrec.storage.artifacts import read_manifest
from hvdrec.storage.drafts import write_text
from hvdrec.training.checkpoint import read_config
from hvdrec.training.pointers import Which


@dataclass(frozen=True)
class ReportResult:
    """A report that was written.

    Attributes:
        path: The HTML file.
        card: The model card, a Markdown file.
        bytes: Size of the HTML file.
    """

    path: str
    card: str
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return asdict(self)


def report(
    run: Path | str,
    *,
    to: Path | str | None = None,
    against: Path | str | None = None,
    split: Split = "test",
    checkpoint: Which = "best",
    ease_items: int = LARGEST_CATALOGUE,
    progress: bool = True,
) -> ReportResult:
    """Measure a run, and write a report for people: tables and pictures in one HTML file.

    Args:
        run: Directory of the run.
        to: The HTML file; by default WORK/report.html, beside the run and the bundle. The model
            card ``model_card.md`` is written beside it.
        against: Directory of another run on the same samples, to compare this run with.
        split: The split to measure on.
        checkpoint: "best" for the checkpoint with the best validation metric, or "latest".
        ease_items: Largest number of items for which EASE is fitted; 0 to skip it.
        progress: Whether to show the current step.

    Raises:
        UserError: A run cannot be read, or the run `against` was made from other samples.
    """
    run = Path(run)
    file = Path(to) if to is not None else run.parent / "report.html"
    if against is not None:
        require_same_samples(run, Path(against))
    with show_progress(progress) as shown:
        shown.describe(f"evaluating {run}")
        data = read_run(run, split=split, which=checkpoint, ease_items=ease_items)
        other = None
        if against is not None:
            shown.describe(f"evaluating {against}")
            other = read_run(
                Path(against), split=split, which=checkpoint, ease_items=0, baselines=False
            )
        shown.describe("drawing")
        html = _page(data, other)
    write_text(file, html)
    card = file.with_name("model_card.md")
    write_text(card, model_card(data))
    return ReportResult(str(file), str(card), len(html.encode()))


def _page(data: RunData, other: RunData | None) -> str:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    subtitle = f"{data.run}, {data.checkpoint.name}, {data.split} split; written {now}"
    against = retrieval_sections.compared(data, other) if other is not None else ""
    if other is not None:
        against = retrieval_sections.compared_metrics(data, other) + against
    sections = [
        ("What was trained on what", run_sections.about(data)),
        ("Training", run_sections.training(data)),
        ("Metrics", quality_sections.summary(data)),
        ("Against the other run", against),
        ("Retrieval event by event", retrieval_sections.events(data)),
        ("Scores", quality_sections.curves(data)),
        ("Slices", quality_sections.slices(data)),
        ("Scene", quality_sections.scene(data)),
        ("What each feature brings", quality_sections.features(data)),
        ("Lists", retrieval_sections.lists(data)),
        ("Users", retrieval_sections.users(data)),
    ]
    return page(f"{data.config.name}: report", subtitle, sections)


def require_same_samples(run: Path, against: Path) -> None:
    """Check that the features of two runs were made from the same samples.

    Features that an earlier version wrote do not record their samples. Then the paths of the
    samples must be equal.

    Raises:
        UserError: The samples differ, or a run or its features cannot be read.
    """
    (one, name), (two, other_name) = (_samples_of(each) for each in (run, against))
    if one and two:
        is_same = one == two
        one, two = (f"{one} ({name})", f"{two} ({other_name})")
    else:
        is_same, one, two = name == other_name, name, other_name
    if not is_same:
        problem = f"was made from the samples {two}, not from {one}"
        remedy = "compare runs whose features were made from the same samples"
        raise invalid_value("--against", str(against), problem, remedy)


def _samples_of(run: Path) -> tuple[str, str]:
    """Return the identity of the samples of a run's features, "" if unknown, and their path."""
    paths = read_config(run).paths
    manifest = read_manifest(paths.of("features"), "features")
    return manifest.made_from("samples"), str(paths.of("samples"))
