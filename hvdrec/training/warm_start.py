"""Warm start: linear towers from the closed form of a linear autoencoder of users' items.

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
from hvdrec.errors import invalid_value
from hvdrec.evaluation.held_out import read_interactions
from hvdrec.evaluation.item_item import linear_weights
from hvdrec.evaluation.retrieval import user_item_matrix
from hvdrec.models.recommender import Recommender
from hvdrec.parallel import ranks
from hvdrec.parallel.gradients import broadcast_state
from hvdrec.storage.parquet import read_table

Array = NDArray[Any]
OVERSAMPLING = 32
POWER_STEPS = 6
CALIBRATION_USERS = 1024
SCALES = 2.0 ** np.arange(-4, 17)


def warm_start(config: Config, size: int, model: Recommender, tables: DistributedTables) -> None:
    """Initialize the item table and the towers' heads; every rank must call this together.

    The user embedding is then the pooled first D columns of the history's rows, the item embedding
    the next D columns of the item's row. Their inner product is the best approximation of rank D to
    the scores of `item_item_weights`. Other features start without influence.

    Args:
        config: The run.
        size: Number of codes of the item vocabulary.
        model: Its towers are linear.
        tables: Hold the item table.
    """
    width = model.output_width
    computed = ranks.run_on_all(
        lambda: _item_rows(config, size, width) if tables.world.is_first else None
    )
    rows = torch.zeros(size, 2 * width) if computed is None else torch.from_numpy(computed)
    broadcast_state({"warm_start": rows})
    key = config.schema.item_key
    group = next(group for group in tables.groups if key in group.sizes)
    local_ids = torch.from_numpy(group.local_ids(key, tables.world.rank))
    weight, _ = tables.table(key)
    weight[:, : 2 * width] = rows[local_ids].to(weight)
    _pass_through(model, config.train.warm_start.history, key, width)


def check_size(config: Config, size: int) -> None:
    """Raise UserError if an item vocabulary of `size` codes is too large for a warm start."""
    limit = config.train.warm_start.max_items
    if size > limit:
        raise invalid_value(
            "train.warm_start.max_items",
            limit,
            f"'{config.samples.item}' has {size} codes, for which the closed form needs "
            f"{16e-9 * size**2:.0f} GB",
            "raise it, raise the feature's min_count, or remove train.warm_start",
        )


def _item_rows(config: Config, size: int, width: int) -> Array:
    """Compute the two vectors of each code, float32 [V, 2 D]."""
    taken = _taken(config, size)
    weights = item_item_weights(taken, config.train.warm_start)
    user, item = factors(taken, weights, width, config.seed)
    # Training starts with the scale of logits that predicts left-out items best, and with the same
    # norm on both sides.
    scale = _best_scale(taken, user, item, config.seed) * config.train.temperature
    norms = np.linalg.norm(user), np.linalg.norm(item)
    balance = math.sqrt(scale / (norms[0] * norms[1] or 1.0))
    both = np.concatenate([user * (norms[1] * balance), item * (norms[0] * balance)], axis=1)
    return np.asarray(both, dtype=np.float32)


def item_item_weights(taken: Any, warm: WarmStart) -> Array:
    """Compute the item-item weights of a denoising linear autoencoder, float32 [V, V].

    They minimize the squared error of predicting each entry of a user from the user's other
    entries, each kept with probability 1 - dropout, with an L2 penalty. A user with n items has
    weight n^-user_power. With G = taken' diag(w) taken and
    P = (G + dropout / (1 - dropout) diag(G) + l2 I)^-1: weights = I - P / diag(P), so the diagonal
    is 0.

    Source: Steck, "Autoencoders that don't overfit towards the identity", NeurIPS 2020 (EDLAE).
    Without dropout and user weights it is EASE (Steck, WWW 2019).

    Args:
        taken: Sparse [U, V], 1 for the items that a user took.
        warm: The ``[train.warm_start]`` section.
    """
    sizes = np.maximum(np.asarray(taken.sum(1)).reshape(-1), 1.0)
    share = sizes**-warm.user_power
    # The mean weight of a positive is 1, so l2 does not depend on user_power.
    share *= taken.nnz / max(float((share * sizes).sum()), 1e-12)
    gram = (taken.T @ sparse.diags(share) @ taken).toarray().astype(np.float64)
    return linear_weights(gram, warm.dropout / (1 - warm.dropout) * np.diag(gram) + warm.l2)


def factors(taken: Any, weights: Array, width: int, seed: int) -> tuple[Array, Array]:
    """Factor the item-item weights by a randomized SVD.

    The mean of the first vectors over a user's items, times the second vector of an item, is the
    best approximation of rank D to (taken @ weights) / sqrt(number of the user's items), up to a
    factor per user.

    Source: Halko, Martinsson and Tropp, SIAM Review 2011, algorithms 4.4 and 5.1.

    Returns:
        Vectors of taken items, float32 [V, D], and of items to score, float32 [V, D].
    """
    from scipy import linalg  # slow to import, and only the first rank needs it

    sizes = np.maximum(np.asarray(taken.sum(1)).reshape(-1), 1.0)
    scaled = (sparse.diags(1 / np.sqrt(sizes)) @ taken).astype(np.float32)
    random = np.random.default_rng(seed)
    columns = min(width + OVERSAMPLING, *weights.shape)
    basis = random.standard_normal((weights.shape[0], columns)).astype(np.float32)
    for _ in range(POWER_STEPS):
        scores = scaled @ (weights @ np.linalg.qr(basis)[0])
        basis = weights.T @ (scaled.T @ scores)
    basis = np.linalg.qr(basis)[0]
    _, _, rotation = linalg.svd(scaled @ (weights @ basis), full_matrices=False)
    item = np.zeros((weights.shape[0], width), dtype=np.float32)
    vectors = (basis @ rotation.T)[:, :width]
    item[:, : vectors.shape[1]] = vectors
    return weights @ item, item


def _taken(config: Config, size: int) -> Any:
    """Read the training positives as a sparse float32 matrix [U, V] over item codes."""
    features = config.paths.of("features")
    train = read_interactions(features, ["train"])
    codes = read_table(features / "items.parquet", [config.schema.item_key])[0].to_numpy()
    code = codes[train.item]
    # All missing items share a code, and so do all rare items: such codes tell nothing.
    chosen = (train.label * train.weight > 0) & (code >= FIRST_CODE)
    users = int(train.user.max(initial=-1)) + 1
    return user_item_matrix(train.user[chosen], code[chosen], users, size)


def _best_scale(taken: Any, user: Array, item: Array, seed: int) -> float:
    """Return the factor of inner products with the least softmax loss of left-out items."""
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


def _pass_through(model: Recommender, history: str, item: str, width: int) -> None:
    """Let the linear towers pass the warm-started columns through."""
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
