"""Compute a global batch's gradients on all ranks; the first one writes them.

Arguments: objective, file to write. The global batch's 12 rows are dealt out unevenly: the last
rank gets what is left, possibly nothing but padding.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from safetensors.torch import save_file

from hvdrec.loader import Batch
from hvdrec.parallel import ranks
from hvdrec.training.objective import compute_gradients
from tests.small_model import small_batch, small_config, small_model

ROWS = 12


def part(batch: Batch, start: int, stop: int) -> Batch:
    return replace(
        batch,
        features={name: codes[start:stop] for name, codes in batch.features.items()},
        user_index=batch.user_index[start:stop],
        item_index=batch.item_index[start:stop],
        label=batch.label[start:stop],
        weight=batch.weight[start:stop],
        rows=max(0, min(stop, ROWS) - start),
    )


def main(objective: str, file: str) -> None:
    world = ranks.init()
    config = small_config(objective)
    model = small_model(config)
    share = {1: 12, 2: 8, 3: 6}[world.size]
    batch = small_batch(ROWS, padding=world.size * share - ROWS)
    mine = part(batch, world.rank * share, (world.rank + 1) * share)
    log_probability = torch.log(torch.arange(1, 10) / 45).double()
    loss = compute_gradients(model, mine, config.train, log_probability)
    total = ranks.sum_arrays(loss.total.numpy())
    if world.is_first:
        gradients = {name: p.grad for name, p in model.named_parameters()}
        tensors = {name: gradient.clone() for name, gradient in gradients.items()}
        save_file({**tensors, "loss": torch.tensor(float(total), dtype=torch.float64)}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
