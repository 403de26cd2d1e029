"""Embedding tables: from the codes of a batch to one vector per feature and batch row.

A code is the row number of a value in its table. Outside of training, the model holds the tables.
In training, `hvdrec.embeddings.sharded` holds them, replicated on all ranks or sharded over them,
and each forward pass gets only the table rows that its batch needs (`BatchRows`).
"""

from __future__ import annotations

import keyword
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hvdrec.config.names import PREFIX, file_name
from hvdrec.config.schema import MISSING, Feature, Pooling, Schema

ATTENTION: tuple[Pooling, ...] = ("attention", "self-attention")
"""Poolings with learned weights. Lookups return the vector of each list entry; the model pools."""


@dataclass(frozen=True)
class SingleIndices:
    """The embedding row that each value uses, and the inverse mapping for the backward pass.

    Attributes:
        indices: Embedding row of each value, int32 [values].
        order: Positions of the values, sorted by embedding row, int32 [values].
        row_offsets: Index in `order` at which the positions of each embedding row begin, int32
            [embedding rows].
    """

    indices: Tensor
    order: Tensor
    row_offsets: Tensor


@dataclass(frozen=True)
class ListIndices:
    """The embedding rows that a feature's lists use, and the inverse mapping for the backward pass.

    There is one list for each batch row.

    Attributes:
        indices: Embedding row of each list entry, list after list, without padding, int32
            [entries].
        offsets: Index in `indices` at which each list begins, int32 [batch rows].
        divisors: Number by which the sum over each list is divided [batch rows, 1].
        batch_rows: Batch row of each entry, sorted by embedding row, int32 [entries].
        row_offsets: Index in `batch_rows` at which the entries of each embedding row begin, int32
            [embedding rows].
    """

    indices: Tensor
    offsets: Tensor
    divisors: Tensor
    batch_rows: Tensor
    row_offsets: Tensor


@dataclass(frozen=True)
class RowBlock:
    """The unique embedding rows of one width that a batch needs, and where it uses them.

    Attributes:
        vectors: The embedding rows [unique rows, width]. The first is zero, for missing values.
        single: Names of the features with one value per batch row. The name of a list feature that
            is not pooled is repeated once per list position, and each entry is looked up like a
            single value.
        values: The lookups of the values of `single`, one batch row after the other.
        lists: Name of a pooled list feature -> its lookups.
    """

    vectors: Tensor
    single: tuple[str, ...]
    values: SingleIndices
    lists: Mapping[str, ListIndices]

    def features(self) -> dict[str, Tensor]:
        """Return name of a feature -> its vectors, [rows, width].

        For a list that is not pooled, they are [rows, list length, width].
        """
        vectors: dict[str, Tensor] = {
            name: _PoolRows.apply(self.vectors, lists)  # type: ignore[no-untyped-call]
            for name, lists in self.lists.items()
        }
        if self.single:
            width = self.vectors.shape[1]
            # One matrix for all features, so a model that concatenates them copies nothing.
            matrix: Tensor = _TakeRows.apply(  # type: ignore[no-untyped-call]
                self.vectors, self.values, len(self.single)
            )
            lengths = {name: len(list(run)) for name, run in groupby(self.single)}
            columns = torch.split(matrix, [length * width for length in lengths.values()], 1)
            for (name, length), column in zip(lengths.items(), columns, strict=True):
                is_list = length > 1
                vectors[name] = column.reshape(len(column), length, width) if is_list else column
        return vectors


@dataclass(frozen=True)
class BatchRows:
    """The embedding rows of a batch, in one block for each width and placement of tables."""

    blocks: tuple[RowBlock, ...]

    def features(self) -> dict[str, Tensor]:
        """Look up all embedded features; see `RowBlock.features`."""
        return {name: v for block in self.blocks for name, v in block.features().items()}


class _TakeRows(torch.autograd.Function):
    """Take rows of a matrix and put `times` of them side by side in each row of the result.

    The backward pass sums the gradients of a row that was taken several times. It uses
    embedding_bag, which is faster than adding them one at a time.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, values: SingleIndices, times: int) -> Tensor:
        ctx.values, ctx.times = values, times
        taken = vectors.new_empty(len(values.indices) // times, times * vectors.shape[1])
        torch.index_select(vectors, 0, values.indices, out=taken.view(-1, vectors.shape[1]))
        return taken

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        width = gradients[0].shape[1] // ctx.times
        total = functional.embedding_bag(
            ctx.values.order, gradients[0].reshape(-1, width), ctx.values.row_offsets, mode="sum"
        )
        total[0] = 0.0  # MISSING
        return total, None, None


class _PoolRows(torch.autograd.Function):
    """Sum rows of a matrix over each list and divide the sum; both passes use embedding_bag."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, lists: ListIndices) -> Tensor:
        ctx.lists = lists
        total = functional.embedding_bag(lists.indices, vectors, lists.offsets, mode="sum")
        return total / lists.divisors.to(total.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        lists = ctx.lists
        shares = gradients[0] / lists.divisors.to(gradients[0].dtype)
        total = functional.embedding_bag(lists.batch_rows, shares, lists.row_offsets, mode="sum")
        return total, None


class EmbeddingTables(nn.Module):
    """The embedding tables of a model, shared by towers and ranker.

    A table has the name of the feature whose vocabulary it holds. Its row 0, for missing values and
    padding, is always zero.

    Args:
        schema: The features.
        sizes: Number of rows of each table.
        default_dimension: Width of a table whose feature sets none.
        pooling: How a list becomes one vector, by feature name; the mean by default.
        with_weights: Whether the module holds the tables; if not, `forward` needs `rows`.
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
                self.tables[module_key(name)] = nn.Embedding(
                    sizes[name], width, padding_idx=MISSING, _weight=weight
                )

    def weight(self, table: str) -> Tensor:
        """Return the weight of a table, [rows, width]."""
        embedding = self.tables[module_key(table)]
        assert isinstance(embedding, nn.Embedding)
        return embedding.weight

    def width(self, feature: Feature) -> int:
        """Return the width of a feature's vector: that of its table, or 1 for a plain number."""
        return self.dimensions[self.schema.vocabulary_of(feature)] if feature.is_embedded else 1

    def forward(
        self,
        features: Iterable[Feature],
        codes: Mapping[str, Tensor],
        rows: BatchRows | None = None,
    ) -> dict[str, Tensor]:
        """Look up features.

        Args:
            features: The features to look up.
            codes: Feature name -> int64 codes [rows]; for a list feature, codes [rows, list length]
                padded with 0; for a plain number, float [rows].
            rows: The embedding rows that the batch needs; None if this module holds the tables.

        Returns:
            Feature name -> vectors [rows, width]. Lists are pooled; a list without entries gives
            zeros. Lists for attention pooling are not pooled yet: their vectors are
            [rows, list length, width], with zeros at padding.
        """
        looked_up = rows.features() if rows is not None else {}
        return {
            feature.name: looked_up[feature.name]
            if feature.name in looked_up
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


def module_key(name: str) -> str:
    """Return the key for a feature in an `nn.ModuleDict`.

    A feature's name is not always a valid key: a ModuleDict refuses names of its own attributes,
    and PyTorch's exporter uses the keys as names in Python code.
    """
    is_free = (
        name.isidentifier()
        and not keyword.iskeyword(name)
        and unicodedata.is_normalized("NFKC", name)
        and not hasattr(nn.ModuleDict(), name)
    )
    return name if is_free else PREFIX + file_name(name)


def dimensions(schema: Schema, default: int) -> dict[str, int]:
    """Return the width of each embedding table; `default` if its feature sets none."""
    embedded = (feature for feature in schema.features if feature.is_embedded)
    owners = dict.fromkeys(schema.vocabulary_of(feature) for feature in embedded)
    return {name: schema[name].dimension or default for name in owners}


def pooled(codes: Tensor, weight: Tensor, *, root: bool = False) -> Tensor:
    """Pool the embeddings of each list into one vector; return [lists, width].

    Args:
        codes: Code of each list entry, int64 [lists, list length]; 0 is padding.
        weight: The embedding table [codes, width].
        root: Divide the sum over a list by the square root of its length, not by its length.
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
