"""Head and loss in pieces are head and loss at once, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from danlu.objectives.causal_lm import projected_nll_sum

DIM, VOCAB = 8, 13


def plain(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, scale: float | None, softcap: float | None
) -> Tensor:
    """The formula, written out."""
    x = hidden if scale is None else hidden * scale
    logits = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)).float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return -logits.log_softmax(-1).gather(1, targets[:, None]).sum()


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(0, 11), rows=st.integers(1, 12), with_bias=st.booleans(), frozen=st.booleans(),
    scale=st.sampled_from([None, 0.3]), softcap=st.sampled_from([None, 2.0]), seed=st.integers(0, 100),
)  # fmt: skip
def test_pieces_are_the_whole(
    n: int, rows: int, with_bias: bool, frozen: bool, scale: float | None, softcap: float | None, seed: int
) -> None:
    torch.manual_seed(seed)
    hidden, weight = torch.randn(n, DIM, requires_grad=True), torch.randn(VOCAB, DIM, requires_grad=not frozen)
    bias = torch.randn(VOCAB, requires_grad=not frozen) if with_bias else None
    targets = torch.randint(0, VOCAB, (n,))
    learned = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    wanted = plain(hidden, weight, targets, bias, scale, softcap)
    found = projected_nll_sum(hidden, weight, targets, rows=rows, bias_v=bias, scale=scale, softcap=softcap)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-6)
    # Divided by the targets of the step, as the loop does.
    for one, other in zip(
        torch.autograd.grad(found / 7, learned), torch.autograd.grad(wanted / 7, learned), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        again = projected_nll_sum(hidden, weight, targets, rows=rows, bias_v=bias, scale=scale, softcap=softcap)
    assert torch.equal(again, found.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_fp32_weights(dtype: torch.dtype) -> None:
    """As far from the exact gradient as plain half precision is, and in the dtypes of what it belongs to."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, DIM).to(dtype).requires_grad_(), torch.randn(VOCAB, DIM, requires_grad=True)
    targets = torch.randint(0, VOCAB, (40,))
    exact = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    wanted = torch.autograd.grad(plain(*exact, targets, None, None, None), exact)
    # Scaled by a large number, as a gradient scaler does, and back.
    total = projected_nll_sum(hidden, weight, targets, rows=16) * 1024
    found = torch.autograd.grad(total, [hidden, weight])
    assert [g.dtype for g in found] == [dtype, torch.float32]
    for one, other in zip(found, wanted, strict=True):
        assert (one.float() / 1024 - other).norm() < (0.02 if dtype == torch.bfloat16 else 0.003) * other.norm()


def test_a_tied_weight_gets_both_gradients() -> None:
    torch.manual_seed(0)
    weight = torch.randn(VOCAB, DIM, requires_grad=True)
    ids, targets = torch.randint(0, VOCAB, (9,)), torch.randint(0, VOCAB, (9,))
    projected_nll_sum(F.embedding(ids, weight), weight, targets, rows=4).backward()
    (wanted,) = torch.autograd.grad(plain(F.embedding(ids, weight), weight, targets, None, None, None), weight)
    torch.testing.assert_close(weight.grad, wanted, atol=1e-6, rtol=1e-5)


def test_no_more_logits_than_asked_for() -> None:
    hidden, weight = torch.randn(64, DIM, requires_grad=True), torch.randn(5000, DIM)
    with torch.profiler.profile(profile_memory=True) as profile:
        projected_nll_sum(hidden, weight, torch.zeros(64, dtype=torch.long), rows=4).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events() or [])
    assert largest <= 2 * 4 * 5000 * 4


def test_the_gradient_is_taken_once() -> None:
    hidden, targets = torch.randn(3, DIM, requires_grad=True), torch.tensor([1, 2, 3])
    total = projected_nll_sum(hidden, torch.randn(VOCAB, DIM), targets, rows=2)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already taken"):
        total.backward()
