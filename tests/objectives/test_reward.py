"""Reward losses: closed forms, all orders of a small ranking, and masks that hold."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from danlu.objectives.reward import bradley_terry_losses, centring_losses, ranking_losses


def test_bradley_terry_is_ln_2_at_equal_rewards_and_finite_at_any() -> None:
    equal = torch.tensor([3.0, -1e6])
    torch.testing.assert_close(bradley_terry_losses(equal, equal), torch.full((2,), math.log(2)))
    chosen = torch.tensor([1000.0, -1000.0], requires_grad=True)
    losses = bradley_terry_losses(chosen, torch.zeros(2))
    losses.sum().backward()
    assert losses.tolist() == [0.0, 1000.0]
    assert chosen.grad is not None
    assert chosen.grad.tolist() == [0.0, -1.0]


def test_a_margin_asks_for_a_lead() -> None:
    losses = bradley_terry_losses(torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([1.5]))
    torch.testing.assert_close(losses, torch.tensor([math.log(2)]))


def test_rankings_of_two_are_pairs() -> None:
    scores = torch.randn(6, 2)
    expected = bradley_terry_losses(scores[:, 0], scores[:, 1])
    torch.testing.assert_close(ranking_losses(scores, torch.ones(6, 2)), expected)


def test_probabilities_of_all_orders_add_up_to_1() -> None:
    scores = torch.randn(4)
    orders = torch.stack([scores[list(order)] for order in itertools.permutations(range(4))])
    losses = ranking_losses(orders, torch.ones_like(orders))
    assert (-losses).exp().sum().item() == pytest.approx(1.0, abs=1e-6)


def test_missing_answers_change_nothing_and_their_nan_stays_where_it_is() -> None:
    full = torch.randn(3, 4)
    padded = torch.full((3, 6), float("nan"))
    padded[:, [0, 2, 3, 5]] = full
    mask = torch.zeros(3, 6).bool()
    mask[:, [0, 2, 3, 5]] = True
    padded.requires_grad_()
    losses = ranking_losses(padded, mask)
    torch.testing.assert_close(losses, ranking_losses(full, torch.ones(3, 4)))
    losses.sum().backward()
    assert padded.grad is not None
    assert padded.grad.isfinite().all()
    assert (padded.grad[~mask] == 0).all()


def test_ranks_give_the_order_and_ties_are_not_compared() -> None:
    scores = torch.randn(2, 3)
    shuffled = scores[:, [2, 0, 1]]
    ranks = torch.tensor([[2, 0, 1], [2, 0, 1]])
    everywhere = torch.ones(2, 3)
    torch.testing.assert_close(
        ranking_losses(shuffled, everywhere, ranks), ranking_losses(scores, everywhere), rtol=1e-5, atol=1e-6
    )
    assert ranking_losses(scores, everywhere, torch.zeros(2, 3)).abs().max() < 1e-6
    tied = ranking_losses(scores, everywhere, torch.tensor([[0, 0, 1], [0, 0, 1]]))
    pairs = bradley_terry_losses(scores[:, 0], scores[:, 2]) + bradley_terry_losses(scores[:, 1], scores[:, 2])
    torch.testing.assert_close(tied, pairs)


def test_centring_is_0_when_the_rewards_lie_around_0() -> None:
    assert centring_losses(torch.tensor([2.0, 1.0]), torch.tensor([-2.0, 2.0])).tolist() == [0.0, 9.0]
