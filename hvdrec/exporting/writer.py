"""Write the bundle of a trained model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pyarrow as pa
import pyarrow.parquet as pq

from hvdrec.config import Config
from hvdrec.config.names import file_name
from hvdrec.config.schema import Schema
from hvdrec.config.structure import to_dict
from hvdrec.errors import invalid_file, invalid_value
from hvdrec.exporting.catalogue import write_catalogue
from hvdrec.exporting.embed import write_side
from hvdrec.exporting.graphs import stored_width, tower
from hvdrec.exporting.index import require_index_library, write_index
from hvdrec.exporting.parity import largest_difference
from hvdrec.exporting.precision import reduce_precision
from hvdrec.exporting.ranker_graph import OWN_INPUTS
from hvdrec.exporting.serving_graph import ranker
from hvdrec.features.fit import Fitted
from hvdrec.models.recommender import Recommender
from hvdrec.parallel.pool import THIS_PROCESS, WorkerPool
from hvdrec.parallel.progress import print_line
from hvdrec.storage.artifacts import (
    MADE_FROM,
    read_manifest,
    verify_artifact,
    write_artifact,
    write_manifest,
)
from hvdrec.storage.lineage import require_source
from hvdrec.storage.urls import Location

EXTERNAL_DATA_BYTES = 1 << 30


def write_bundle(
    config: Config,
    model: Recommender,
    *,
    checkpoint: str,
    metrics: dict[str, Any],
    checkpoint_identity: str = "",
    overwrite: bool = False,
    notify: Callable[[str], None] = lambda _: None,
    workers: WorkerPool = THIS_PROCESS,
) -> dict[str, Any]:
    """Write the bundle of a trained model if it gives the same scores as the model in PyTorch.

    Args:
        config: Configuration of the run, which is also stored in the manifest.
        model: The trained model.
        checkpoint: Name of the checkpoint that the model was loaded from.
        metrics: Validation metrics of the model.
        checkpoint_identity: Identity of the checkpoint, from its manifest.
        overwrite: True to replace an existing bundle.
        notify: Called with a line of text at the start of each step.
        workers: Processes that compute embeddings; all their hosts must see the bundle's directory.

    Returns:
        The ``meta`` of the bundle's manifest.

    Raises:
        UserError: The samples or the features are damaged; the features were made from other
            samples; or, for held-out rows given as raw values, the bundle's scores differ from
            PyTorch's by more than ``export.tolerance``. In all these cases no bundle appears.
    """
    samples, features = config.paths.of("samples"), config.paths.of("features")
    made = verify_artifact(samples, "samples")
    made_from = {
        "samples": made.identity,
        "features": _check_features(features, samples),
        "checkpoint": checkpoint_identity,
    }
    require_index_library(config.export)
    users, state = _stored_users(samples, config.export.users_as_of)
    fitted = Fitted.load(features)
    out, model = config.paths.of("bundle"), model.cpu().eval()
    meta = _meta(config, model, checkpoint, metrics) | {MADE_FROM: made_from}
    if "columns" in made.meta:  # earlier versions did not record the columns
        meta["log_columns"] = made.meta["columns"]
    with write_artifact(out, "bundle", meta, overwrite=overwrite) as draft:
        notify("compiling graphs")
        _save_graphs(draft, model, fitted)
        meta |= _write_entities(draft, config, users, state, notify, workers)
        notify("comparing the bundle's scores with torch's")
        write_manifest(draft, "bundle", meta)
        meta["parity"] = _require_parity(draft, config, model, fitted)
        if (config.export.embeddings, config.export.ranker) != ("float32", "float32"):
            notify("measuring the cost of reduced precision")
            meta["precision"] = reduce_precision(draft, config)
        if config.export.index != "none":
            index = write_index(draft, meta["retrieval_width"], notify)
            meta |= {} if index is None else {"index": index}
    notify(f"{out}: {meta['users']} users, {meta['items']} items")
    return meta


def _check_features(features: Location, samples: Path) -> str:
    """Return the identity of the features after checking that they were made from the samples."""
    manifest = read_manifest(features, "features")
    remedy = "run hvdrec prepare and hvdrec train with --overwrite, or restore those samples"
    if not require_source(features, manifest, samples, "samples", remedy):
        print_line(f"{features}: does not record its samples, so they are not compared")
    return manifest.identity


def _write_entities(
    draft: Path,
    config: Config,
    users: pa.Table,
    state: str,
    notify: Callable[[str], None],
    workers: WorkerPool,
) -> dict[str, Any]:
    """Write the data of users and items; return facts about them for the manifest's ``meta``.

    `state` is one of `samples.split.STATES`. `users` are the users as of the end of the splits that
    this state includes.
    """
    items = pq.read_table(config.paths.of("samples") / "items.parquet")
    notify("embedding users")
    facts: dict[str, Any] = {"users": write_side(draft, "user", users, config.schema, workers)}
    notify("embedding items")
    facts["items"] = write_side(draft, "item", items, config.schema, workers)
    notify("counting popular, trending and seen items")
    known = write_catalogue(draft, users, items, config, notify, users_know=state)
    return facts | {"known": known}


def _stored_users(samples: Path, state: str) -> tuple[pa.Table, str]:
    """Read the users as of the end of certain splits.

    Args:
        samples: Directory of the samples.
        state: One of `samples.split.STATES`: the splits whose rows may have changed the users.

    Returns:
        The users, and the state that they really depend on: "train" if the rows of later splits
        changed nothing.
    """
    file = samples / f"users_{state}.parquet"
    if not file.is_file():
        problem = "the samples hold no users of this state, an earlier version wrote them"
        remedy = "choose 'train' or 'all', or run hvdrec samples with --overwrite"
        raise invalid_value("export.users_as_of", state, problem, remedy)
    users = pq.read_table(file)
    # Without histories and features computed from the log, the rows of later splits change nothing.
    is_same = state != "train" and users.equals(pq.read_table(samples / "users_train.parquet"))
    return users, "train" if is_same else state


def _require_parity(
    draft: Path, config: Config, model: Recommender, fitted: Fitted
) -> dict[str, Any]:
    rows, difference = largest_difference(draft, config, model, fitted)
    if not difference <= config.export.tolerance:
        problem = (
            f"not published: scores of {rows} held-out rows differ from torch by up to "
            f"{difference:.3g}, export.tolerance = {config.export.tolerance:g}"
        )
        raise invalid_file(config.paths.of("bundle"), problem)
    return {"rows": rows, "largest_difference": difference}


def _meta(
    config: Config, model: Recommender, checkpoint: str, metrics: dict[str, Any]
) -> dict[str, Any]:
    meta = {
        "name": config.name,
        "checkpoint": checkpoint,
        "objective": config.train.objective,
        "schema": _request_schema(config.schema),
        "names": _own_names(config),
        "filters": {n: file_name(n) for n in config.export.filters if file_name(n) != n},
        "user_width": stored_width(model, "user"),
        "item_width": stored_width(model, "item"),
        # If the towers were not trained for retrieval, candidates are chosen by popularity.
        "retrieval_width": 0 if config.train.objective == "ranking" else model.output_width,
    }
    if config.tasks:
        meta["tasks"] = [{"name": task.name, "share": task.share} for task in config.tasks]
        meta["combine"] = config.model.ranker.combine
    return meta | {"metrics": metrics, "config": to_dict(config)}


def _own_names(config: Config) -> dict[str, str]:
    """Return the graph tensors that are renamed because a raw column has their usual name.

    The result maps the usual name to the new one.
    """
    outputs = ("embedding", "score", *(task.output for task in config.tasks))
    names = {name: config.schema.own_name(name) for name in (*OWN_INPUTS, *outputs)}
    return {usual: name for usual, name in names.items() if name != usual}


def _request_schema(schema: Schema) -> dict[str, Any]:
    """Describe the raw values in a scoring request."""
    columns = [
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
    return {"user_key": schema.user_key, "item_key": schema.item_key, "features": columns}


def _save_graphs(draft: Path, model: Recommender, fitted: Fitted) -> None:
    _save_graph(tower(model, fitted, "user"), draft / "user_tower.onnx")
    _save_graph(tower(model, fitted, "item"), draft / "item_tower.onnx")
    _save_graph(ranker(model, fitted), draft / "ranker.onnx")


def _save_graph(graph: onnx.ModelProto, file: Path) -> None:
    onnx.checker.check_model(graph)
    onnx.save(
        graph,
        str(file),
        # A protobuf message is limited to 2 GB, so larger tables are written to a separate file.
        save_as_external_data=graph.ByteSize() > EXTERNAL_DATA_BYTES,
        location=f"{file.name}.data",
    )
