"""Check the collectives: each rank computes the data of the other ranks itself.

Argument: the device of the tensors (default: cpu).
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from hvdrec.embeddings.alltoall import start_alltoall
from hvdrec.parallel import gradients, ranks


def main(device: str = "cpu") -> None:
    world = ranks.init()
    size, rank = world.size, world.rank
    everyone = range(size)
    assert ranks.gather_objects({"rank": rank}) == [{"rank": r} for r in everyone]
    assert ranks.broadcast_object(["from", rank]) == ["from", 0]
    assert ranks.sum_arrays(np.array([rank, 1])).tolist() == [sum(everyone), size]
    assert ranks.sum_arrays(np.array(0.5)).item() == size / 2
    # Ranks contribute 0, 1, 2, … rows.
    mine = np.full((rank, 2), rank)
    expected = np.concatenate([np.full((r, 2), r) for r in everyone])
    assert np.array_equal(ranks.gather_arrays(mine), expected)
    rows = torch.full((rank, 2), float(rank), requires_grad=True, device=device)
    joined, start = gradients.gather_rows(rows)
    assert start == sum(range(rank))
    assert np.array_equal(joined.detach().cpu().numpy(), expected)
    # Rank r weights every row by r + 1: each row's gradient is the sum over all ranks.
    (joined.sum() * (rank + 1)).backward()
    assert rows.grad is not None
    assert (rows.grad == float(sum(r + 1 for r in everyone))).all()
    assert rows.grad.shape == (rank, 2)
    # The number of rows varies between batches; some ranks receive nothing.
    for step in (1, 2, 40, 3, 0):
        counts = [step * (r % 2) + rank for r in everyone]
        rows = torch.cat([torch.full((n, 3), 10.0 * rank + r) for r, n in enumerate(counts)]).to(
            device
        )
        handle = start_alltoall(rows, torch.tensor(counts, dtype=torch.int32), "rows_of_step")
        received, received_counts = ranks.wait(handle)
        assert received_counts.tolist() == [step * (rank % 2) + r for r in everyone]
        expected = np.repeat([10.0 * r + rank for r in everyone], received_counts.numpy())
        assert np.array_equal(received.cpu().numpy(), np.tile(expected[:, None], 3))
    # The second fills a bucket of its own; only rank 0 uses the last.
    used, large, unused = (
        torch.nn.Parameter(torch.zeros(n, device=device)) for n in (2, 1 << 17, 2)
    )
    dense = gradients.DenseGradients([used, large, unused])
    for last in (False, True):
        if last:
            dense.expect_last_backward()
        total = (rank + 1) * (used.sum() + 2 * large.sum()) + (unused.sum() if rank == 0 else 0)
        total.backward()
    dense.send_rest()
    dense.wait()
    # Each gradient accumulates both backward passes before it is sent.
    for parameter, value in ((used, 1), (large, 2)):
        assert parameter.grad is not None
        assert (parameter.grad == 2.0 * value * sum(r + 1 for r in everyone)).all()
    assert unused.grad is not None
    assert unused.grad.tolist() == [2.0, 2.0]
    state = {"w": torch.full((3,), float(rank), device=device)}
    gradients.broadcast_state(state)
    assert state["w"].tolist() == [0.0] * 3
    ranks.barrier()
    print("all correct", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
