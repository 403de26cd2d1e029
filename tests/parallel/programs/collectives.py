"""Check the collectives against what each rank knows the others have."""

from __future__ import annotations

import numpy as np
import torch

from hvdrec.parallel import gradients, ranks


def main() -> None:
    world = ranks.init()
    size, rank = world.size, world.rank
    everyone = range(size)
    assert ranks.gather_objects({"rank": rank}) == [{"rank": r} for r in everyone]
    assert ranks.broadcast_object(["from", rank]) == ["from", 0]
    assert ranks.sum_arrays(np.array([rank, 1])).tolist() == [sum(everyone), size]
    assert ranks.sum_arrays(np.array(0.5)).item() == size / 2
    # Ranks give 0, 1, 2, … rows.
    mine = np.full((rank, 2), rank)
    expected = np.concatenate([np.full((r, 2), r) for r in everyone])
    assert np.array_equal(ranks.gather_arrays(mine), expected)
    rows = torch.full((rank, 2), float(rank), requires_grad=True)
    joined, start = gradients.gather_rows(rows)
    assert start == sum(range(rank))
    assert np.array_equal(joined.detach().numpy(), expected)
    # Rank r weighs every row r + 1 times: each row's gradient is the sum over all ranks.
    (joined.sum() * (rank + 1)).backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad, torch.full((rank, 2), float(sum(r + 1 for r in everyone))))
    unused = torch.nn.Parameter(torch.zeros(2))
    used = torch.nn.Parameter(torch.zeros(2))
    used.grad = torch.full((2,), float(rank))
    if rank == 0:
        unused.grad = torch.ones(2)
    gradients.sum_gradients([used, unused])
    assert used.grad.tolist() == [float(sum(everyone))] * 2
    assert unused.grad is not None
    assert unused.grad.tolist() == [1.0, 1.0]
    state = {"w": torch.full((3,), float(rank))}
    gradients.broadcast_state(state)
    assert state["w"].tolist() == [0.0] * 3
    ranks.barrier()
    print("all held", flush=True)


if __name__ == "__main__":
    main()
