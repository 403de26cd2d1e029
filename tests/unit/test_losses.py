"""Losses and their parts, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hvdrec.models.losses import (
    binary_cross_entropy,
    hardest,
    in_batch_softmax,
    in_mixture,
    with_logq,
    without_accidental_hits,
)


def test_binary_cross_entropy_is_a_weighted_sum() -> None:
    logit = torch.tensor([0.0, math.log(3.0), 5.0])
    label = torch.tensor([1.0, 0.0, 1.0])
    weight = torch.tensor([1.0, 2.0, 0.0])
    # -log(1/2) + 2 * -log(1/4) + nothing = log 2 + 4 log 2
    assert binary_cross_entropy(logit, label, weight).item() == pytest.approx(5 * math.log(2))


def test_accidental_hits_are_masked_but_not_the_own_column() -> None:
    logits = torch.zeros(2, 3)
    own, item, items = torch.tensor([0, 2]), torch.tensor([7, 7]), torch.tensor([7, 8, 7])
    masked = without_accidental_hits(logits, own, item, items)
    assert masked.tolist() == [[0.0, 0.0, -math.inf], [-math.inf, 0.0, 0.0]]


def test_logq_subtracts_the_log_probability_of_each_candidate() -> None:
    corrected = with_logq(torch.zeros(1, 2), torch.log(torch.tensor([0.5, 0.25])))
    assert corrected.tolist()[0] == pytest.approx([math.log(2), math.log(4)])


def test_in_batch_softmax_by_hand() -> None:
    user = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    item = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    loss = in_batch_softmax(
        user,
        item,
        torch.tensor([1.0, 2.0]),
        own_B=torch.tensor([0, 1]),
        item_B=torch.tensor([5, 6]),
        item_C=torch.tensor([5, 6, 6]),
        temperature=0.5,
    )
    # Row 0: logits 2, 0, 2. Row 1: logits 0, 2 and the third column is its own item again: masked.
    first = -2 + math.log(2 * math.exp(2) + 1)
    second = -2 + math.log(1 + math.exp(2))
    assert loss.item() == pytest.approx(first + 2 * second)


def test_popular_candidates_weigh_less_with_logq() -> None:
    def loss(probability: list[float]) -> float:
        return in_batch_softmax(
            torch.ones(1, 1),
            torch.ones(2, 1),
            torch.ones(1),
            own_B=torch.tensor([0]),
            item_B=torch.tensor([0]),
            item_C=torch.tensor([0, 1]),
            temperature=1.0,
            log_probability_C=torch.log(torch.tensor(probability)),
        ).item()

    # Softmax over 1/q: 2/(2+1.25) against 2/(2+10)
    assert loss([0.5, 0.8]) == pytest.approx(-math.log(2 / 3.25))
    assert loss([0.5, 0.1]) == pytest.approx(-math.log(2 / 12))


def test_only_the_hardest_negatives_count() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0], [9.0, 8.0, -1.0, 7.0]])
    kept = hardest(logits, torch.tensor([0, 2]), 2)
    inf = math.inf
    assert kept.tolist() == [[0.0, 3.0, 2.0, -inf], [9.0, 8.0, -1.0, -inf]]
    assert hardest(logits, torch.tensor([0, 2]), 3).tolist() == logits.tolist()


def test_a_mixture_weighs_both_sources_of_negatives() -> None:
    log_probability = torch.log(torch.tensor([0.7, 0.3, 0.0]))
    mixed = in_mixture(log_probability, in_batch=6, uniform=2, items=4)
    # (6 * 0.7 + 2 / 4) / 8, (6 * 0.3 + 2 / 4) / 8 and, never in a batch, (2 / 4) / 8
    assert mixed.exp().tolist() == pytest.approx([4.7 / 8, 2.3 / 8, 0.5 / 8])
    assert in_mixture(log_probability[:2], 6, 0, 4).exp().tolist() == pytest.approx([0.7, 0.3])


@pytest.mark.parametrize("hard_negatives", [0, 3])
@pytest.mark.parametrize("block_rows", [1, 3, 7])
def test_the_softmax_in_blocks_is_the_softmax_at_once(block_rows: int, hard_negatives: int) -> None:
    random = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    rows, candidates = 7, 12
    user, item = drawn(rows, 4).requires_grad_(), drawn(candidates, 4).requires_grad_()
    items = torch.randint(0, 5, (candidates,), generator=random)
    own = torch.arange(3, 3 + rows)
    weight, log_probability = drawn(rows).abs(), drawn(candidates)

    def loss_and_gradients(cells: int) -> list[torch.Tensor]:
        loss = in_batch_softmax(
            user,
            item,
            weight,
            own_B=own,
            item_B=items[own],
            item_C=items,
            temperature=0.3,
            log_probability_C=log_probability,
            hard_negatives=hard_negatives,
            cells=cells,
        )
        return [loss.detach(), *torch.autograd.grad(3 * loss, (user, item))]

    at_once = loss_and_gradients(rows * candidates)
    for one, other in zip(at_once, loss_and_gradients(block_rows * candidates), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
