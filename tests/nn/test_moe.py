"""The mixture of experts against transformers and against its definition: the weighted sum of dense experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from danlu.nn.mlp import ACTIVATIONS
from danlu.nn.moe import MoE, Routing, grouped_linear, keep_out_of_graphs
from danlu.objectives.routing import load_balancing_loss

DIM, HIDDEN, EXPERTS = 12, 10, 5


def random_moe(n_experts: int = EXPERTS, top_k: int = 2, **options: bool) -> MoE:
    """Weights large enough that the router has opinions."""
    torch.manual_seed(0)
    moe = MoE(DIM, HIDDEN, n_experts, top_k, **{"normalize_top_k": True} | options)
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(std=0.5)
    return moe


def random_input(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(1))


def dense_sum(moe: MoE, x: Tensor) -> Tensor:
    """The definition: every expert on every token, weighted by zero where it was not chosen."""
    weights, experts, _ = moe.route(x)
    all_weights = torch.zeros(len(weights), len(moe.down_proj)).scatter(1, experts, weights)
    gate, up = torch.einsum("...d,efd->...ef", x.flatten(0, -2), moe.gate_up_proj).chunk(2, -1)
    y = torch.einsum("nef,edf->ned", moe.activation(gate) * up, moe.down_proj)
    return (all_weights[..., None] * y).sum(1).view_as(x)


def same_gradients(ours: Tensor, reference: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Gradients of a loss that weighs every output differently, for pairs of leaves."""
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    ours.backward(upstream)
    reference.backward(upstream)
    for a, b in pairs:
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-4)


def transformers_block(family: str, moe: MoE) -> torch.nn.Module:
    """The block of transformers with the weights of ours."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": DIM, "num_experts_per_tok": moe.top_k}
    if family == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock as Block

        config = transformers.MixtralConfig(**shape, intermediate_size=HIDDEN, num_local_experts=EXPERTS)
    else:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock as Block

        config = transformers.Qwen3MoeConfig(
            **shape, moe_intermediate_size=HIDDEN, num_experts=EXPERTS, norm_topk_prob=moe.normalize_top_k
        )
    block = Block(config)
    block.load_state_dict(
        {
            "gate.weight": moe.router.weight,
            "experts.gate_up_proj": moe.gate_up_proj,
            "experts.down_proj": moe.down_proj,
        }
    )
    return block


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", {}),
        ("mixtral", {"softmax_first": False}),
        ("qwen3_moe", {}),
        ("qwen3_moe", {"normalize_top_k": False}),
    ],
)
@pytest.mark.parametrize("top_k", [1, 3])
def test_equals_transformers(family: str, options: dict[str, bool], top_k: int) -> None:
    moe = random_moe(top_k=top_k, **options)
    block = transformers_block(family, moe)
    x, x_reference = random_input(3, 7).requires_grad_(), random_input(3, 7).requires_grad_()
    y, reference = moe(x), block(x_reference)
    torch.testing.assert_close(y, reference, rtol=0, atol=1e-5)
    experts = block.experts
    pairs = [(moe.gate_up_proj, experts.gate_up_proj), (moe.down_proj, experts.down_proj), (x, x_reference)]
    same_gradients(y, reference, [*pairs, (moe.router.weight, block.gate.weight)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_experts_chosen_is_the_dense_sum(activation: str) -> None:
    moe = random_moe(top_k=EXPERTS, normalize_top_k=False)
    moe.activation = ACTIVATIONS[activation]
    x = random_input(2, 6)
    torch.testing.assert_close(moe(x), dense_sum(moe, x), rtol=0, atol=1e-5)
    torch.testing.assert_close(moe.route(x).weights_nk.sum(-1), torch.ones(12))


def test_one_expert_gets_all_tokens_and_drops_none() -> None:
    moe = random_moe(top_k=1)
    x = random_input(2, 40).abs()
    with torch.no_grad():
        moe.router.weight.fill_(-1.0)[3] = 1.0
    assert set(moe.route(x).experts_nk.flatten().tolist()) == {3}
    y = moe(x)
    torch.testing.assert_close(y, dense_sum(moe, x), rtol=0, atol=1e-5)
    y.square().sum().backward()
    for weight in (moe.gate_up_proj, moe.down_proj):
        assert weight.grad is not None
        used = weight.grad.flatten(1).abs().amax(-1) > 0
        assert used.tolist() == [False, False, False, True, False]  # zero and not None: a step of an optimizer is exact


def test_permuted_tokens_give_permuted_outputs() -> None:
    moe, x = random_moe(), random_input(64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(moe(x)[order], moe(x[order]), rtol=0, atol=1e-5)
    torch.testing.assert_close(moe(x)[:5], moe(x[:5]), rtol=0, atol=1e-5)  # and how many others there are changes none


@pytest.mark.parametrize("shape", [(1,), (1, 1), (0,), (2, 0)])
def test_few_tokens(shape: tuple[int, ...]) -> None:
    moe, x = random_moe(), random_input(*shape).requires_grad_()
    y = moe(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y, dense_sum(moe, x), rtol=0, atol=1e-5)
    y.sum().backward()
    assert moe.gate_up_proj.grad is not None


def test_weights_and_input_of_different_dtypes() -> None:
    moe, x = random_moe(), random_input(4, 8)
    exact = moe(x)
    for weights, activations in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        mixed = random_moe().to(weights)
        moved = x.to(activations, copy=True).requires_grad_()
        y = mixed(moved)
        assert y.dtype == activations
        assert mixed.route(moved).logits_ne.dtype == torch.float32
        assert mixed.route(moved).weights_nk.dtype == torch.float32
        same = (mixed.route(moved).experts_nk == moe.route(x).experts_nk).all(-1).view(4, 8)
        assert same.float().mean() > 0.8  # rounding may turn a close decision, not most
        torch.testing.assert_close(y.float()[same], exact[same], rtol=0.05, atol=0.05)
        y.sum().backward()
        assert moved.grad is not None
        assert moved.grad.dtype == activations
        assert {p.grad.dtype for p in mixed.parameters() if p.grad is not None} == {weights}
        assert all(p.grad is not None for p in mixed.parameters())


@pytest.mark.parametrize("counts", [[3, 0, 4, 2], [0, 0, 9, 0], [9, 0, 0, 0]])
def test_grouped_linear_gradients_are_the_numeric_ones(counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(9, 5, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(4, 3, 5, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, counts), (x, weight))
    assert torch.autograd.gradcheck(lambda x: grouped_linear(x, weight.detach(), counts), (x,))  # frozen experts
    assert torch.autograd.gradcheck(lambda w: grouped_linear(x.detach(), w, counts), (weight,))


def test_routing_is_collected_only_when_asked_for() -> None:
    moe, x = random_moe(top_k=2), random_input(3, 4)
    routings: list[Routing] = []
    before = dict(vars(moe))
    y = moe(x, routings)
    assert torch.equal(y, moe(x))
    assert vars(moe) == before
    (routing,) = routings
    assert routing.weights_nk.shape == routing.experts_nk.shape == (12, 2)
    torch.testing.assert_close(routing.logits_ne, x.flatten(0, 1) @ moe.router.weight.T)
    best = routing.logits_ne.topk(2).indices
    assert torch.equal(routing.experts_nk, best)


def test_losses_on_the_routing_reach_the_router_through_checkpointing() -> None:
    def gradients(checkpointed: bool) -> list[Tensor]:
        moe, x = random_moe(), random_input(3, 8).requires_grad_()
        routings: list[Routing] = []
        y = checkpoint(moe, x, routings, use_reentrant=False) if checkpointed else moe(x, routings)
        assert len(routings) == 1
        loss = y.square().sum() + load_balancing_loss([r.logits_ne for r in routings], moe.top_k)
        return list(torch.autograd.grad(loss, [x, *moe.parameters()]))

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)


def test_a_new_routing_does_not_compile_again() -> None:
    torch.compiler.reset()
    moe = random_moe()
    keep_out_of_graphs(moe)
    compiled = torch.compile(moe, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            x = torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(seed)).requires_grad_()
            routings: list[Routing] = []
            y = compiled(x, routings)
            assert len(routings) == 1
            torch.testing.assert_close(y, moe(x))
            y.sum().backward()
    torch.compiler.reset()


def test_impossible_settings_are_refused() -> None:
    for top_k in (0, EXPERTS + 1):
        with pytest.raises(ValueError, match="top_k"):
            MoE(DIM, HIDDEN, EXPERTS, top_k, normalize_top_k=True)
    with pytest.raises(ValueError, match="softmax_first"):
        MoE(DIM, HIDDEN, EXPERTS, 2, normalize_top_k=False, softmax_first=False)
