"""Warm start: initialize linear towers from a linear autoencoder that is solved in closed form.

The autoencoder predicts whether a user took an item; its input is the user's other items. In
shapes, "codes" is the number of codes in the item vocabulary.
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
    """Initialize the item table and the last layers of the towers.

    All ranks must call this at the same time. Let D be the width of the towers' outputs. An item's
    embedding is then columns D + 1 to 2D of the item's row in the item table. A user's embedding
    is the pooled first D columns of the rows of the items in the user's history. The inner product
    of both is the best approximation of rank D to the scores of `item_item_weights`. Other features
    have no influence until training changes their weights.

    Args:
        config: Configuration of the run.
        size: Number of codes of the item vocabulary.
        model: Model whose towers are linear.
        tables: The embedding tables, including that of items.
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
    """Compute the two vectors of each item code, float32 [codes, 2 * width]."""
    taken = _taken(config, size)
    weights = item_item_weights(taken, config.train.warm_start)
    user, item = factors(taken, weights, width, config.seed)
    # Scale the logits so that they predict left-out items best. Give the vectors for users and for
    # items the same norm.
    scale = _best_scale(taken, user, item, config.seed) * config.train.temperature
    norms = np.linalg.norm(user), np.linalg.norm(item)
    balance = math.sqrt(scale / (norms[0] * norms[1] or 1.0))
    both = np.concatenate([user * (norms[1] * balance), item * (norms[0] * balance)], axis=1)
    return np.asarray(both, dtype=np.float32)


def item_item_weights(taken: Any, warm: WarmStart) -> Array:
    """Compute the item-item weights of a denoising linear autoencoder, float32 [codes, codes].

    They minimize, with an L2 penalty, the squared error of predicting each entry of a user's row
    from the other entries, each of which is kept with probability 1 - dropout. A user with n items
    has the weight w = n^-user_power. Let G = taken' diag(w) taken and
    P = (G + dropout / (1 - dropout) diag(G) + l2 I)^-1. Then weights = I - P / diag(P), which has
    a diagonal of 0.

    Source: Steck, "Autoencoders that don't overfit towards the identity", NeurIPS 2020 (EDLAE).
    Without dropout and user weights it is EASE (Steck, WWW 2019).

    Args:
        taken: Sparse matrix [users, codes] with 1 for each item that a user took.
        warm: The ``[train.warm_start]`` section.
    """
    sizes = np.maximum(np.asarray(taken.sum(1)).reshape(-1), 1.0)
    share = sizes**-warm.user_power
    # Scale the weights to a mean of 1 per positive, so that l2 means the same for any user_power.
    share *= taken.nnz / max(float((share * sizes).sum()), 1e-12)
    gram = (taken.T @ sparse.diags(share) @ taken).toarray().astype(np.float64)
    return linear_weights(gram, warm.dropout / (1 - warm.dropout) * np.diag(gram) + warm.l2)


def factors(taken: Any, weights: Array, width: int, seed: int) -> tuple[Array, Array]:
    """Factor the item-item weights by a randomized SVD.

    Each item gets two vectors. Take the mean of the first vectors of a user's items. Its inner
    product with the second vector of an item is, up to a factor for each user, the best
    approximation of rank `width` to (taken @ weights) / sqrt(number of the user's items).

    Source: Halko, Martinsson and Tropp, SIAM Review 2011, algorithms 4.4 and 5.1.

    Returns:
        Vectors of taken items and vectors of items to score, float32 [codes, width] each.
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
    """Read the positive training rows as a sparse float32 matrix [users, item codes]."""
    features = config.paths.of("features")
    train = read_interactions(features, ["train"])
    codes = read_table(features / "items.parquet", [config.schema.item_key])[0].to_numpy()
    code = codes[train.item]
    # All missing items share one code and all rare items another, so these two codes are left out.
    chosen = (train.label * train.weight > 0) & (code >= FIRST_CODE)
    users = int(train.user.max(initial=-1)) + 1
    return user_item_matrix(train.user[chosen], code[chosen], users, size)


def _best_scale(taken: Any, user: Array, item: Array, seed: int) -> float:
    """Return the factor for inner products that minimizes the softmax loss of left-out items."""
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
    """Set the weights of the linear towers so that their outputs are the warm-started columns."""
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
