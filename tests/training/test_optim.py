"""Muon, AdamW groups and schedules."""

from __future__ import annotations

import math

import pytest
import torch

from danlu.models.causal_lm import CausalLM
from danlu.models.config import model_config_for
from danlu.training.optim import Muon, build_optimizers, orthogonalize
from danlu.training.schedule import learning_rate_share, muon_momentum


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 96, 32), (2, 32, 96)])
def test_orthogonalize_keeps_directions_and_evens_out_sizes(shape: tuple[int, int, int]) -> None:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(g, torch.float32)
    sizes = torch.linalg.svdvals(result)
    assert sizes.max() < 1.3
    assert sizes[..., : shape[1] // 2].min() > 0.7
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    assert torch.cosine_similarity(result.flatten(1), (u @ vt).flatten(1)).min() > 0.97
    torch.testing.assert_close(orthogonalize(1e-4 * g, torch.float32), result, atol=1e-2, rtol=0)  # the scale is gone


def test_muon_treats_each_matrix_as_if_it_were_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(16, 8, generator=generator)) for _ in range(3)]
    alone = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    together, singles = Muon(weights, lr=0.1), [Muon([w], lr=0.1) for w in alone]
    for _ in range(3):
        for w, a in zip(weights, alone, strict=True):
            w.grad = torch.randn(16, 8, generator=generator)
            a.grad = w.grad.clone()
        together.step()
        for single in singles:
            single.step()
    for w, a in zip(weights, alone, strict=True):
        torch.testing.assert_close(w, a)


def test_muon_step_is_the_documented_formula() -> None:
    weight = torch.nn.Parameter(torch.zeros(16, 4))
    optimizer = Muon([weight], lr=0.1, momentum=0.9)
    grads = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0))
    momentum, expected = torch.zeros(16, 4), torch.zeros(16, 4)
    for g in grads:
        weight.grad = g.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * g
        nesterov = 0.1 * g + 0.9 * momentum
        expected = expected - 0.1 * math.sqrt(16 / 4) * orthogonalize(nesterov[None], torch.float32)[0]
    torch.testing.assert_close(weight.detach(), expected)


def test_weight_decay_acts_only_where_it_agrees_with_the_update() -> None:
    weight = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    plain = torch.nn.Parameter(weight.detach().clone())
    gradient = torch.eye(2)  # pushes both weights down: towards zero for the first, away from it for the second
    for w, decay in ((weight, 0.5), (plain, 0.0)):
        w.grad = gradient.clone()
        Muon([w], lr=0.1, weight_decay=decay).step()
    decayed = weight - plain
    assert decayed[0, 0] < -0.01
    assert decayed[1, 1] == 0


def test_every_weight_has_exactly_one_optimizer() -> None:
    for tie in (True, False):
        model = CausalLM(model_config_for(2, 320, tie_embeddings=tie))
        for name in ("muon", "adamw"):
            optimizers = build_optimizers(
                model,
                optimizer=name,
                matrix_lr=0.02,
                embed_lr=0.01,
                head_lr=0.01,
                norm_lr=0.01,
                weight_decay=0.0,
                muon_dtype=torch.float32,
            )
            owned = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
            assert sorted(owned) == sorted(id(p) for p in model.parameters())


def test_wsd_warms_up_stays_and_falls_to_zero() -> None:
    shares = [learning_rate_share(s, 1000, schedule="wsd", warmup=40, decay_share=0.5) for s in range(1000)]
    assert shares[0] == pytest.approx(1 / 41)
    assert set(shares[40:500]) == {1.0}
    assert shares[750] == pytest.approx(0.5)
    assert 0 < shares[-1] < 0.01
    assert shares[:41] == sorted(shares[:41])


def test_other_schedules() -> None:
    cosine = [learning_rate_share(s, 100, schedule="cosine", warmup=10, decay_share=0.5) for s in range(100)]
    assert cosine[10] == 1.0
    assert cosine[55] == pytest.approx(0.5)
    assert learning_rate_share(99, 100, schedule="constant", warmup=10, decay_share=0.5) == 1.0
    assert learning_rate_share(0, 1, schedule="wsd", warmup=40, decay_share=0.6) == 1.0  # a single step still learns
    assert muon_momentum(0) == 0.85
    assert muon_momentum(10_000) == pytest.approx(0.95)
