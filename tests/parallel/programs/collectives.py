"""Check the collectives against what each rank knows the others have."""

from __future__ import annotations

import numpy as np
import torch

from hvdrec.embeddings.alltoall import begin_alltoall
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
    # More rows, then fewer, as batches have them; some ranks are sent nothing.
    for step in (1, 2, 40, 3, 0):
        counts = [step * (r % 2) + rank for r in everyone]
        rows = torch.cat([torch.full((n, 3), 10.0 * rank + r) for r, n in enumerate(counts)])
        handle = begin_alltoall(rows, torch.tensor(counts, dtype=torch.int32), "rows_of_step")
        came, counts_came = ranks.wait(handle)
        assert counts_came.tolist() == [step * (rank % 2) + r for r in everyone]
        expected = np.repeat([10.0 * r + rank for r in everyone], counts_came.numpy())
        assert np.array_equal(came.numpy(), np.tile(expected[:, None], 3))
    # The second is large enough for a bucket of its own; only the first rank uses the last.
    used, large, unused = (torch.nn.Parameter(torch.zeros(n)) for n in (2, 1 << 17, 2))
    dense = gradients.DenseGradients([used, large, unused])
    for last in (False, True):
        if last:
            dense.expect()
        total = (rank + 1) * (used.sum() + 2 * large.sum()) + (unused.sum() if rank == 0 else 0)
        total.backward()
    dense.finish()
    dense.wait()
    # Each was added up over both backward passes before it went out.
    for parameter, value in ((used, 1), (large, 2)):
        assert parameter.grad is not None
        assert (parameter.grad == 2.0 * value * sum(r + 1 for r in everyone)).all()
    assert unused.grad is not None
    assert unused.grad.tolist() == [2.0, 2.0]
    state = {"w": torch.full((3,), float(rank))}
    gradients.broadcast_state(state)
    assert state["w"].tolist() == [0.0] * 3
    ranks.barrier()
    print("all held", flush=True)


if __name__ == "__main__":
    main()
