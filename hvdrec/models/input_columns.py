"""Name the input columns of a model's layers, to move weights to a model with other features.

Towers and ranker read their features side by side, so a feature that is added or removed changes
the width of their first layers. Each block of columns is named after its content, such as a
feature; blocks of the same name match.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hvdrec.config.schema import Feature
from hvdrec.models.recommender import Recommender
from hvdrec.models.tasks import TaskRanker

Blocks = Sequence[tuple[str, int]]
"""Name and number of columns of each block of columns, in their order."""
Axes = Mapping[str, Mapping[int, Blocks]]
"""Name of a parameter -> axis -> blocks along this axis."""


def input_axes(model: Recommender) -> Axes:
    """Return the axes of parameters whose length depends on the features, with their blocks."""
    axes: dict[str, dict[int, Blocks]] = {}
    for side, tower in (("user", model.user_tower), ("item", model.item_tower)):
        if tower is not None:
            first = "hidden.0" if len(tower.hidden) else "head"
            features = model.schema.side("user" if side == "user" else "item")
            axes[f"{side}_tower.{first}.weight"] = {1: _vectors(model, features)}
    if model.ranker is None:
        return axes
    inputs = _ranker_inputs(model)
    crossed: Blocks = []
    if model.ranker.cross is not None:
        crossed = _prefixed("crossed", inputs)
        for layer in range(len(model.ranker.cross.layers)):
            axes[f"ranker.cross.layers.{layer}.weight"] = {0: inputs, 1: inputs}
            axes[f"ranker.cross.layers.{layer}.bias"] = {0: inputs}
    if isinstance(model.ranker, TaskRanker):
        axes["ranker.first.weight"] = {1: inputs}
        for task, head in enumerate(model.ranker.heads):
            width = next(head.parameters()).shape[1] - sum(width for _, width in crossed)
            axes[f"ranker.heads.{task}.0.weight"] = {1: [*crossed, ("deep", width)]}
    elif len(model.ranker.hidden):
        axes["ranker.hidden.0.weight"] = {1: inputs}
        deep = ("deep", model.ranker.hidden.output_width)
        axes["ranker.head.weight"] = {1: [*crossed, deep]}
    else:
        axes["ranker.head.weight"] = {1: [*crossed, *_prefixed("deep", inputs)]}
    return axes


def moved(tensor: Tensor, before: Mapping[int, Blocks], now: Mapping[int, Blocks]) -> Tensor:
    """Move the columns of a tensor to their positions in another model; new columns are zero.

    Args:
        tensor: A parameter of the earlier model, or a tensor of its shape.
        before: Axis -> blocks of the earlier model.
        now: The same axes -> blocks of the new model.
    """
    for axis, blocks in now.items():
        source = torch.tensor(_sources(before[axis], blocks), device=tensor.device)
        taken = tensor.index_select(axis, source.clamp(min=0))
        shape = [1] * tensor.ndim
        shape[axis] = -1
        tensor = taken * (source >= 0).to(tensor.dtype).view(shape)
    return tensor


def _sources(before: Blocks, now: Blocks) -> list[int]:
    """Return the earlier position of each column; -1 for the columns of new blocks."""
    starts, position = {}, 0
    for name, width in before:
        starts[name] = position
        position += width
    return [
        starts[name] + column if name in starts else -1
        for name, width in now
        for column in range(width)
    ]


def _ranker_inputs(model: Recommender) -> list[tuple[str, int]]:
    """Return the blocks of the ranker's input, as `Recommender.combine` joins them."""
    width, schema = model.output_width, model.schema
    names = [feature.name for feature in (*model.user_direct, *model.item_direct)]
    pairs = schema.matched(names) if model.matches else []
    return [
        ("user tower", width),
        *_prefixed("direct", _vectors(model, model.user_direct)),
        ("item tower", width),
        *_prefixed("direct", _vectors(model, model.item_direct)),
        ("product", width),
        *((f"match {user} {item}", 1) for user, item in pairs),
        *_prefixed("scene", _vectors(model, schema.side("scene"))),
        ("heads", model.heads**2),
    ]


def _vectors(model: Recommender, features: Sequence[Feature]) -> list[tuple[str, int]]:
    return [(feature.name, model.tables.width(feature)) for feature in features]


def _prefixed(prefix: str, blocks: Blocks) -> list[tuple[str, int]]:
    return [(f"{prefix} {name}", width) for name, width in blocks]
