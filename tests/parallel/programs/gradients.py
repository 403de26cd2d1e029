"""Take optimizer steps on all ranks in many settings; rank 0 writes the results.

Arguments: the file to write, and the device (default: cpu). The 12 rows of each global batch are
split unevenly: the last rank gets the rest, possibly only padding. Tensors are named SETTING/NAME,
where NAME is a parameter's gradient in the first step (``gradient/…``), a whole table
(``table/…``) or ``loss``.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from hvdrec.parallel import ranks
from hvdrec.parallel.gradients import broadcast_state
from hvdrec.parallel.ranks import World
from hvdrec.training.objective import clip, compute_gradients
from hvdrec.training.optimizer import make_optimizer
from hvdrec.training.pipeline import make_preparer, steps
from hvdrec.training.state import TrainState
from tests.small_model import (
    DENSE_RATE,
    SETTINGS,
    STEPS,
    TABLE_RATE,
    Setting,
    of_type,
    small_batch,
    small_model,
    small_tables,
)

ROWS = 12


def take_steps(setting: Setting, world: World, device: torch.device) -> dict[str, Tensor]:
    config = setting.config()
    full = small_model(config)
    model = small_model(config, with_tables=False)
    dtype = torch.float32 if setting.kernel == "fbgemm" else torch.float64
    tables = small_tables(config, full, world, setting, device)
    model.to(device, dtype)
    broadcast_state(dict(model.state_dict()))
    share = {1: 12, 2: 8, 3: 6, 4: 5}[world.size]
    batches = []
    for number in range(STEPS):
        batch = small_batch(ROWS, padding=world.size * share - ROWS, seed=number)
        mine = batch.part(world.rank * share, (world.rank + 1) * share)
        mine = mine if setting.sharing else replace(mine, tasks=None)
        batches.append(of_type(mine, dtype))
    log_probability = torch.log(torch.arange(1, 10) / 45).to(device, dtype)
    prepare = make_preparer(tables, config, 0)
    prepared = (prepare(number, batch) for number, batch in enumerate(batches))
    state = TrainState(config, model, tables, make_optimizer(model, config.train), log_probability)
    out: dict[str, Tensor] = {}
    for number, step in enumerate(steps(prepared, tables, device)):
        tables.set_learning_rate(TABLE_RATE)
        model.zero_grad()
        loss, pending = compute_gradients(state, step)
        gradients = tables.wait_gradients(pending)
        state.dense.wait()
        if config.train.clip_norm:
            gradients = clip(state, step, gradients, config.train.clip_norm)
        if number == 0:
            total = ranks.sum_arrays(loss.total.double().cpu().numpy())
            out["loss"] = torch.tensor(float(total), dtype=torch.float64)
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                out[f"gradient/{name}"] = parameter.grad.cpu().clone()
        tables.update(step.request, gradients)
        if step.next_request is not None:
            tables.start_fetch(step.next_request)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad, alpha=DENSE_RATE)
    for group in tables.groups:
        for table, size in group.sizes.items():
            local = tables.table(table)[0].cpu().numpy()
            if group.is_sharded:
                ids = ranks.gather_arrays(group.local_ids(table, world.rank))
                joined = np.empty((size, group.width), local.dtype)
                joined[ids] = ranks.gather_arrays(local)
                out[f"table/{table}"] = torch.from_numpy(joined)
            else:
                out[f"table/{table}"] = torch.from_numpy(local.copy())
    return out


def take_all(world: World, device: torch.device, *, fbgemm: bool) -> dict[str, Tensor]:
    """Take the steps of all settings; of those with FBGEMM only if it is asked for."""
    return {
        f"{name}/{key}": value
        for name, setting in SETTINGS.items()
        if fbgemm or setting.kernel == "torch"
        for key, value in take_steps(setting, world, device).items()
    }


def main(file: str, device: str = "cpu") -> None:
    tensors = take_all(ranks.init(), torch.device(device), fbgemm=device == "cpu")
    if ranks.current().is_first:
        save_file(tensors, Path(file))


if __name__ == "__main__":
    main(*sys.argv[1:])
