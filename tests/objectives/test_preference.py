"""Preference losses: their value where policy and reference agree, the papers' formulas in probabilities, and
extremes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from danlu.objectives.preference import (
    DPOKind,
    dpo_losses,
    implicit_rewards,
    kto_kl,
    kto_losses,
    orpo_losses,
    simpo_losses,
)


def random_logps(n: int = 4, batch: int = 7) -> tuple[Tensor, ...]:
    return tuple(-5 * torch.rand(batch) for _ in range(n))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("sigmoid", math.log(2)), ("robust", math.log(2)), ("ipo", 1 / (2 * 0.1) ** 2), ("hinge", 1.0)],
)
def test_where_policy_and_reference_agree(kind: DPOKind, expected: float) -> None:
    chosen, rejected = random_logps(2)
    losses = dpo_losses(chosen, rejected, chosen, rejected, beta=0.1, kind=kind)
    torch.testing.assert_close(losses, torch.full((7,), expected))


def test_every_kind_pulls_chosen_and_rejected_apart_alike() -> None:
    for kind in get_args(DPOKind):
        chosen, rejected = (logps.requires_grad_() for logps in random_logps(2))
        dpo_losses(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.3, kind=kind).sum().backward()
        assert chosen.grad is not None
        assert rejected.grad is not None
        assert (chosen.grad < 0).all(), kind
        torch.testing.assert_close(chosen.grad, -rejected.grad)


def test_sigmoid_is_the_probability_of_the_label_as_the_paper_writes_it() -> None:
    chosen, rejected, ref_chosen, ref_rejected = random_logps()
    beta, wrong = 0.4, 0.2
    odds = (chosen.exp() / ref_chosen.exp()) ** beta / (rejected.exp() / ref_rejected.exp()) ** beta
    right = odds / (1 + odds)
    losses = dpo_losses(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    torch.testing.assert_close(losses, -right.log())
    smoothed = dpo_losses(chosen, rejected, ref_chosen, ref_rejected, beta=beta, label_smoothing=wrong)
    torch.testing.assert_close(smoothed, -(1 - wrong) * right.log() - wrong * (1 - right).log())


def test_robust_loss_of_flipped_labels_is_on_average_that_of_clean_ones() -> None:
    chosen, rejected, ref_chosen, ref_rejected = random_logps()
    flips = 0.3
    clean = dpo_losses(chosen, rejected, ref_chosen, ref_rejected, beta=0.4)
    kept = dpo_losses(chosen, rejected, ref_chosen, ref_rejected, beta=0.4, kind="robust", label_smoothing=flips)
    swapped = dpo_losses(rejected, chosen, ref_rejected, ref_chosen, beta=0.4, kind="robust", label_smoothing=flips)
    torch.testing.assert_close((1 - flips) * kept + flips * swapped, clean)


def test_ipo_is_least_at_its_margin() -> None:
    zero = torch.zeros(3)
    leads = torch.tensor([4.9, 5.0, 5.1])
    losses = dpo_losses(leads, zero, zero, zero, beta=0.1, kind="ipo")
    torch.testing.assert_close(losses, torch.tensor([0.01, 0.0, 0.01]))


def test_hinge_asks_for_a_lead_of_one_over_beta() -> None:
    zero = torch.zeros(3)
    losses = dpo_losses(torch.tensor([0.0, 2.0, 8.0]), zero, zero, zero, beta=0.25, kind="hinge")
    assert losses.tolist() == [1.0, 0.5, 0.0]


def test_label_smoothing_is_refused_where_it_means_nothing() -> None:
    for kind in ("ipo", "hinge"):
        with pytest.raises(AssertionError, match="no label smoothing"):
            dpo_losses(*random_logps(), beta=0.1, kind=kind, label_smoothing=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("margin", [1000.0, -1000.0])
def test_margins_of_1000_nats_are_finite_and_so_are_their_gradients(margin: float) -> None:
    zero = torch.zeros(1)
    losses: list[Callable[[Tensor], Tensor]] = [
        *(lambda x, kind=kind: dpo_losses(x, zero, zero, zero, beta=1.0, kind=kind) for kind in get_args(DPOKind)),
        lambda x: kto_losses(x, zero, torch.tensor([True]), 0.0, beta=1.0),
        lambda x: simpo_losses(x, zero, beta=10.0, margin=5.0),
        lambda x: orpo_losses(-x.abs(), zero - 0.5, beta=1.0),
    ]
    for loss in losses:
        chosen = torch.tensor([margin], requires_grad=True)
        value = loss(chosen)
        value.sum().backward()
        assert value.isfinite().all()
        assert chosen.grad is not None
        assert chosen.grad.isfinite().all()


def test_implicit_rewards_are_differences_and_carry_no_gradient() -> None:
    policy, reference = torch.tensor([-3.0, -5.0], requires_grad=True), torch.tensor([-4.0, -4.0])
    rewards = implicit_rewards(policy, reference, beta=0.5)
    assert rewards.tolist() == [0.5, -0.5]
    assert not rewards.requires_grad


def test_kto_is_half_the_weight_at_the_point_of_comparison() -> None:
    policy, reference = random_logps(2)
    good = torch.tensor([True, False, True, False, True, False, True])
    losses = kto_losses(reference + 0.7, reference, good, 0.7, beta=0.3, desirable_weight=2.0, undesirable_weight=3.0)
    torch.testing.assert_close(losses, torch.where(good, 1.0, 1.5))
    losses = kto_losses(policy, reference, good, torch.tensor(0.7), beta=0.3)
    gains = torch.sigmoid(0.3 * (policy - reference - 0.7))
    torch.testing.assert_close(losses, torch.where(good, 1 - gains, gains))


def test_kto_kl_is_a_mean_never_below_0_and_no_gradient_flows_into_it() -> None:
    policy = torch.tensor([1.0, 2.0], requires_grad=True)
    assert kto_kl(policy, torch.tensor([0.0, 0.0])) == 1.5
    assert kto_kl(policy, torch.tensor([5.0, 5.0])) == 0
    assert not kto_kl(policy, torch.zeros(2)).requires_grad


def test_orpo_is_likelihood_and_odds_ratio() -> None:
    chosen, rejected = random_logps(2)
    p, q = chosen.exp(), rejected.exp()
    ratio = (p / (1 - p)) / (q / (1 - q))
    expected = -p.log() - 0.2 * (ratio / (1 + ratio)).log()
    torch.testing.assert_close(orpo_losses(chosen, rejected, beta=0.2), expected)


def test_orpo_of_a_certain_answer_is_finite() -> None:
    chosen = torch.zeros(1, requires_grad=True)
    loss = orpo_losses(chosen, torch.tensor([-1.0]), beta=0.5)
    loss.sum().backward()
    assert 0 <= loss.item() < 1e-5
    assert chosen.grad is not None
    assert chosen.grad.isfinite().all()


def test_simpo_is_ln_2_at_its_margin() -> None:
    _, rejected = random_logps(2)
    losses = simpo_losses(rejected + 0.5, rejected, beta=2.0, margin=1.0)
    torch.testing.assert_close(losses, torch.full((7,), math.log(2)))
    assert (simpo_losses(rejected + 0.6, rejected, beta=2.0, margin=1.0) < losses).all()
