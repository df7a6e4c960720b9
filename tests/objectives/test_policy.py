"""The clipped surrogate in all its cases, the critic's loss, aggregation that may be cut anywhere, penalties."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from danlu.objectives.advantages import group_advantages
from danlu.objectives.logprobs import sequence_means
from danlu.objectives.policy import (
    Aggregation,
    aggregate,
    clipped_share,
    importance_weights,
    missing_eos_penalty,
    overlong_penalty,
    policy_losses,
    value_losses,
)

NAN = float("nan")
HOWS: list[Aggregation] = ["token", "sequence", "constant"]


def with_gradient(ratio: float, advantage: float, dual_clip: float | None = None) -> tuple[float, float]:
    """Loss of one token and its gradient to the log-prob."""
    logps = torch.tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    loss = policy_losses(
        logps, torch.tensor([[-1.0]]), torch.tensor([[advantage]]), clip_low=0.2, clip_high=0.28, dual_clip=dual_clip
    )
    loss.sum().backward()
    assert logps.grad is not None
    return loss.item(), logps.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.25, 2.0, -2.5, -2.5),  # between 1.2 and 1.28: clipped by PPO, not with a higher upper clip
        (1.5, 2.0, -2.56, 0.0),
        (0.5, 2.0, -1.0, -1.0),  # good and less likely than it was: never clipped
        (1.5, -2.0, 3.0, 3.0),
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_every_case_of_the_clipped_surrogate(ratio: float, advantage: float, loss: float, slope: float) -> None:
    assert with_gradient(ratio, advantage) == pytest.approx((loss, slope), abs=1e-5)


def test_dual_clip_bounds_what_a_bad_token_costs() -> None:
    assert with_gradient(5.0, -2.0) == pytest.approx((10.0, 10.0), rel=1e-5)
    assert with_gradient(5.0, -2.0, dual_clip=3.0) == pytest.approx((6.0, 0.0))
    assert with_gradient(2.0, -2.0, dual_clip=3.0) == pytest.approx((4.0, 4.0), rel=1e-5)
    assert with_gradient(5.0, 2.0, dual_clip=3.0) == pytest.approx((-2.56, 0.0))


def test_the_first_step_on_policy_has_loss_0_and_a_gradient() -> None:
    logps = -torch.rand(6, 4).requires_grad_()
    advantages = group_advantages(torch.rand(2, 3)).flatten()[:, None]
    losses = policy_losses(logps, logps.detach(), advantages, clip_low=0.2, clip_high=0.2)
    total, count = aggregate(losses, torch.ones(6, 4), "sequence")
    assert abs(total.item() / count) < 1e-6
    (grad,) = torch.autograd.grad(total, logps)
    torch.testing.assert_close(grad, (-advantages / 4).expand(6, 4))


@pytest.mark.parametrize("difference", [1000.0, -1000.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_ratios_beyond_fp32_leave_loss_and_gradient_finite(difference: float, advantage: float) -> None:
    logps = torch.full((1, 1), difference, requires_grad=True)
    losses = policy_losses(logps, torch.zeros(1, 1), torch.tensor([[advantage]]), clip_low=0.2, clip_high=0.2)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logps.grad is not None
    assert logps.grad.isfinite().all()


def test_masked_slots_reach_neither_losses_nor_gradients() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    logps = torch.full((2, 3), -1.0).masked_fill(~mask, NAN).requires_grad_()
    values = torch.full((2, 3), 0.1).masked_fill(~mask, NAN).requires_grad_()
    poison = torch.zeros(2, 3).masked_fill(~mask, float("inf"))
    policy = policy_losses(
        logps, poison - 1.1, torch.tensor([[1.0], [-1.0]]), clip_low=0.2, clip_high=0.2, dual_clip=3.0, mask_bt=mask
    )
    critic = value_losses(values, poison, poison + 1.0, 0.2, mask)
    for losses, given in ((policy, logps), (critic, values)):
        assert (losses[~mask] == 0).all()
        for how in HOWS:
            total, _ = aggregate(losses, mask, how, 10.0)
            (grad,) = torch.autograd.grad(total, given, retain_graph=True)
            assert total.isfinite()
            assert grad.isfinite().all()
            assert (grad[~mask] == 0).all()
            assert (grad[mask] != 0).all()


def test_clipped_share_counts_tokens_that_learn_nothing() -> None:
    ratios = torch.tensor([[1.5, 1.1, 0.5, 0.5], [1.5, 0.5, NAN, NAN]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    share = clipped_share(
        ratios.log(), torch.zeros(2, 4), torch.tensor([[1.0], [-1.0]]), mask, clip_low=0.2, clip_high=0.2
    )
    assert share.item() == pytest.approx(2 / 6)


def test_gspo_has_one_ratio_an_answer() -> None:
    logps = -torch.rand(3, 5).requires_grad_()
    old, mask = -torch.rand(3, 5), torch.arange(5) < torch.tensor([[5], [2], [3]])
    advantages = torch.tensor([[1.0], [-1.0], [0.5]])
    losses = policy_losses(
        sequence_means(logps, mask)[:, None],
        sequence_means(old, mask)[:, None],
        advantages,
        clip_low=0.9,
        clip_high=9.0,
    )
    total, count = aggregate(losses, mask.any(-1, keepdim=True), "sequence")
    ratios = [math.exp((logps[i, :n].detach() - old[i, :n]).mean().item()) for i, n in enumerate(mask.sum(-1).tolist())]
    assert total.item() == pytest.approx(
        sum(-a * r for a, r in zip(advantages.flatten().tolist(), ratios, strict=True))
    )
    assert count == 3
    (grad,) = torch.autograd.grad(total, logps)
    assert grad[1, 0].item() == pytest.approx(ratios[1] / 2)


def test_importance_weights_are_capped_and_only_numbers() -> None:
    old = torch.tensor([[0.0, math.log(3.0), -1.0]], requires_grad=True)
    weights = importance_weights(old, torch.tensor([[0.0, 0.0, 0.0]]), cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 2.0, math.exp(-1)]]))
    assert not weights.requires_grad


def test_value_loss_is_half_the_larger_squared_error() -> None:
    values, old, returns = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 1.1]]), torch.tensor([[2.0, 2.0]])
    torch.testing.assert_close(value_losses(values, old, returns, None), torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(value_losses(values, old, returns, 0.2), torch.tensor([[1.8**2 / 2, 0.5]]))


def random_losses() -> tuple[Tensor, Tensor]:
    mask = torch.arange(7) < torch.tensor([7, 1, 4, 0, 2, 6])[:, None]
    return torch.randn(6, 7).masked_fill(~mask, NAN), mask


def test_aggregations_are_those_of_grpo_dapo_and_dr_grpo() -> None:
    losses, mask = random_losses()
    rows = [row[kept] for row, kept in zip(losses, mask, strict=True) if kept.any()]
    expected = {
        "token": (torch.cat(rows).sum(), 20),
        "sequence": (torch.stack([row.mean() for row in rows]).sum(), 5),
        "constant": (torch.cat(rows).sum() / 12, 5),
    }
    for how in HOWS:
        total, count = aggregate(losses, mask, how, 12)
        torch.testing.assert_close(total, expected[how][0])
        assert count == expected[how][1]


@pytest.mark.parametrize("how", HOWS)
def test_a_step_cut_into_micro_batches_is_the_same_step(how: Aggregation) -> None:
    losses, mask = random_losses()
    total, count = aggregate(losses, mask, how, 12)
    for rows in (1, 2, 4):
        parts = [aggregate(a, b, how, 12) for a, b in zip(losses.split(rows), mask.split(rows), strict=True)]
        torch.testing.assert_close(torch.stack([part for part, _ in parts]).sum(), total)
        assert sum(n for _, n in parts) == count
    wider = [torch.cat([one, torch.zeros(6, 3, dtype=one.dtype)], -1) for one in (losses, mask)]
    torch.testing.assert_close(aggregate(wider[0], wider[1], how, 12)[0], total)


def test_a_constant_must_be_given() -> None:
    with pytest.raises(AssertionError, match="needs one"):
        aggregate(torch.zeros(1, 1), torch.ones(1, 1), "constant")


def test_overlong_penalty_falls_within_its_margin() -> None:
    lengths = torch.tensor([1, 80, 90, 100, 500])
    torch.testing.assert_close(overlong_penalty(lengths, 100, 20), torch.tensor([0.0, 0.0, -0.5, -1.0, -1.0]))


def test_an_answer_without_an_end_costs_its_penalty() -> None:
    scores = missing_eos_penalty(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), 3.0)
    assert scores.tolist() == [1.0, -2.0]
