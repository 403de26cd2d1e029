"""The scorer: a bundle, opened once and shared by all threads of a service."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from hvdrec.scoring.bundle import BundleInfo, read_array, read_bundle
from hvdrec.scoring.errors import BundleError, RequestError
from hvdrec.scoring.inputs import check_names, column, key_value, rows_to_inputs
from hvdrec.scoring.store import EmbeddingStore

Array = NDArray[Any]
Key = str | int
Raw = Mapping[str, Any]
BLOCK_ROWS = 4096
RETRIEVAL_BLOCK = 262_144


@dataclass(frozen=True)
class Recommendation:
    """A ranked item: its key, the ranker's score, the towers' score, its title where there is one."""

    item: Key
    score: float
    retrieval_score: float
    title: str | None = None


class Scorer:
    """Scores and recommends items from a bundle; made by `load`, safe to share between threads."""

    def __init__(self, info: BundleInfo, sessions: dict[str, Any]) -> None:
        self.info = info
        self._sessions = sessions
        self._users = EmbeddingStore(info.path, "user", info.user_width)
        self._items = EmbeddingStore(info.path, "item", info.item_width)
        self._scene_fields = info.side("scene")
        self._scene_names = [field.name for field in self._scene_fields]
        self._popularity: Array | None = _optional(info.path, "items/popularity.npy")
        self._titles: Array | None = _optional(info.path, "items/titles.npy")
        self._title_offsets: Array | None = _optional(info.path, "items/titles_offsets.npy")

    @classmethod
    def load(cls, path: str | Path, *, threads: int = 1, verify: bool = False) -> Scorer:
        """Open a bundle.

        threads: of one graph run (a service with many request threads wants 1); verify: compare
        every file's checksum. Raises BundleError if the bundle is missing, damaged or too new.
        """
        info = read_bundle(Path(path), verify=verify)
        names = ("user_tower", "item_tower", "ranker")
        return cls(info, {name: _session(info.path / f"{name}.onnx", threads) for name in names})

    @property
    def users(self) -> int:
        """Return the number of stored users."""
        return len(self._users)

    @property
    def items(self) -> int:
        """Return the number of stored items."""
        return len(self._items)

    def score(self, user: Key | Raw, items: Sequence[Key | Raw], scene: Raw | None = None) -> Array:
        """Return a probability for each item, float32 [n], in the order given.

        user: a key, or the raw features of a user (with or without the key); items: keys, or raw
        features of items; scene: what is known of the request. A key that is not stored goes through
        its tower as unknown; what is left out is missing, or takes the scene field's default.
        Raises RequestError for an unknown field or a value of the wrong type.
        """
        if isinstance(items, str | bytes | Mapping):
            raise RequestError(f"items = {items!r}: must be a list of items")
        scene_inputs = self._scene_inputs(scene)
        user_embedding = self.embed_user(user)[None, :]
        if not len(items):
            return np.empty(0, dtype=np.float32)
        return self._rank(user_embedding, self.embed_items(items), scene_inputs)

    def score_rows(
        self,
        users: Sequence[Key | Raw],
        items: Sequence[Key | Raw],
        scenes: Mapping[str, Sequence[Any]] | None = None,
    ) -> Array:
        """Return a probability for each row, float32 [n]: users[i], items[i], scenes[name][i]."""
        scenes = scenes or {}
        check_names(scenes, self._scene_names, "scene")
        lengths = {len(users), len(items), *(len(values) for values in scenes.values())}
        if len(lengths) > 1:
            raise RequestError(
                f"rows: users, items and scenes differ in length ({sorted(lengths)})"
            )
        scores = [np.empty(0, dtype=np.float32)]
        for start in range(0, len(users), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            rows = len(users[part])
            inputs = {
                f.name: column(f, scenes[f.name][part] if f.name in scenes else [f.default] * rows)
                for f in self._scene_fields
            }
            embedded = self._embed("user", users[part])
            scores.append(self._rank(embedded, self._embed("item", items[part]), inputs))
        return np.concatenate(scores)

    def recommend(
        self,
        user: Key | Raw,
        scene: Raw | None = None,
        k: int = 10,
        *,
        candidates: int = 500,
        exclude: Collection[Key] = (),
    ) -> list[Recommendation]:
        """Return the k best items, best first.

        The `candidates` (at least k) items whose embeddings have the largest inner product with the
        user's are retrieved, exactly, and ranked in the scene; `exclude` lists keys to leave out.
        """
        for name, value in (("k", k), ("candidates", candidates)):
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
                raise RequestError(f"{name} = {value!r}: must be a whole number from 1")
        scene_inputs = self._scene_inputs(scene)
        excluded = [key_value(key, self._items.dtype, "exclude") for key in exclude]
        embedding = self.embed_user(user)
        rows, retrieval = self._retrieve(embedding, max(k, candidates), excluded)
        if not len(rows):
            return []
        scores = self._rank(embedding[None, :], self._items.embeddings[rows], scene_inputs)
        # Rows are in the order of keys: equal scores are told apart by key.
        best = np.lexsort((rows, -scores))[:k]
        return [
            Recommendation(
                self._items.key(int(rows[i])),
                float(scores[i]),
                float(retrieval[i]),
                self._title(int(rows[i])),
            )
            for i in best
        ]

    def embed_user(self, user: Key | Raw) -> Array:
        """Return a user's embedding, float32 [user_width]."""
        embedding: Array = self._embed("user", [user])[0]
        return embedding

    def embed_items(self, items: Sequence[Key | Raw]) -> Array:
        """Return items' embeddings, float32 [n, item_width]."""
        return self._embed("item", items)

    def title(self, item: Key) -> str | None:
        """Return a stored item's title, or None."""
        row = int(self._items.rows([key_value(item, self._items.dtype, "item")])[0])
        return self._title(row) if row >= 0 else None

    def key_dtype(self, side: str) -> str:
        """Return the type of user or item keys: "string" or "int"."""
        return (self._users if side == "user" else self._items).dtype

    def _embed(self, side: str, entries: Sequence[Key | Raw]) -> Array:
        """Take stored embeddings by key; send everything else through the tower."""
        store = self._users if side == "user" else self._items
        name = self.info.user_key if side == "user" else self.info.item_key
        fields = self.info.side(side)
        is_raw = [isinstance(entry, Mapping) for entry in entries]
        if not any(is_raw):
            keys = [key_value(entry, store.dtype, name) for entry in entries]
            rows = store.rows(keys)
            if rows.size and rows.min() >= 0:
                return np.asarray(store.embeddings[rows])
            raw: list[Raw] = [{name: keys[i]} for i in np.flatnonzero(rows < 0)]
        else:
            rows = np.full(len(entries), -1, dtype=np.int64)
            known = [*dict.fromkeys([name, *(field.name for field in fields)])]
            raw = []
            for i, entry in enumerate(entries):
                if isinstance(entry, Mapping):
                    check_names(entry, known, side)
                    raw.append(entry)
                    continue
                key = key_value(entry, store.dtype, name)
                rows[i] = store.rows([key])[0]
                if rows[i] < 0:
                    raw.append({name: key})
        width = self.info.user_width if side == "user" else self.info.item_width
        out = np.empty((len(entries), width), dtype=np.float32)
        stored = rows >= 0
        out[stored] = store.embeddings[rows[stored]]
        if raw:
            inputs = rows_to_inputs(fields, raw)
            out[~stored] = self._sessions[f"{side}_tower"].run(["embedding"], inputs)[0]
        return out

    def _rank(self, user: Array, items: Array, scene: dict[str, Array]) -> Array:
        inputs = {"user_embedding": user, "item_embedding": items, **scene}
        scores: Array = self._sessions["ranker"].run(["score"], inputs)[0]
        return scores

    def _scene_inputs(self, scene: Raw | None) -> dict[str, Array]:
        scene = scene or {}
        check_names(scene, self._scene_names, "scene")
        return {
            field.name: column(field, [scene.get(field.name, field.default)])
            for field in self._scene_fields
        }

    def _retrieve(self, user: Array, count: int, excluded: list[Key]) -> tuple[Array, Array]:
        """Return rows and retrieval scores of the best `count` items, rows ascending."""
        mask = self._items.all_rows_but(excluded)
        width = self.info.retrieval_width
        if width:
            vectors = self._items.embeddings
            scores = np.empty(len(vectors), dtype=np.float32)
            for start in range(0, len(vectors), RETRIEVAL_BLOCK):
                part = slice(start, start + RETRIEVAL_BLOCK)
                np.dot(vectors[part, :width], user[:width], out=scores[part])
        elif self._popularity is not None:
            # Towers that were not trained to retrieve: candidates are the most popular items.
            scores = self._popularity.astype(np.float32)
        else:
            scores = np.zeros(len(self._items), dtype=np.float32)
        if mask is not None:
            scores[~mask] = -np.inf
        count = min(count, len(scores) if mask is None else int(mask.sum()))
        if count == 0:
            return np.empty(0, np.int64), scores[:0]
        rows = np.sort(np.argpartition(-scores, count - 1)[:count])
        return rows, scores[rows]

    def _title(self, row: int) -> str | None:
        if self._titles is None or self._title_offsets is None:
            return None
        start, stop = self._title_offsets[row], self._title_offsets[row + 1]
        return bytes(self._titles[start:stop]).decode() or None


def _optional(path: Path, name: str) -> Array | None:
    return read_array(path, name) if (path / name).is_file() else None


def _session(file: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Waiting threads of an idle service should sleep.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many kinds, without a common base
        raise BundleError(f"{file}: no readable graph ({error}); export the bundle again") from None
