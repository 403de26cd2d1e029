"""A model card in Markdown (Mitchell et al., "Model cards for model reporting", FAT* 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hvdrec.reporting.page import number
from hvdrec.reporting.run_data import RunData
from hvdrec.storage.artifacts import read_manifest

RANKING = ("auc", "gauc", "log_loss", "calibration", "rows")


def model_card(data: RunData) -> str:
    """Return the model card of the measured checkpoint: model, data, metrics and limits."""
    config, result = data.config, data.result
    rows = read_manifest(config.paths.of("features"), "features").meta["rows"]
    names = {
        side: ", ".join(each.name for each in config.schema.side(side))
        for side in ("user", "item", "scene")
    }
    objective = {
        "joint": "retrieves candidates by the inner product of two towers and ranks them by a DNN",
        "retrieval": "retrieves candidates by the inner product of two towers",
        "ranking": "ranks given items by a DNN",
    }[config.train.objective]
    parts = [
        f"# Model card: {config.name}",
        f"A recommender that {objective}. Checkpoint {data.checkpoint.name} "
        f"({data.checkpoint.manifest.identity}), written by hvdrec "
        f"{data.checkpoint.manifest.written_by}.",
        "## Data",
        f"Features {data.checkpoint.manifest.made_from('features') or 'n/a'}: "
        + ", ".join(f"{name} {count:,} rows" for name, count in rows.items())
        + f"; split: {config.samples.split.method}; label: `{config.samples.label}`.",
        "\n".join(f"- {side} features: {each or 'none'}" for side, each in names.items()),
        f"## Quality on the {data.split} split",
        *_metrics(result, config.evaluate.k[0]),
        "## Limits",
        "\n".join(f"- {each}" for each in _limits(data)),
    ]
    return "\n\n".join(parts) + "\n"


def _metrics(result: Mapping[str, Any], k: int) -> list[str]:
    names = {
        "ranking": RANKING,
        "retrieval": (f"recall@{k}", f"ndcg@{k}", "users"),
        "events": (f"hit_rate@{k}", f"ndcg@{k}", "events"),
    }
    parts = []
    for stage, chosen in names.items():
        if stage not in result:
            continue
        shown = {"model": result[stage]}
        baselines = result.get("baselines", {})
        shown |= {name: each[stage] for name, each in baselines.items() if stage in each}
        cells = [[name, *(number(each.get(name)) for each in shown.values())] for name in chosen]
        parts.append(_table([stage, *shown], cells))
    return parts


def _limits(data: RunData) -> list[str]:
    notes = [str(note) for note in data.result.get("notes", [])]
    unknown = "Users and items that are not in the training rows are scored by their features only."
    logged = "The metrics are measured on logged rows. They do not show what users would have done"
    return [*notes, unknown, f"{logged} with other lists."]


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
