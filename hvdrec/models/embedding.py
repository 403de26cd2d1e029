"""Embedding tables: codes in, one vector per feature and row out.

A model that is evaluated or exported by one process holds its tables itself. In training they are
held by `hvdrec.embeddings.sharded`, whole or in shards, and the model is given the rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hvdrec.config.schema import MISSING, Feature, Pooling, Schema

ATTENTION: tuple[Pooling, ...] = ("attention", "self-attention")
"""Pooling that is left to the model, which is given each entry's vector."""


@dataclass(frozen=True)
class Values:
    """E values, in both directions.

    places: int32 [E], their table rows; order: int32 [E], the values sorted by table row;
    row_starts: int32 [R], where each table row's begin in that order.
    """

    places: Tensor
    order: Tensor
    row_starts: Tensor


@dataclass(frozen=True)
class Lists:
    """The entries of a list feature of N rows, without padding, in both directions.

    places: int32 [E], the entries' table rows, row by row; starts: int32 [N], where each row's
    begin; divisors: [N, 1], what the sum over a row's entries is divided by. rows: int32 [E], the
    same entries sorted by table row, as the rows that hold them; row_starts: int32 [R], where each
    table row's begin.
    """

    places: Tensor
    starts: Tensor
    divisors: Tensor
    rows: Tensor
    row_starts: Tensor


@dataclass(frozen=True)
class Block:
    """Rows of tables of one width, each once, and the places at which a batch's features find them.

    vectors: [R, width]; its row 0 is zero and stands for MISSING. single: the names of F features
    with one value, and values: F of each of N rows, row by row; a name that stands there L times in
    a row is a list whose entries are wanted one by one. lists: other features with many values.
    """

    vectors: Tensor
    single: tuple[str, ...]
    values: Values
    lists: Mapping[str, Lists]

    def features(self) -> dict[str, Tensor]:
        """Return name -> [N, width], a list's entries summed over its divisor; or [N, L, width]."""
        found: dict[str, Tensor] = {
            name: _Pool.apply(self.vectors, lists)  # type: ignore[no-untyped-call]
            for name, lists in self.lists.items()
        }
        if self.single:
            width = self.vectors.shape[1]
            # Of all features side by side, so that a model that joins them has nothing to copy.
            taken: Tensor = _Take.apply(  # type: ignore[no-untyped-call]
                self.vectors, self.values, len(self.single)
            )
            lengths = {name: len(list(run)) for name, run in groupby(self.single)}
            columns = torch.split(taken, [length * width for length in lengths.values()], 1)
            for (name, length), column in zip(lengths.items(), columns, strict=True):
                is_list = length > 1
                found[name] = column.reshape(len(column), length, width) if is_list else column
        return found


@dataclass(frozen=True)
class Rows:
    """The table rows of a batch, in one block for each width (and placement) of tables."""

    blocks: tuple[Block, ...]

    def features(self) -> dict[str, Tensor]:
        """Return name -> [N, width] of every embedded feature."""
        return {name: v for block in self.blocks for name, v in block.features().items()}


class _Take(torch.autograd.Function):
    """Rows of a matrix, `times` of them side by side in each row of what is returned.

    Backwards it is a sum over lists, which is faster than adding row by row.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, values: Values, times: int) -> Tensor:
        ctx.values, ctx.times = values, times
        taken = vectors.new_empty(len(values.places) // times, times * vectors.shape[1])
        torch.index_select(vectors, 0, values.places, out=taken.view(-1, vectors.shape[1]))
        return taken

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        width = gradients[0].shape[1] // ctx.times
        total = functional.embedding_bag(
            ctx.values.order, gradients[0].reshape(-1, width), ctx.values.row_starts, mode="sum"
        )
        total[0] = 0.0  # MISSING
        return total, None, None


class _Pool(torch.autograd.Function):
    """Sums over lists of rows of a matrix, over their divisors; backwards it is such a sum, too."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, lists: Lists) -> Tensor:
        ctx.lists = lists
        total = functional.embedding_bag(lists.places, vectors, lists.starts, mode="sum")
        return total / lists.divisors.to(total.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        lists = ctx.lists
        shares = gradients[0] / lists.divisors.to(gradients[0].dtype)
        return functional.embedding_bag(lists.rows, shares, lists.row_starts, mode="sum"), None


class EmbeddingTables(nn.Module):
    """The embedding tables of a model, shared by towers, history and ranker.

    ``sizes`` maps the name of a table (the feature that owns the vocabulary) to its rows; the row
    of code MISSING is zero and stays zero, so that missing values and padding add nothing. Without
    ``with_weights`` there is nothing in it: each call must then bring the rows.
    """

    def __init__(
        self,
        schema: Schema,
        sizes: Mapping[str, int],
        default_dimension: int,
        *,
        pooling: Mapping[str, Pooling] | None = None,
        with_weights: bool = True,
    ) -> None:
        super().__init__()
        self.schema = schema
        self.pooling = pooling or {}
        self.dimensions = dimensions(schema, default_dimension)
        self.sizes = {name: sizes[name] for name in self.dimensions}
        self.tables = nn.ModuleDict()
        if with_weights:
            for name, width in self.dimensions.items():
                weight = torch.zeros(sizes[name], width)
                self.tables[name] = nn.Embedding(
                    sizes[name], width, padding_idx=MISSING, _weight=weight
                )

    def weight(self, table: str) -> Tensor:
        """Return a table that is held here, [rows, width]."""
        held = self.tables[table]
        assert isinstance(held, nn.Embedding)
        return held.weight

    def width(self, feature: Feature) -> int:
        """Return the width of a feature's vector: its table's, or 1 for a number."""
        return self.dimensions[self.schema.vocabulary_of(feature)] if feature.is_embedded else 1

    def forward(
        self,
        features: Iterable[Feature],
        codes: Mapping[str, Tensor],
        rows: Rows | None = None,
    ) -> dict[str, Tensor]:
        """Look up features.

        ``codes[name]`` is int64 [N] or [N, L] (lists; 0 pads), or float [N] for a number.
        Returns name -> [N, width]; a list is pooled, and zero if it has no entries, or where
        attention is to pool it [N, L, width], zero where it has no entry.
        """
        given = rows.features() if rows is not None else {}
        return {
            feature.name: given[feature.name]
            if feature.name in given
            else self._vector(feature, codes[feature.name])
            for feature in features
        }

    def _vector(self, feature: Feature, code: Tensor) -> Tensor:
        if not feature.is_embedded:
            return code.unsqueeze(-1)
        weight = self.weight(self.schema.vocabulary_of(feature))
        how = self.pooling.get(feature.name, "mean")
        if feature.is_list and how not in ATTENTION:
            return pooled(code, weight, root=how == "sqrt")
        return functional.embedding(code, weight, padding_idx=MISSING)


def dimensions(schema: Schema, default: int) -> dict[str, int]:
    """Return the width of each table, by the name of the feature that owns its vocabulary."""
    embedded = (feature for feature in schema.features if feature.is_embedded)
    owners = dict.fromkeys(schema.vocabulary_of(feature) for feature in embedded)
    return {name: schema[name].dimension or default for name in owners}


def pooled(codes: Tensor, weight: Tensor, *, root: bool = False) -> Tensor:
    """Return the mean of the rows ``weight[codes]`` over the entries that are not padding.

    codes: int64 [N, L], 0 is padding; weight: [rows, width]; root: divide by the square root of
    their number instead. Returns [N, width], zero for an empty list.
    """
    if not (root or torch.compiler.is_exporting()):
        return functional.embedding_bag(codes, weight, mode="mean", padding_idx=MISSING)
    present = (codes != MISSING).unsqueeze(-1).to(weight.dtype)
    count = present.sum(dim=1).clamp(min=1)
    if torch.compiler.is_exporting():
        total = (functional.embedding(codes, weight) * present).sum(dim=1)
    else:
        total = functional.embedding_bag(codes, weight, mode="sum", padding_idx=MISSING)
    return total / (count.sqrt() if root else count)
