"""Estimators of KL by enumeration of a 3-token vocabulary, and where the score of an answer sits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from danlu.objectives.kl import AdaptiveKL, kl_k1, kl_k2, kl_k3, score_at_end
from danlu.objectives.logprobs import masked

Estimator = Callable[[Tensor, Tensor], Tensor]
POLICY, REFERENCE = torch.tensor([0.5, -0.3, 0.1]), torch.tensor([-0.2, 0.4, 0.3])


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum()


def test_k1_and_k3_are_unbiased_and_k3_never_negative() -> None:
    p, q = POLICY.log_softmax(-1), REFERENCE.log_softmax(-1)
    for estimator in (kl_k1, kl_k3):
        torch.testing.assert_close((p.exp() * estimator(p, q)).sum(), kl(p, q))
    assert (kl_k3(p, q) >= 0).all()
    assert (kl_k1(p, q) < 0).any()
    near = p + 1e-3 * torch.tensor([1.0, -1.0, 0.5])
    torch.testing.assert_close(kl_k2(p, near), kl_k3(p, near), rtol=2e-3, atol=0)


def gradient(loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    logits = POLICY.clone().requires_grad_()
    loss_of(logits.log_softmax(-1)).backward()
    assert logits.grad is not None
    return logits.grad


def as_loss(estimator: Estimator) -> Tensor:
    """Expected gradient of an estimator as a loss: over tokens drawn from the policy, whose drawing has no gradient."""
    q = REFERENCE.log_softmax(-1)
    return gradient(lambda p: (p.detach().exp() * estimator(p, q)).sum())


def test_as_losses_k1_teaches_nothing_k2_kl_and_k3_the_other_kl() -> None:
    q = REFERENCE.log_softmax(-1)
    assert as_loss(kl_k1).abs().max() < 1e-7
    true = gradient(lambda p: kl(p, q))
    assert true.abs().max() > 0.1
    torch.testing.assert_close(as_loss(kl_k2), true)
    torch.testing.assert_close(as_loss(kl_k3), gradient(lambda p: kl(q, p)))


def test_masked_log_probs_carry_no_nan_into_any_estimator() -> None:
    mask = torch.tensor([True, True, False])
    for estimator in (kl_k1, kl_k2, kl_k3):
        logps = torch.tensor([-1.0, -2.0, float("nan")], requires_grad=True)
        reference = torch.tensor([-1.5, -1.0, float("inf")])
        found = estimator(masked(logps, mask), masked(reference, mask))
        assert found[2] == 0
        found.sum().backward()
        assert logps.grad is not None
        assert logps.grad.isfinite().all()
        assert logps.grad[2] == 0


def test_the_score_sits_on_the_last_token_and_not_on_padding() -> None:
    nan = float("nan")
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    kl_bt = torch.tensor([[1.0, 2.0, 3.0, nan], [nan, 1.0, 2.0, 3.0], [1.0, nan, 2.0, nan], [nan] * 4])
    scores = torch.tensor([10.0, 20.0, 30.0, 40.0])
    assert score_at_end(scores, kl_bt, mask, 0.5).tolist() == [
        [-0.5, -1.0, 8.5, 0.0],
        [0.0, -0.5, -1.0, 18.5],
        [-0.5, 0.0, 29.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
    ]


def test_a_kl_with_gradient_is_only_a_number_in_the_reward() -> None:
    logps = torch.zeros(1, 2, requires_grad=True)
    rewards = score_at_end(torch.ones(1), kl_k1(logps, torch.ones(1, 2)), torch.ones(1, 2), 0.1)
    assert not rewards.requires_grad


def test_adaptive_kl_moves_towards_its_target_by_at_most_a_fifth_of_its_gain() -> None:
    controller = AdaptiveKL(0.1, target=6.0, horizon=1000)
    controller.update(6.0, 100)
    assert controller.coefficient == 0.1
    controller.update(6.6, 100)
    assert controller.coefficient == pytest.approx(0.1 * 1.01)
    controller.coefficient = 0.1
    controller.update(600.0, 100)
    assert controller.coefficient == pytest.approx(0.1 * 1.02)
    controller.coefficient = 0.1
    controller.update(-600.0, 100)
    assert controller.coefficient == pytest.approx(0.1 * 0.98)
    controller.update(float("nan"), 100)
    assert controller.coefficient == pytest.approx(0.1 * 0.98)
