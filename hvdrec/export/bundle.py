"""Writing a bundle, and refusing to publish one that does not score as torch does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvdrec.artifacts import read_manifest, write_artifact, write_manifest
from hvdrec.config import Config
from hvdrec.errors import UserError
from hvdrec.export.graphs import item_tower, user_tower
from hvdrec.export.parity import largest_difference
from hvdrec.export.precision import make_smaller
from hvdrec.export.ranker_graph import ranker
from hvdrec.features.fit import Fitted
from hvdrec.features.raw import rows_to_inputs
from hvdrec.models.recommender import Recommender
from hvdrec.schema import Feature
from hvdrec.structure import to_dict

BLOCK = 8192
EXTERNAL_DATA_BYTES = 1 << 30


def export(
    config: Config,
    model: Recommender,
    *,
    checkpoint: str,
    metrics: dict[str, Any],
    overwrite: bool = False,
    notify: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write the bundle of a trained model and return what its manifest says.

    The stored embeddings are computed by the bundle's own towers from raw values. Before the
    bundle is published, held-out rows enter it as raw values and must score as in torch to
    within ``export.tolerance``; otherwise UserError, and nothing is published.
    """
    samples, features = config.paths.of("samples"), config.paths.of("features")
    read_manifest(samples, "samples")
    read_manifest(features, "features")
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
        meta["users"] = _write_side(draft, "user", users, config)
        notify("embedding items")
        items = pq.read_table(samples / "items.parquet")
        meta["items"] = _write_side(draft, "item", items, config)
        _write_catalogue(draft / "items", items, features, config)
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
    notify(f"{out}: {meta['users']} users, {meta['items']} items")
    return meta


def _meta(
    config: Config, model: Recommender, checkpoint: str, metrics: dict[str, Any]
) -> dict[str, Any]:
    features = [
        {
            "name": feature.name,
            "side": feature.side,
            "kind": feature.kind,
            "dtype": feature.dtype,
            "max_length": feature.max_length,
            **({} if feature.default is None else {"default": feature.default}),
        }
        for feature in config.features
    ]
    schema = config.schema
    return {
        "name": config.name,
        "checkpoint": checkpoint,
        "objective": config.train.objective,
        "schema": {
            "user_key": schema.user_key,
            "item_key": schema.item_key,
            "features": features,
        },
        "user_width": model.user_width(),
        "item_width": model.item_width(),
        # Towers that were never trained to retrieve give candidates by popularity instead.
        "retrieval_width": 0 if config.train.objective == "ranking" else model.output_width,
        "metrics": metrics,
        "config": to_dict(config),
    }


def _save_graph(graph: onnx.ModelProto, file: Path) -> None:
    onnx.checker.check_model(graph)
    onnx.save(
        graph,
        str(file),
        # A protobuf ends at 2 GB: larger tables go into a file beside it.
        save_as_external_data=graph.ByteSize() > EXTERNAL_DATA_BYTES,
        location=f"{file.name}.data",
    )


def _write_side(draft: Path, side: str, table: pa.Table, config: Config) -> int:
    """Embed all users (items) and write keys, sorted, with embeddings in the same order."""
    schema = config.schema
    key = schema.user_key if side == "user" else schema.item_key
    features = schema.side("user" if side == "user" else "item")
    keys = _key_array(table[key])
    order = np.argsort(keys, kind="stable")
    session = onnxruntime.InferenceSession(
        str(draft / f"{side}_tower.onnx"), providers=["CPUExecutionProvider"]
    )
    folder = draft / f"{side}s"
    folder.mkdir()
    np.save(folder / "keys.npy", keys[order], allow_pickle=False)
    embeddings = [
        session.run(["embedding"], inputs)[0] for inputs in _blocks(table.take(order), features)
    ]
    np.save(folder / "embeddings.npy", np.concatenate(embeddings), allow_pickle=False)
    return len(keys)


def _blocks(table: pa.Table, features: tuple[Feature, ...]) -> Iterator[dict[str, NDArray[Any]]]:
    for start in range(0, table.num_rows, BLOCK):
        yield rows_to_inputs(features, table.slice(start, BLOCK))


def _key_array(column: pa.ChunkedArray) -> NDArray[Any]:
    """Return keys as they are stored: UTF-8 in a fixed-width byte array, or int64."""
    if pa.types.is_integer(column.type):
        return np.asarray(column.to_numpy(), dtype=np.int64)
    return np.array([key.encode() for key in column.to_pylist()], dtype=np.bytes_)


def _write_catalogue(folder: Path, items: pa.Table, features: Path, config: Config) -> None:
    """Write what is known of items beside their embeddings: titles and popularity."""
    keys = items[config.schema.item_key]
    order = np.argsort(_key_array(keys), kind="stable")
    counts = pq.read_table(features / "items.parquet", columns=["train_count"])["train_count"]
    # Rows of the encoded catalogue are those of the samples' catalogue.
    np.save(folder / "popularity.npy", counts.to_numpy()[order], allow_pickle=False)
    if "title" in items.column_names:
        titles = [(title or "").encode() for title in items["title"].take(order).to_pylist()]
        offsets = np.zeros(len(titles) + 1, dtype=np.int64)
        np.cumsum([len(title) for title in titles], out=offsets[1:])
        blob = np.frombuffer(b"".join(titles), dtype=np.uint8)
        np.save(folder / "titles.npy", blob, allow_pickle=False)
        np.save(folder / "titles_offsets.npy", offsets, allow_pickle=False)
