"""Advantages: GAE against a slow loop and closed forms, whitening, and groups; padding changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from danlu.objectives.advantages import Scale, gae, group_advantages, whiten

NAN = float("nan")


def slow_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The definition: sums of discounted TD errors, each from scratch."""
    after = [*values, 0.0][1:]
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, after, strict=True)]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


def rewards_and_values(batch: int = 4, t: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, t), torch.randn(batch, t)


@settings(deadline=None, max_examples=50)
@given(
    pattern=st.lists(st.booleans(), min_size=1, max_size=8),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_gae_equals_the_slow_loop_over_the_unmasked_tokens(
    pattern: list[bool], gamma: float, lam: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([pattern])
    rewards, values = torch.randn(2, 1, len(pattern), generator=generator)
    expected = torch.zeros(1, len(pattern))
    expected[mask] = torch.tensor(slow_gae(rewards[mask].tolist(), values[mask].tolist(), gamma, lam))
    advantages, returns = gae(
        rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, NAN), mask, gamma=gamma, lam=lam
    )
    torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(returns, (expected + values).masked_fill(~mask, 0.0), rtol=1e-4, atol=1e-5)


def test_gae_at_its_ends() -> None:
    rewards, values = rewards_and_values()
    everywhere = torch.ones_like(rewards)
    advantages, returns = gae(rewards, values, everywhere, 1.0, 1.0)
    to_come = rewards.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(advantages, to_come - values)
    torch.testing.assert_close(returns, to_come)
    advantages, _ = gae(rewards, values, everywhere, 0.9, 0.0)
    after = torch.cat([values[:, 1:], torch.zeros(len(values), 1)], -1)
    torch.testing.assert_close(advantages, rewards + 0.9 * after - values)


def test_padding_on_either_side_changes_no_advantage() -> None:
    rewards, values = rewards_and_values()
    everywhere, pad = torch.ones_like(rewards), torch.full((len(rewards), 3), NAN)
    alone = gae(rewards, values, everywhere, 0.9, 0.8)
    for padded_on_the_right in (True, False):

        def padded(inner: Tensor, fill: Tensor, right: bool = padded_on_the_right) -> Tensor:
            return torch.cat([inner, fill] if right else [fill, inner], -1)

        mask = padded(everywhere, torch.zeros_like(pad)).bool()
        for found, expected in zip(gae(padded(rewards, pad), padded(values, pad), mask, 0.9, 0.8), alone, strict=True):
            torch.testing.assert_close(found[mask].view(expected.shape), expected)
            assert (found[~mask] == 0).all()


def test_values_with_gradient_give_advantages_without() -> None:
    rewards, values = rewards_and_values()
    for found in gae(rewards, values.requires_grad_(), torch.ones_like(rewards), 1.0, 0.95):
        assert not found.requires_grad


def test_whitened_values_have_mean_0_and_variance_1_over_the_mask() -> None:
    values, mask = 3 + 5 * torch.randn(6, 9), torch.rand(6, 9) < 0.6
    poisoned = values.masked_fill(~mask, NAN)
    whitened = whiten(poisoned, mask)
    assert (whitened[~mask] == 0).all()
    assert whitened[mask].mean().abs() < 1e-6
    assert whitened[mask].var().item() == pytest.approx(1.0, abs=1e-5)
    shifted = whiten(poisoned, mask, shift_mean=False)
    assert shifted[mask].mean().item() == pytest.approx(values[mask].mean().item(), abs=1e-5)
    assert shifted[mask].var().item() == pytest.approx(1.0, abs=1e-5)


def test_whitening_of_equal_values_or_of_one_or_of_none_is_0() -> None:
    assert (whiten(torch.full((2, 7), 1e4 / 3), torch.ones(2, 7)) == 0).all()
    assert whiten(torch.tensor([[4.0, NAN]]), torch.tensor([[True, False]])).tolist() == [[0.0, 0.0]]
    assert whiten(torch.tensor([[NAN, NAN]]), torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]


def test_rewards_0_and_1_are_0_707_apart_from_0() -> None:
    advantages = group_advantages(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    expected = 1 / math.sqrt(2) * torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_equal_rewards_give_exactly_0(scale: Scale, leave_one_out: bool) -> None:
    rewards = torch.tensor([[0.1] * 7, [0.7] * 7, [1e4 / 3] * 7])  # whose means, rounded, are other numbers
    advantages = group_advantages(rewards, scale=scale, leave_one_out=leave_one_out)
    assert (advantages == 0).all()


def test_scales_and_leave_one_out_are_what_they_say() -> None:
    rewards = torch.rand(3, 5)
    centred = rewards - rewards.mean(-1, keepdim=True)
    torch.testing.assert_close(group_advantages(rewards, scale="none"), centred)
    torch.testing.assert_close(
        group_advantages(rewards, scale="group", eps=1e-4), centred / (rewards.std(-1, keepdim=True) + 1e-4)
    )
    torch.testing.assert_close(group_advantages(rewards, scale="batch", eps=1e-4), centred / (rewards.std() + 1e-4))
    others = torch.stack([rewards[:, [j for j in range(5) if j != i]].mean(-1) for i in range(5)], -1)
    torch.testing.assert_close(group_advantages(rewards, scale="none", leave_one_out=True), rewards - others)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_answers_without_a_reward_count_nowhere(scale: Scale, leave_one_out: bool) -> None:
    rewards = torch.rand(2, 4)
    mask = torch.zeros(2, 6).bool()
    mask[:, [1, 2, 4, 5]] = True
    with_gaps = torch.full((2, 6), NAN).masked_scatter(mask, rewards)
    found = group_advantages(with_gaps, mask, scale=scale, leave_one_out=leave_one_out)
    expected = group_advantages(rewards, scale=scale, leave_one_out=leave_one_out)
    torch.testing.assert_close(found[mask].view(2, 4), expected)
    assert (found[~mask] == 0).all()
    alone = torch.tensor([[NAN, 5.0], [NAN, NAN]])
    assert (group_advantages(alone, ~alone.isnan(), scale=scale, leave_one_out=leave_one_out) == 0).all()
