"""Divergences against probabilities, their bounds and limits, temperature, the top k; hidden states and attention."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from danlu.objectives.distillation import (
    attention_loss,
    forward_kl,
    hidden_loss,
    jsd,
    reverse_kl,
    top_k_buckets,
    top_k_logprobs,
)

Divergence = Callable[..., Tensor]
DIVERGENCES: list[Divergence] = [forward_kl, reverse_kl, jsd]
VOCAB = 17


def random_pair(*shape: int, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    return spread * torch.randn(*shape, VOCAB), spread * torch.randn(*shape, VOCAB)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equal_distributions_are_0_apart_and_teach_nothing(divergence: Divergence, temperature: float) -> None:
    student, _ = random_pair(4, 3)
    shifted = student.clone().requires_grad_()
    found = divergence(shifted, student + 5.0, temperature)
    assert found.shape == (4, 3)
    assert found.abs().max() < 1e-5
    found.sum().backward()
    assert shifted.grad is not None
    assert shifted.grad.abs().max() < 1e-5


def test_divergences_are_those_of_probabilities() -> None:
    student, teacher = random_pair(5)
    p, q = teacher.div(2).softmax(-1), student.div(2).softmax(-1)
    torch.testing.assert_close(forward_kl(student, teacher, 2.0), 4 * (p * (p / q).log()).sum(-1))
    torch.testing.assert_close(reverse_kl(student, teacher, 2.0), 4 * (q * (q / p).log()).sum(-1))
    m = 0.3 * p + 0.7 * q
    expected = 0.3 * (p * (p / m).log()).sum(-1) + 0.7 * (q * (q / m).log()).sum(-1)
    torch.testing.assert_close(jsd(student, teacher, 2.0, beta=0.3), 4 * expected, rtol=1e-5, atol=1e-6)


def test_log_probs_are_logits() -> None:
    student, teacher = random_pair(5)
    for divergence in DIVERGENCES:
        of_logprobs = divergence(student.log_softmax(-1), teacher.log_softmax(-1), 2.0)
        torch.testing.assert_close(of_logprobs, divergence(student, teacher, 2.0), rtol=1e-5, atol=1e-6)


def test_forward_kl_teaches_the_difference_of_probabilities() -> None:
    student, teacher = random_pair(1)
    student.requires_grad_()
    forward_kl(student, teacher, 2.0).sum().backward()
    torch.testing.assert_close(student.grad, 2.0 * ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)))


def test_gradients_keep_their_size_when_the_temperature_rises() -> None:
    def gradient_norm(divergence: Divergence, temperature: float) -> float:
        student, teacher = random_pair(50, spread=1.0)
        student.requires_grad_()
        divergence(student, teacher, temperature).sum().backward()
        assert student.grad is not None
        return student.grad.norm().item()

    for divergence in DIVERGENCES:
        norms = [gradient_norm(divergence, temperature) for temperature in (1.0, 2.0, 4.0, 8.0, 64.0)]
        assert max(norms) < 3 * min(norms)
        assert norms[-1] == pytest.approx(norms[-2], rel=0.2)  # without T^2 it would be 64 times less


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    spread=st.floats(0.01, 300.0),
    beta=st.floats(0.01, 0.99),
)
def test_jsd_is_bounded_by_the_entropy_of_its_weights(seed: int, spread: float, beta: float) -> None:
    student, teacher = spread * torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(seed))
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert -1e-6 <= jsd(student, teacher, beta=beta).item() <= bound + 1e-5
    torch.testing.assert_close(
        jsd(student, teacher, beta=beta), jsd(teacher, student, beta=1 - beta), rtol=1e-4, atol=1e-6
    )


def test_jsd_reaches_ln_2_where_nothing_is_shared() -> None:
    student, teacher = torch.tensor([500.0, 0.0]), torch.tensor([0.0, 500.0])
    assert jsd(student, teacher).item() == pytest.approx(math.log(2))


def test_jsd_tends_to_both_divergences() -> None:
    student, teacher = random_pair(3, spread=1.0)
    torch.testing.assert_close(jsd(student, teacher, beta=1e-3) / 1e-3, forward_kl(student, teacher), rtol=2e-2, atol=0)
    torch.testing.assert_close(
        jsd(student, teacher, beta=1 - 1e-3) / 1e-3, reverse_kl(student, teacher), rtol=2e-2, atol=0
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_token_that_neither_can_say_adds_nothing(divergence: Divergence) -> None:
    student, teacher = random_pair(3)
    impossible = torch.full((3, 2), float("-inf"))
    longer = torch.cat([student, impossible], -1).requires_grad_()
    found = divergence(longer, torch.cat([teacher, impossible], -1), 1.5)
    torch.testing.assert_close(found, divergence(student, teacher, 1.5))
    found.sum().backward()
    assert longer.grad is not None
    assert longer.grad.isfinite().all()


def test_bfloat16_logits_are_taken_in_fp32() -> None:
    student, teacher = (one.bfloat16() for one in random_pair(4))
    for divergence in DIVERGENCES:
        found = divergence(student, teacher)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, divergence(student.float(), teacher.float()))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_top_k_with_one_token_left_out_is_the_whole(divergence: Divergence) -> None:
    student, teacher = random_pair(4, 2)
    logps, ids = top_k_logprobs(teacher, VOCAB - 1, 2.0)
    assert logps.shape == ids.shape == (4, 2, VOCAB - 1)
    found = 4 * divergence(*top_k_buckets(student, logps, ids, 2.0))
    torch.testing.assert_close(found, divergence(student, teacher, 2.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_top_k_is_a_lower_bound_that_rises_with_k(divergence: Divergence) -> None:
    student, teacher = random_pair(50)
    found = [divergence(*top_k_buckets(student, *top_k_logprobs(teacher, k))) for k in (1, 4, 12, VOCAB - 1)]
    for fewer, more in itertools.pairwise(found):
        assert (fewer <= more + 1e-6).all()


def test_top_k_buckets_hold_the_probability_of_the_rest() -> None:
    student, teacher = random_pair(6)
    logps, ids = top_k_logprobs(teacher, 3)
    for bucketed, logits in zip(top_k_buckets(student, logps, ids), (student, teacher), strict=True):
        probs = logits.softmax(-1)
        kept = probs.gather(-1, ids)
        torch.testing.assert_close(bucketed.exp(), torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1))


def test_a_teacher_sure_of_its_top_k_leaves_everything_finite() -> None:
    kept = torch.tensor([[0.0, -7.0]])  # as rounded in a cache: more than 1 together
    ids = torch.tensor([[0, 3]])
    for student, most in (
        (torch.tensor([[200.0, 0.0, -5.0, 193.0]]), 2e-3),
        (torch.tensor([[0.0, 200.0, 0.0, 0.0]]), 201),
    ):
        for divergence in DIVERGENCES:
            given = student.clone().requires_grad_()
            found = divergence(*top_k_buckets(given, kept, ids))
            found.sum().backward()
            assert -1e-6 <= found.item() < most
            assert given.grad is not None
            assert given.grad.isfinite().all()


def test_hidden_states_by_distance_and_by_angle() -> None:
    student, teacher = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    torch.testing.assert_close(hidden_loss(student, teacher).mean(), F.mse_loss(student, teacher))
    torch.testing.assert_close(hidden_loss(student, 3 * student, "cosine"), torch.zeros(2, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(hidden_loss(student, -student, "cosine"), torch.full((2, 3), 2.0))


def test_attention_is_compared_where_a_query_sees_a_key() -> None:
    student, teacher = torch.randn(2, 2, 4, 5, 5)
    visible = torch.ones(5, 5).tril().bool().expand(2, 5, 5).clone()
    visible[1, 3:] = False  # padding
    hidden = ~visible[:, None].expand(2, 4, 5, 5)
    given = student.masked_fill(hidden, float("-inf")).requires_grad_()
    found = attention_loss(given, teacher.masked_fill(hidden, float("nan")), visible)
    for b, t in [(0, 0), (0, 4), (1, 2)]:
        torch.testing.assert_close(found[b, t], F.mse_loss(student[b, :, t, : t + 1], teacher[b, :, t, : t + 1]))
    assert (found[1, 3:] == 0).all()
    found.sum().backward()
    assert given.grad is not None
    assert (given.grad[hidden] == 0).all()
    torch.testing.assert_close(
        attention_loss(student, teacher, torch.ones(1, 5, 5)).mean(), F.mse_loss(student, teacher)
    )
