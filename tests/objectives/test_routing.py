"""Router losses against transformers, closed forms, and their behaviour when a batch is split."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from danlu.objectives.routing import expert_load, load_balancing_loss, router_z_loss

LAYERS, BATCH, SEQ, EXPERTS = 3, 4, 6, 5


def random_logits() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [2 * torch.randn(BATCH * SEQ, EXPERTS, generator=generator) for _ in range(LAYERS)]


def padding_mask() -> Tensor:
    """Rows of different lengths, padded on either side."""
    mask = torch.ones(BATCH, SEQ, dtype=torch.long)
    mask[0, 2:] = 0
    mask[1, :3] = 0
    return mask


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_loss_equals_transformers(top_k: int, masked: bool) -> None:
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    mask = padding_mask() if masked else None
    ours = [logits.requires_grad_() for logits in random_logits()]
    theirs = [logits.requires_grad_() for logits in random_logits()]
    loss = load_balancing_loss(ours, top_k, mask)
    reference = modeling.load_balancing_loss_func(tuple(theirs), EXPERTS, top_k, mask)
    torch.testing.assert_close(loss, reference)
    loss.backward()
    reference.backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad)


def test_load_balancing_loss_is_top_k_in_balance_and_all_experts_in_collapse() -> None:
    balanced = torch.eye(EXPERTS).repeat(4, 1) * 1e-3  # every expert first for a fifth of the tokens, all nearly equal
    torch.testing.assert_close(load_balancing_loss([balanced], 1), torch.tensor(1.0), rtol=0, atol=1e-3)
    collapsed = torch.zeros(20, EXPERTS)
    collapsed[:, 2] = 50.0
    torch.testing.assert_close(load_balancing_loss([collapsed], 1), torch.tensor(float(EXPERTS)))


def test_router_z_loss_is_the_sum_of_squared_logsumexp() -> None:
    logits = random_logits()
    kept = padding_mask().flatten().bool()
    expected = sum(row.exp().sum().log() ** 2 for layer in logits for row in layer[kept])
    torch.testing.assert_close(router_z_loss(logits, padding_mask()), torch.as_tensor(expected))
    uniform = torch.zeros(7, EXPERTS)
    torch.testing.assert_close(router_z_loss([uniform, uniform]), 14 * torch.tensor(EXPERTS).log() ** 2)


def test_router_z_loss_of_a_batch_is_that_of_its_halves() -> None:
    logits, mask = random_logits(), padding_mask().flatten()
    cut = 10
    halves = [router_z_loss([layer[part] for layer in logits], mask[part]) for part in (slice(cut), slice(cut, None))]
    torch.testing.assert_close(router_z_loss(logits, mask), halves[0] + halves[1])


def test_padding_counts_nowhere() -> None:
    mask = padding_mask()
    logits, poisoned = random_logits(), random_logits()
    for layer in poisoned:
        layer[mask.flatten() == 0] = 30.0 * torch.arange(EXPERTS)
    for loss in (lambda x: load_balancing_loss(x, 2, mask), lambda x: router_z_loss(x, mask)):
        torch.testing.assert_close(loss(logits), loss(poisoned))
    nothing = torch.zeros_like(mask)
    assert load_balancing_loss(logits, 2, nothing) == 0
    assert router_z_loss(logits, nothing) == 0


def test_expert_load_counts_tokens() -> None:
    experts = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 0]])
    assert expert_load(experts, 5).tolist() == [1.0, 0.5, 0.25, 0.25, 0.0]
    assert expert_load(experts, 5, torch.tensor([True, True, False, False])).tolist() == [1.0, 0.5, 0.5, 0.0, 0.0]


def test_half_precision_logits_are_summed_in_fp32() -> None:
    logits = [layer.bfloat16() for layer in random_logits()]
    rounded = [layer.float() for layer in logits]
    assert load_balancing_loss(logits, 2).dtype == router_z_loss(logits).dtype == torch.float32
    torch.testing.assert_close(load_balancing_loss(logits, 2), load_balancing_loss(rounded, 2))
    torch.testing.assert_close(router_z_loss(logits), router_z_loss(rounded))
