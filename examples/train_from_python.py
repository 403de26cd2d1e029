"""Train, export and score with a configuration that is written in Python, without a TOML file.

usage: python examples/train_from_python.py [DIRECTORY]
"""

import sys
import tempfile
from pathlib import Path

from shop_logs import write_shop_logs

import hvdrec
from hvdrec.config.data_sections import Paths, Samples
from hvdrec.config.schema import Feature
from hvdrec.config.sections import Model, Tower, Train


def shop_config(directory: Path, *more: Feature) -> hvdrec.Config:
    """Return the configuration of a run in `directory`, with `more` features if given."""
    return hvdrec.Config(
        name="shop",
        paths=Paths(raw=str(directory / "raw"), work=str(directory / "work")),
        samples=Samples(
            interactions="shown.parquet",
            users="users.parquet",
            items="items.parquet",
            time="time",
            title="title",
            label="clicked",
        ),
        features=(
            Feature("user_id"),
            Feature("age", kind="numeric", dtype="int"),
            Feature("item_id", side="item"),
            Feature("hour", side="scene", dtype="int", default=20),
            *more,
        ),
        model=Model(
            dimension=8, initial_deviation=0.1, tower=Tower(hidden=(), output=16, normalize=True)
        ),
        train=Train(
            batch_size=512,
            epochs=10,
            learning_rate=5e-3,
            warmup_steps=5,
            embedding_learning_rate=0.3,
        ),
    )


def main() -> None:
    """Run all stages, from logs to ranked items."""
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    write_shop_logs(directory / "raw")
    config = shop_config(directory)

    hvdrec.make_samples(config, overwrite=True)
    hvdrec.prepare(config, overwrite=True)
    result = hvdrec.train(config, overwrite=True)
    report = hvdrec.evaluate(result.run)
    print(f"AUC on the test split: {report.ranking['auc']:.3f}")

    bundle = hvdrec.export(result.run, overwrite=True)
    scorer = hvdrec.Scorer.load(bundle.path)
    for item in scorer.recommend(user="u1", scene={"hour": 21}, k=5):
        print(f"{item.score:.3f}  {item.title}")


if __name__ == "__main__":
    main()
