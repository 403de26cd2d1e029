"""Define a retrieval loss of your own: a hinge loss.

It is 0 if the positive item's logit exceeds that of every negative item by a margin.

usage: python examples/custom_loss.py [DIRECTORY]
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import torch
from shop_logs import write_shop_logs
from torch import Tensor
from train_from_python import shop_config

import hvdrec
from hvdrec.models.losses import register_loss

MARGIN = 1.0


def hinge(logits_BC: Tensor, positive_B: Tensor) -> Tensor:
    """Return each row's max(0, margin + highest negative logit - positive logit), [B]."""
    column_B1 = positive_B.unsqueeze(1)
    positive_logit_B = logits_BC.gather(1, column_B1).squeeze(1)
    negative_logit_B = logits_BC.scatter(1, column_B1, -torch.inf).amax(dim=1)
    return (MARGIN + negative_logit_B - positive_logit_B).clamp(min=0)


register_loss("hinge", hinge)


def main() -> None:
    """Train the towers with the new loss."""
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    write_shop_logs(directory / "raw")
    config = shop_config(directory)
    train = dataclasses.replace(config.train, objective="retrieval", retrieval_loss="hinge")
    config = dataclasses.replace(config, train=train)
    hvdrec.make_samples(config, overwrite=True)
    hvdrec.prepare(config, overwrite=True)
    result = hvdrec.train(config, overwrite=True)
    print(f"{result.metric} on validation: {result.best:.3f}")


if __name__ == "__main__":
    main()
