"""Writing a bundle, and refusing to publish one that does not score as torch does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pyarrow.parquet as pq

from hvdrec.config import Config
from hvdrec.config.structure import to_dict
from hvdrec.errors import UserError
from hvdrec.exporting.catalogue import write_catalogue
from hvdrec.exporting.embed import write_side
from hvdrec.exporting.graphs import item_tower, stored_width, user_tower
from hvdrec.exporting.index import require_index_library, write_index
from hvdrec.exporting.parity import largest_difference
from hvdrec.exporting.precision import make_smaller
from hvdrec.exporting.serving_graph import ranker
from hvdrec.features.fit import Fitted
from hvdrec.models.recommender import Recommender
from hvdrec.parallel.pool import THIS_PROCESS, WorkerPool
from hvdrec.storage.artifacts import read_manifest, write_artifact, write_manifest

EXTERNAL_DATA_BYTES = 1 << 30


def export(
    config: Config,
    model: Recommender,
    *,
    checkpoint: str,
    metrics: dict[str, Any],
    overwrite: bool = False,
    notify: Callable[[str], None] = lambda _: None,
    workers: WorkerPool = THIS_PROCESS,
) -> dict[str, Any]:
    """Write the bundle of a trained model and return what its manifest says.

    The stored embeddings are computed by the bundle's own towers from raw values. Before the
    bundle is published, held-out rows enter it as raw values and must score as in torch to
    within ``export.tolerance``; otherwise UserError, and nothing is published. The workers share
    the embedding; where they are on several hosts, all must see the directory of the bundle.
    """
    samples, features = config.paths.of("samples"), config.paths.of("features")
    read_manifest(samples, "samples")
    read_manifest(features, "features")
    require_index_library(config)
    fitted = Fitted.load(features)
    out = config.paths.of("bundle")
    model = model.cpu().eval()
    meta: dict[str, Any] = _meta(config, model, checkpoint, metrics)
    with write_artifact(out, "bundle", meta, overwrite=overwrite) as draft:
        notify("compiling graphs")
        for name, make in (
            ("user_tower", user_tower),
            ("item_tower", item_tower),
            ("ranker", ranker),
        ):
            _save_graph(make(model, fitted), draft / f"{name}.onnx")
        notify("embedding users")
        users = pq.read_table(samples / "users_all.parquet")
        meta["users"] = write_side(draft, "user", users, config, workers)
        notify("embedding items")
        items = pq.read_table(samples / "items.parquet")
        meta["items"] = write_side(draft, "item", items, config, workers)
        notify("counting what is popular, trending and seen")
        write_catalogue(draft, users, items, config, notify)
        notify("proving that the bundle scores as torch does")
        write_manifest(draft, "bundle", meta)
        rows, difference = largest_difference(draft, config, model, fitted)
        if not difference <= config.export.tolerance:
            raise UserError(
                f"{out}: not published: scores of {rows} held-out rows differ from torch by up to "
                f"{difference:.3g}, export.tolerance allows {config.export.tolerance:g}"
            )
        meta["parity"] = {"rows": rows, "largest_difference": difference}
        if (config.export.embeddings, config.export.ranker) != ("float32", "float32"):
            notify("measuring what smaller numbers cost")
            meta["precision"] = make_smaller(draft, config)
        if config.export.index != "none":
            index = write_index(draft, meta["retrieval_width"], notify)
            meta |= {} if index is None else {"index": index}
    notify(f"{out}: {meta['users']} users, {meta['items']} items")
    return meta


def _meta(
    config: Config, model: Recommender, checkpoint: str, metrics: dict[str, Any]
) -> dict[str, Any]:
    schema = config.schema
    features = [
        {
            "name": column.name,
            "side": column.side,
            "kind": column.kind,
            "dtype": column.dtype,
            "max_length": column.max_length,
            **({} if column.default is None else {"default": column.default}),
        }
        for column in schema.columns()
    ]
    return {
        "name": config.name,
        "checkpoint": checkpoint,
        "objective": config.train.objective,
        "schema": {
            "user_key": schema.user_key,
            "item_key": schema.item_key,
            "features": features,
        },
        "user_width": stored_width(model, "user"),
        "item_width": stored_width(model, "item"),
        # Towers that were never trained to retrieve give candidates by popularity instead.
        "retrieval_width": 0 if config.train.objective == "ranking" else model.output_width,
        **_tasks(config),
        "metrics": metrics,
        "config": to_dict(config),
    }


def _tasks(config: Config) -> dict[str, Any]:
    if not config.tasks:
        return {}
    tasks = [{"name": task.name, "share": task.share} for task in config.tasks]
    return {"tasks": tasks, "combine": config.model.ranker.combine}


def _save_graph(graph: onnx.ModelProto, file: Path) -> None:
    onnx.checker.check_model(graph)
    onnx.save(
        graph,
        str(file),
        # A protobuf ends at 2 GB: larger tables go into a file beside it.
        save_as_external_data=graph.ByteSize() > EXTERNAL_DATA_BYTES,
        location=f"{file.name}.data",
    )
