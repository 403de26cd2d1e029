"""Towers in closed form: a linear autoencoder of users' items, of a rank that towers can hold.

Shapes: U users, V codes of the item vocabulary, D the towers' output width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from hvdrec.config import Config
from hvdrec.config.schema import FIRST_CODE
from hvdrec.config.sections import WarmStart
from hvdrec.embeddings.sharded import DistributedTables
from hvdrec.errors import UserError
from hvdrec.evaluation.held_out import read_interactions
from hvdrec.evaluation.item_item import linear_weights
from hvdrec.evaluation.retrieval import user_item_matrix
from hvdrec.models.recommender import Recommender
from hvdrec.parallel import ranks
from hvdrec.parallel.gradients import broadcast_state
from hvdrec.storage.urls import read_table

Array = NDArray[Any]
OVERSAMPLING = 32
POWER_STEPS = 6
CALIBRATION_USERS = 1024
SCALES = 2.0 ** np.arange(-4, 17)


def warm_start(config: Config, size: int, model: Recommender, tables: DistributedTables) -> None:
    """Set the item table and the towers' heads; every rank must call this, before training.

    size: codes of the item vocabulary. The user tower then gives the pooled first D columns of
    the history's rows, the item tower the next D columns of the item's row, and their inner product
    ranks items as `item_item_weights` does, as far as rank D can. Other features begin without
    influence.
    """
    width = model.output_width
    first = ranks.run_on_all(
        lambda: (
            _rows(config, size, width)
            if tables.world.is_first
            else np.zeros((size, 2 * width), np.float32)
        )
    )
    rows = torch.from_numpy(first)
    broadcast_state({"warm_start": rows})
    key = config.schema.item_key
    group = next(group for group in tables.groups if key in group.sizes)
    weight, _ = tables.table(key)
    weight[:, : 2 * width] = rows[torch.from_numpy(group.local_ids(key, tables.world.rank))].to(
        weight
    )
    _take_over(model, config.train.warm_start.history, key, width)


def check_size(config: Config, size: int) -> None:
    """Raise UserError if the item vocabulary of `size` codes is too large for a warm start."""
    warm = config.train.warm_start
    if size > warm.max_items:
        raise UserError(
            f"train.warm_start.max_items = {warm.max_items}: '{config.samples.item}' has {size} "
            f"codes, a closed form would take {16e-9 * size**2:.0f} GB; raise it, raise the "
            "feature's min_count, or leave train.warm_start out"
        )


def _rows(config: Config, size: int, width: int) -> Array:
    """Return the two vectors of each code, float32 [V, 2 D]."""
    taken = _taken(config, size)
    weights = item_item_weights(taken, config.train.warm_start)
    user, item = factors(taken, weights, width, config.seed)
    # Training begins with the scale of logits that suits left-out items best; both sides are of
    # one norm.
    scale = _best_scale(taken, user, item, config.seed) * config.train.temperature
    norms = np.linalg.norm(user), np.linalg.norm(item)
    balance = math.sqrt(scale / (norms[0] * norms[1] or 1.0))
    both = np.concatenate([user * (norms[1] * balance), item * (norms[0] * balance)], axis=1)
    return np.asarray(both, dtype=np.float32)


def item_item_weights(taken: Any, warm: WarmStart) -> Array:
    """Return weights float32 [V, V] by which a user's items speak for others, 0 for themselves.

    taken: sparse [U, V], 1 for the items that a user took. They minimize the squared error of
    predicting each entry from the user's others, each kept with probability 1 - dropout, with
    an L2 penalty; a user with n items weighs n^-user_power. With G = taken' diag(w) taken and
    P = (G + dropout / (1 - dropout) diag(G) + l2 I)^-1: weights = I - P / diag(P).
    Source: Steck, "Autoencoders that don't overfit towards the identity", NeurIPS 2020 (EDLAE);
    without dropout and weights of users it is EASE (Steck, WWW 2019).
    """
    sizes = np.maximum(np.asarray(taken.sum(1)).reshape(-1), 1.0)
    share = sizes**-warm.user_power
    # On average a positive weighs 1, so that the penalty means the same.
    share *= taken.nnz / max(float((share * sizes).sum()), 1e-12)
    gram = (taken.T @ sparse.diags(share) @ taken).toarray().astype(np.float64)
    return linear_weights(gram, warm.dropout / (1 - warm.dropout) * np.diag(gram) + warm.l2)


def factors(taken: Any, weights: Array, width: int, seed: int) -> tuple[Array, Array]:
    """Return float32 [V, D] twice: vectors of taken items, and of items to be scored.

    (mean of the first over a user's items) . (the second) is the best approximation of rank D to
    (taken @ weights) / sqrt(a user's number of items), up to a factor per user.
    Source: Halko, Martinsson and Tropp, SIAM Review 2011, algorithms 4.4 and 5.1.
    """
    from scipy import linalg  # slow to import, and every rank would wait for it

    sizes = np.maximum(np.asarray(taken.sum(1)).reshape(-1), 1.0)
    scaled = (sparse.diags(1 / np.sqrt(sizes)) @ taken).astype(np.float32)
    random = np.random.default_rng(seed)
    columns = min(width + OVERSAMPLING, *weights.shape)
    basis = random.standard_normal((weights.shape[0], columns)).astype(np.float32)
    for _ in range(POWER_STEPS):
        scores = scaled @ (weights @ np.linalg.qr(basis)[0])
        basis = weights.T @ (scaled.T @ scores)
    basis = np.linalg.qr(basis)[0]
    _, _, turn = linalg.svd(scaled @ (weights @ basis), full_matrices=False)
    item = np.zeros((weights.shape[0], width), dtype=np.float32)
    found = (basis @ turn.T)[:, :width]
    item[:, : found.shape[1]] = found
    return weights @ item, item


def _taken(config: Config, size: int) -> Any:
    """Return the training positives as codes of the item vocabulary, sparse float32 [U, V]."""
    features = config.paths.of("features")
    train = read_interactions(features, ["train"])
    codes = read_table(features / "items.parquet", [config.schema.item_key])[0].to_numpy()
    code = codes[train.item]
    # Missing and rare items are one code each: they say nothing of each other.
    chosen = (train.label * train.weight > 0) & (code >= FIRST_CODE)
    users = int(train.user.max(initial=-1)) + 1
    return user_item_matrix(train.user[chosen], code[chosen], users, size)


def _best_scale(taken: Any, user: Array, item: Array, seed: int) -> float:
    """Return the factor of inner products that gives the least softmax loss of left-out items."""
    sizes = np.diff(taken.indptr)
    random = np.random.default_rng(seed)
    able = np.flatnonzero(sizes > 1)
    chosen = random.permutation(able)[:CALIBRATION_USERS]
    if not len(chosen):
        return 1.0
    offset = (random.random(len(chosen)) * sizes[chosen]).astype(np.int64)
    target = taken.indices[taken.indptr[chosen] + offset]
    vectors = (taken[chosen] @ user - user[target]) / (sizes[chosen] - 1)[:, None]
    scores = np.asarray(vectors @ item.T, dtype=np.float64)
    rows = taken[chosen].tocoo()
    own = scores[np.arange(len(chosen)), target]
    scores[rows.row, rows.col] = -np.inf
    scores[np.arange(len(chosen)), target] = own
    losses = []
    for scale in SCALES:
        logits = scale * scores
        top = logits.max(axis=1)
        total = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
        losses.append(float((total - scale * own).mean()))
    return float(SCALES[int(np.argmin(losses))])


def _take_over(model: Recommender, history: str, item: str, width: int) -> None:
    """Let the towers hand on what the warm start has put into the tables."""
    sides = ((model.user_tower, "user", history, 0), (model.item_tower, "item", item, width))
    for tower, side, name, first in sides:
        assert tower is not None
        start = first
        for feature in model.schema.side("user" if side == "user" else "item"):
            if feature.name == name:
                break
            start += model.tables.width(feature)
        with torch.no_grad():
            tower.head.weight.zero_()
            tower.head.bias.zero_()
            tower.head.weight[:, start : start + width] = torch.eye(width)
