"""Define a feature kind of your own: a discount that is computed from two columns of an item.

The computation is written once, as ONNX nodes. `prepare` encodes the samples with these nodes, and
the bundle contains them, so the service computes the same number from a raw price and list price.

usage: python examples/custom_feature_kind.py [DIRECTORY]
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from shop_logs import write_shop_logs
from train_from_python import shop_config

import hvdrec
from hvdrec.config.schema import Feature
from hvdrec.features.kinds import Column, FittedFeature, Kind, Nodes, TrainingSplit, register_kind


class Discount(Kind):
    """The number 1 - price / list price; ``columns`` names both. It is 0 if one is missing."""

    column_kind = "numeric"
    dtypes = ("float",)

    def check(self, feature: Feature) -> None:
        """Raise UserError unless there are two columns."""
        if len(feature.columns) != 2:
            raise feature.invalid("columns", "discount needs a price and a list price")

    def columns(self, feature: Feature) -> tuple[Column, ...]:
        """Return the two raw columns."""
        return tuple(feature.raw_column(name, "numeric") for name in feature.columns)

    def is_embedded(self, feature: Feature) -> bool:
        """Return False: the result is a number, not a code (a row of an embedding table)."""
        return False

    def fit(self, feature: Feature, split: TrainingSplit) -> FittedFeature:
        """Learn nothing from the training split, because the formula has no parameters."""
        return FittedFeature(feature)

    def compile(self, nodes: Nodes, fitted: FittedFeature, inputs: Sequence[str]) -> str:
        """Add the nodes that compute the discount, float32 [N], from two prices, double [N]."""
        discount = nodes.add("Sub", nodes.double(1.0), nodes.add("Div", *inputs))
        unknown = nodes.add("IsNaN", discount)
        return nodes.cast(nodes.add("Where", unknown, nodes.double(0.0), discount), np.float32)


# This is at the top level because worker processes import this module too and need the kind.
register_kind("discount", Discount())


def main() -> None:
    """Train with the new feature and score an item from raw values."""
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    write_shop_logs(directory / "raw")
    discount = Feature(
        "discount",
        side="item",
        kind="discount",
        dtype="float",
        columns=("price", "list_price"),
    )
    config = shop_config(directory, discount)
    hvdrec.make_samples(config, overwrite=True)
    hvdrec.prepare(config, overwrite=True, workers=1)
    result = hvdrec.train(config, overwrite=True)
    bundle = hvdrec.export(result.run, overwrite=True, workers=1)

    scorer = hvdrec.Scorer.load(bundle.path)
    full = {"item_id": "i1", "price": 50.0, "list_price": 50.0}
    reduced = {"item_id": "i1", "price": 25.0, "list_price": 50.0}
    scores = scorer.score(user="u1", items=[full, reduced], scene={"hour": 21})
    print(f"at full price {scores[0]:.3f}, at half price {scores[1]:.3f}")


if __name__ == "__main__":
    main()
