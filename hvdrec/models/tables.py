"""Embedding tables: codes in, one vector per feature and row out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from hvdrec.schema import MISSING, UNKNOWN, Feature, Schema

INITIAL_DEVIATION = 0.01
"""Standard deviation of a table's first values: small, so that rare rows say little."""


class EmbeddingTables(nn.Module):
    """The embedding tables of a model, shared by towers, history and ranker.

    ``sizes`` maps the name of a table (the feature that owns the vocabulary) to its rows; the row
    of code MISSING is zero and stays zero, so that missing values and padding add nothing.
    """

    def __init__(
        self,
        schema: Schema,
        sizes: Mapping[str, int],
        default_dimension: int,
        unknown_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.schema = schema
        self.unknown_rate = unknown_rate
        self.dimensions: dict[str, int] = {}
        embedded = [feature for feature in schema.features if feature.is_embedded]
        owners = {schema.vocabulary_of(feature): None for feature in embedded}
        self.tables = nn.ModuleDict()
        for name in owners:
            dimension = schema[name].dimension or default_dimension
            table = nn.Embedding(sizes[name], dimension, padding_idx=MISSING)
            nn.init.normal_(table.weight, std=INITIAL_DEVIATION)
            with torch.no_grad():
                # An unknown value says nothing until training says otherwise.
                table.weight[: UNKNOWN + 1] = 0.0
            self.tables[name] = table
            self.dimensions[name] = dimension

    def weights(self) -> list[nn.Parameter]:
        """Return the tables themselves, [rows, width] each."""
        return list(self.tables.parameters())

    def width(self, feature: Feature) -> int:
        """Return the width of a feature's vector: its table's, or 1 for a number."""
        return self.dimensions[self.schema.vocabulary_of(feature)] if feature.is_embedded else 1

    def forward(
        self, features: Iterable[Feature], codes: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Look up features.

        ``codes[name]`` is int64 [N] or [N, L] (lists; 0 pads), or float [N] for a number.
        Returns name -> [N, width]; a list is the mean over its entries, zero if it has none.
        """
        return {feature.name: self._vector(feature, codes[feature.name]) for feature in features}

    def _vector(self, feature: Feature, code: Tensor) -> Tensor:
        if not feature.is_embedded:
            return code.unsqueeze(-1)
        table = self.tables[self.schema.vocabulary_of(feature)]
        assert isinstance(table, nn.Embedding)
        if feature.is_list:
            return pooled(code, table.weight)
        if self.training and self.unknown_rate > 0 and feature.kind == "categorical":
            replaced = (torch.rand(code.shape, device=code.device) < self.unknown_rate) & (
                code != MISSING
            )
            code = torch.where(replaced, UNKNOWN, code)
        return functional.embedding(code, table.weight, padding_idx=MISSING)


def pooled(codes: Tensor, weight: Tensor) -> Tensor:
    """Return the mean of the rows ``weight[codes]`` over the entries that are not padding.

    codes: int64 [N, L], 0 is padding; weight: [rows, width]. Returns [N, width], zero for an
    empty list.
    """
    if torch.compiler.is_exporting():
        present = (codes != MISSING).unsqueeze(-1).to(weight.dtype)
        total = (functional.embedding(codes, weight) * present).sum(dim=1)
        return total / present.sum(dim=1).clamp(min=1)
    return functional.embedding_bag(codes, weight, mode="mean", padding_idx=MISSING)
