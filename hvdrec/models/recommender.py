"""The model: a user tower, an item tower, and a ranker on top of them.

The *scene* is the context of a request: time, place, device, placement. It enters only the ranker.
A *side* is user, item or scene. *Direct* features feed the ranker as well as a tower.
A *task* is one of several labels to predict.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional

from hvdrec.config.data_sections import Task
from hvdrec.config.schema import SIDES, Feature, Schema
from hvdrec.config.sections import Model, Ranker, Tower
from hvdrec.models.cpu_layers import Dropout, joined
from hvdrec.models.embedding import ATTENTION, BatchRows, EmbeddingTables, module_key
from hvdrec.models.layers import (
    AttentionPooling,
    CrossNetwork,
    Mlp,
    SelfAttentionPooling,
    head_products,
)
from hvdrec.models.tasks import TaskRanker, combined_score

Codes = Mapping[str, Tensor]
"""Feature name -> int64 codes [rows]; for a list feature, codes [rows, list length] padded with 0;
for a plain number, its values [rows]."""
POOLS = {"attention": AttentionPooling, "self-attention": SelfAttentionPooling}


@dataclass(frozen=True)
class Output:
    """The result of a forward pass over a batch.

    Attributes:
        user: Embedding of each row's user [rows, width].
        item: Embedding of each row's item [rows, width].
        logit: Logit of the label [rows], or of each task [rows, tasks] if the model has tasks.
    """

    user: Tensor
    item: Tensor
    logit: Tensor


@dataclass(frozen=True)
class Match:
    """A direct user feature and a direct item feature that share an embedding table.

    The ranker gets the inner product of their vectors.

    Attributes:
        user: First column of the user feature's vector in a user's representation.
        item: First column of the item feature's vector in an item's representation.
        width: Number of columns of each vector.
    """

    user: int
    item: int
    width: int


class TowerNetwork(nn.Module):
    """A tower: an MLP that maps the joined vectors of all user (or item) features to embeddings."""

    def __init__(self, width: int, shape: Tower) -> None:
        super().__init__()
        self.normalize = shape.normalize
        self.input_dropout = Dropout(shape.input_dropout)
        self.hidden = Mlp(width, shape.hidden, shape.dropout)
        self.head = nn.Linear(self.hidden.output_width, shape.output)

    def forward(self, vectors: Tensor) -> Tensor:
        """Map the joined vectors of the features, [rows, width], to embeddings [rows, output]."""
        out: Tensor = self.head(self.hidden(self.input_dropout(vectors)))
        return functional.normalize(out, dim=-1) if self.normalize else out


class DnnRanker(nn.Module):
    """The ranker for one label: an MLP and optional cross layers that map inputs to logits."""

    def __init__(self, width: int, shape: Ranker) -> None:
        super().__init__()
        self.hidden = Mlp(width, shape.hidden, shape.dropout)
        self.cross = CrossNetwork(width, shape.cross_layers) if shape.cross_layers else None
        self.head = nn.Linear(
            self.hidden.output_width + (width if self.cross is not None else 0), 1
        )

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        """Map inputs, given as a sequence of blocks of columns, to logits [rows]."""
        deep = self.hidden(parts)
        if self.cross is not None:
            deep = torch.cat([self.cross(joined(parts)), deep], dim=-1)
        logit: Tensor = self.head(deep)
        return logit.squeeze(-1)

    def outputs(self) -> list[nn.Linear]:
        """Return the layer that computes the logit."""
        return [self.head]


class Recommender(nn.Module):
    """A user tower, an item tower and a ranker.

    The *representation* of a user (or item) is the row that a bundle stores: the tower's output,
    followed by the vectors of the user's (or item's) direct features.
    Without a ranker, the logit is the inner product of the towers' outputs divided by the
    temperature. If ``model.tower.output`` is 0, there are no towers, and a representation holds
    only the vectors of the direct features.

    Args:
        schema: The features and the keys of users and items.
        shape: The ``[model]`` section of the configuration.
        sizes: Number of rows of each embedding table, by table name.
        tasks: The labels to predict; empty for one label.
        with_ranker: False for a pure retrieval model.
        temperature: Divisor of the logit of a model without a ranker.
        with_tables: Whether the model holds its embedding tables. In training it does not, and
            each forward pass gets the rows that it needs.
    """

    def __init__(
        self,
        schema: Schema,
        shape: Model,
        sizes: Mapping[str, int],
        *,
        tasks: Sequence[Task] = (),
        with_ranker: bool = True,
        temperature: float = 1.0,
        with_tables: bool = True,
    ) -> None:
        super().__init__()
        self.schema = schema
        self.temperature = temperature
        self.output_width = shape.tower.output
        self.tables = EmbeddingTables(
            schema, sizes, shape.dimension, pooling=shape.pooling, with_weights=with_tables
        )
        self.pools = nn.ModuleDict(
            {
                module_key(name): POOLS[pooling](
                    self.tables.width(schema[name]), schema[name].max_length
                )
                for name, pooling in shape.pooling.items()
                if pooling in ATTENTION
            }
        )
        self.user_direct = self._direct(shape.ranker.direct, schema.side("user"))
        self.item_direct = self._direct(shape.ranker.direct, schema.side("item"))
        self.user_tower = self._tower(schema.side("user"), shape.tower)
        self.item_tower = self._tower(schema.side("item"), shape.tower)
        self.heads = shape.ranker.heads
        self.matches = self._matches() if shape.ranker.matches else ()
        width = 3 * shape.tower.output + len(self.matches) + self.heads**2
        width += self._width((*self.user_direct, *self.item_direct, *schema.side("scene")))
        self.tasks, self._combine = tuple(tasks), shape.ranker.combine
        self.ranker: DnnRanker | TaskRanker | None = None
        if tasks:
            self.ranker = TaskRanker(width, shape.ranker, len(tasks))
        elif with_ranker:
            self.ranker = DnnRanker(width, shape.ranker)

    def user_width(self) -> int:
        """Return the width of a user's representation."""
        return self.output_width + self._width(self.user_direct)

    def item_width(self) -> int:
        """Return the width of an item's representation."""
        return self.output_width + self._width(self.item_direct)

    def represent_users(self, codes: Codes, rows: BatchRows | None = None) -> Tensor:
        """Compute the users' representations from the codes of all user features.

        `rows` are the embedding rows that the codes need; None if the model holds its tables. The
        result is [users, user_width].
        """
        vectors = self._pooled(self.tables(self.schema.side("user"), codes, rows))
        return joined(self._parts(self.user_tower, vectors, self.user_direct))

    def represent_items(self, codes: Codes, rows: BatchRows | None = None) -> Tensor:
        """Compute the items' representations from the codes of all item features.

        `rows` are the embedding rows that the codes need; None if the model holds its tables. The
        result is [items, item_width].
        """
        vectors = self._pooled(self.tables(self.schema.side("item"), codes, rows))
        return joined(self._parts(self.item_tower, vectors, self.item_direct))

    def scene_vectors(
        self, codes: Codes, features: Iterable[Feature] | None = None
    ) -> dict[str, Tensor]:
        """Look up some or all features of the scene; return name -> vectors [rows, width]."""
        scene = self.schema.side("scene") if features is None else features
        return self._pooled(self.tables(scene, codes))

    def rank(self, user: Tensor, item: Tensor, codes: Codes) -> Tensor:
        """Compute the logits of pairs of a user and an item, each in its own scene.

        Args:
            user: Representation of each pair's user [pairs, user_width].
            item: Representation of each pair's item [pairs, item_width].
            codes: Codes of all scene features of each pair.

        Returns:
            Logits [pairs], or [pairs, tasks] if the model has tasks.
        """
        scene = self.scene_vectors(codes)
        return self._logit([user], [item], list(scene.values()))

    def score(self, logit: Tensor) -> Tensor:
        """Compute the served score, a probability [rows], from logits [rows] or [rows, tasks]."""
        probability = logit.sigmoid()
        if not self.tasks:
            return probability
        return combined_score(probability, self.tasks, self._combine)

    def forward(self, codes: Codes, rows: BatchRows | None = None) -> Output:
        """Compute embeddings and logits of a batch.

        Args:
            codes: The codes of all features, by feature name.
            rows: The embedding rows that the codes need; None if the model holds its tables.
        """
        return self.combine(self.tables(self.schema.features, codes, rows))

    def combine(self, vectors: Mapping[str, Tensor]) -> Output:
        """Compute embeddings and logits of a batch from the vectors of all features.

        Args:
            vectors: Feature name -> vectors, as `EmbeddingTables.forward` returns them.
        """
        vectors = self._pooled(vectors)
        users, items, scene = (
            {feature.name: vectors[feature.name] for feature in self.schema.side(side)}
            for side in SIDES
        )
        user = self._parts(self.user_tower, users, self.user_direct)
        item = self._parts(self.item_tower, items, self.item_direct)
        # Without towers, the embeddings have width 0.
        embeddings = [parts[0][:, : self.output_width] for parts in (user, item)]
        logit = self._logit(user, item, list(scene.values()))
        return Output(embeddings[0], embeddings[1], logit)

    def _pooled(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pool the lists that are still unpooled by attention; keep all other vectors."""
        return {
            name: self.pools[key](vector) if (key := module_key(name)) in self.pools else vector
            for name, vector in vectors.items()
        }

    def _parts(
        self, tower: TowerNetwork | None, vectors: Mapping[str, Tensor], direct: tuple[Feature, ...]
    ) -> list[Tensor]:
        """Return a representation as column blocks: the tower's output, then direct features."""
        parts = [vectors[feature.name] for feature in direct]
        return parts if tower is None else [tower(joined(list(vectors.values()))), *parts]

    def _matches(self) -> tuple[Match, ...]:
        """Find the pairs of a direct user and a direct item feature that share a table."""
        users, items = (
            {feature.name: start for feature, start in zip(side, self._starts(side), strict=True)}
            for side in (self.user_direct, self.item_direct)
        )
        return tuple(
            Match(users[u], items[i], self.tables.width(self.schema[u]))
            for u, i in self.schema.matched((*users, *items))
        )

    def _starts(self, direct: tuple[Feature, ...]) -> list[int]:
        """Return the first column of each direct feature's vector in a representation."""
        widths = (self.output_width, *(self.tables.width(feature) for feature in direct))
        return list(accumulate(widths))[:-1]

    def _logit(self, user: list[Tensor], item: list[Tensor], scene: list[Tensor]) -> Tensor:
        """Compute logits from the column blocks of users, items and scenes."""
        of_user, of_item = (parts[0][:, : self.output_width] for parts in (user, item))
        product = of_user * of_item
        if self.ranker is None:
            return product.sum(dim=-1) / self.temperature
        matches = self._match_products(joined(user), joined(item)) if self.matches else []
        heads = [head_products(of_user, of_item, self.heads)] if self.heads else []
        logit: Tensor = self.ranker([*user, *item, product, *matches, *scene, *heads])
        return logit

    def _match_products(self, user: Tensor, item: Tensor) -> list[Tensor]:
        """Compute, for each match, the inner products of its two vectors [rows, 1]."""
        return [
            (user.narrow(1, m.user, m.width) * item.narrow(1, m.item, m.width)).sum(1, keepdim=True)
            for m in self.matches
        ]

    def _tower(self, side: tuple[Feature, ...], shape: Tower) -> TowerNetwork | None:
        return TowerNetwork(self._width(side), shape) if shape.output else None

    def _width(self, features: tuple[Feature, ...]) -> int:
        return sum(self.tables.width(feature) for feature in features)

    @staticmethod
    def _direct(names: tuple[str, ...], side: tuple[Feature, ...]) -> tuple[Feature, ...]:
        return tuple(feature for feature in side if feature.name in names)
