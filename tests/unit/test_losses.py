"""Losses and their parts, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hvdrec.errors import UserError
from hvdrec.models.losses import (
    RetrievalLoss,
    by_name,
    in_batch_loss,
    in_mixture,
    register_loss,
    retrieval_loss,
)
from hvdrec.models.losses.bpr import bpr
from hvdrec.models.losses.cross_entropy import binary_cross_entropy
from hvdrec.models.losses.in_batch import hardest, with_logq, without_accidental_hits
from hvdrec.models.losses.softmax import softmax


def test_binary_cross_entropy_is_a_weighted_sum() -> None:
    logit = torch.tensor([0.0, math.log(3.0), 5.0])
    label = torch.tensor([1.0, 0.0, 1.0])
    weight = torch.tensor([1.0, 2.0, 0.0])
    # -log(1/2) + 2 * -log(1/4) + nothing = log 2 + 4 log 2
    assert binary_cross_entropy(logit, label, weight).item() == pytest.approx(5 * math.log(2))


def test_accidental_hits_are_masked_except_in_the_rows_own_column() -> None:
    logits = torch.zeros(2, 3)
    own, item, items = torch.tensor([0, 2]), torch.tensor([7, 7]), torch.tensor([7, 8, 7])
    masked = without_accidental_hits(logits, own, item, items)
    assert masked.tolist() == [[0.0, 0.0, -math.inf], [-math.inf, 0.0, 0.0]]


def test_logq_subtracts_the_log_probability_of_each_candidate() -> None:
    corrected = with_logq(torch.zeros(1, 2), torch.log(torch.tensor([0.5, 0.25])))
    assert corrected.tolist()[0] == pytest.approx([math.log(2), math.log(4)])


USER = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
ITEM = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])


def loss_of_two_rows(loss: RetrievalLoss) -> float:
    """Compute the loss of rows with weights 1 and 2 at temperature 0.5.

    Row 0 has logits 2, 0, 2 and its own item in column 0. Row 1 has logits 0, 2 and its own item in
    column 1; column 2 is its own item again and does not count.
    """
    return in_batch_loss(
        loss,
        USER,
        ITEM,
        torch.tensor([1.0, 2.0]),
        own_B=torch.tensor([0, 1]),
        item_B=torch.tensor([5, 6]),
        item_C=torch.tensor([5, 6, 6]),
        temperature=0.5,
    ).item()


def test_softmax_by_hand() -> None:
    first = -2 + math.log(2 * math.exp(2) + 1)
    second = -2 + math.log(1 + math.exp(2))
    assert loss_of_two_rows(softmax) == pytest.approx(first + 2 * second)


def test_bpr_by_hand() -> None:
    def log_sigmoid(x: float) -> float:
        return -math.log(1 + math.exp(-x))

    # The mean over two negatives, and the only negative.
    first = -(log_sigmoid(2) + log_sigmoid(0)) / 2
    second = -log_sigmoid(2)
    assert loss_of_two_rows(bpr) == pytest.approx(first + 2 * second)


def test_bpr_of_a_row_without_negatives_is_zero_with_zero_gradient() -> None:
    logits = torch.tensor([[3.0, -math.inf], [-math.inf, 1.0]], requires_grad=True)
    losses = bpr(logits, torch.tensor([0, 1]))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.tolist() == [0.0, 0.0]
    assert gradient.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_losses_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert retrieval_loss("softmax") is softmax and retrieval_loss("bpr") is bpr
    monkeypatch.setattr(by_name, "_LOSSES", dict(by_name._LOSSES))

    def hinge(logits_BC: torch.Tensor, positive_B: torch.Tensor) -> torch.Tensor:
        return (1 + logits_BC - logits_BC.gather(1, positive_B.unsqueeze(1))).relu().sum(1)

    register_loss("hinge", hinge)
    assert retrieval_loss("hinge") is hinge
    # Row 0: 1 (its own column), 0 and 1 + 2 - 2. Row 1: 0, 1 and a masked column.
    assert loss_of_two_rows(retrieval_loss("hinge")) == pytest.approx(2 + 2 * 1)


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(UserError) as raised:
        retrieval_loss("sofmax")
    assert (raised.value.field, raised.value.value) == ("train.retrieval_loss", "sofmax")
    assert "[softmax, bpr]" in str(raised.value) and "'softmax'?" in str(raised.value)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # Softmax over 1 / q: 2 / (2 + 1.25) and 2 / (2 + 10).
        (softmax, (2 / 3.25, 2 / 12)),
        # The sigmoid of a log ratio is the same share of two.
        (bpr, (2 / 3.25, 2 / 12)),
    ],
)
def test_logq_gives_popular_candidates_less_weight(
    loss: RetrievalLoss, expected: tuple[float, float]
) -> None:
    def compute(probability: list[float]) -> float:
        return in_batch_loss(
            loss,
            torch.ones(1, 1),
            torch.ones(2, 1),
            torch.ones(1),
            own_B=torch.tensor([0]),
            item_B=torch.tensor([0]),
            item_C=torch.tensor([0, 1]),
            temperature=1.0,
            log_probability_C=torch.log(torch.tensor(probability)),
        ).item()

    assert compute([0.5, 0.8]) == pytest.approx(-math.log(expected[0]))
    assert compute([0.5, 0.1]) == pytest.approx(-math.log(expected[1]))


def test_only_the_hardest_negatives_count() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0], [9.0, 8.0, -1.0, 7.0]])
    kept = hardest(logits, torch.tensor([0, 2]), 2)
    inf = math.inf
    assert kept.tolist() == [[0.0, 3.0, 2.0, -inf], [9.0, 8.0, -1.0, -inf]]
    assert hardest(logits, torch.tensor([0, 2]), 3).tolist() == logits.tolist()


def test_the_mixture_weights_both_sources_of_negatives() -> None:
    log_probability = torch.log(torch.tensor([0.7, 0.3, 0.0]))
    mixed = in_mixture(log_probability, in_batch=6, uniform=2, items=4)
    # (6 * 0.7 + 2 / 4) / 8, (6 * 0.3 + 2 / 4) / 8 and (2 / 4) / 8 for an item that is in no batch
    assert mixed.exp().tolist() == pytest.approx([4.7 / 8, 2.3 / 8, 0.5 / 8])
    assert in_mixture(log_probability[:2], 6, 0, 4).exp().tolist() == pytest.approx([0.7, 0.3])


@pytest.mark.parametrize("loss", [softmax, bpr])
@pytest.mark.parametrize("hard_negatives", [0, 3])
@pytest.mark.parametrize("block_rows", [1, 3, 7])
def test_blocks_of_rows_give_the_same_loss_and_gradients(
    block_rows: int, hard_negatives: int, loss: RetrievalLoss
) -> None:
    random = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    rows, candidates = 7, 12
    user, item = drawn(rows, 4).requires_grad_(), drawn(candidates, 4).requires_grad_()
    items = torch.randint(0, 5, (candidates,), generator=random)
    own = torch.arange(3, 3 + rows)
    weight, log_probability = drawn(rows).abs(), drawn(candidates)

    def loss_and_gradients(max_logits: int) -> list[torch.Tensor]:
        total = in_batch_loss(
            loss,
            user,
            item,
            weight,
            own_B=own,
            item_B=items[own],
            item_C=items,
            temperature=0.3,
            log_probability_C=log_probability,
            hard_negatives=hard_negatives,
            max_logits=max_logits,
        )
        return [total.detach(), *torch.autograd.grad(3 * total, (user, item))]

    at_once = loss_and_gradients(rows * candidates)
    for one, other in zip(at_once, loss_and_gradients(block_rows * candidates), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
