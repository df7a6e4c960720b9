"""Layers in 4 bits against plain ones with the unpacked weight, and what quantizing a model does to it."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from danlu.errors import DanluError
from danlu.formats.gguf_blocks import dequantize, quantize
from danlu.models.causal_lm import CausalLM
from danlu.models.heads import MaskedLM
from danlu.models.load import load_model, save_model
from danlu.nn.config import Experts, ModelConfig, Rope
from danlu.nn.linear import Head, Linear
from danlu.quantization.packed_linear import PackedLinear, dequantize_linears, quantize_linears

IN, KINDS = 96, ("NF4", "Q4_0", "Q4_1")


def make_linear(bias: bool = True, kind: str = "NF4") -> Linear:
    """One that is packed in this type."""
    torch.manual_seed(0)
    linear = Linear(IN, 33, bias=bias)
    if kind != "NF4":
        with torch.no_grad():
            linear.weight.copy_(dequantize(quantize(linear.weight, kind), kind, (33, IN)))
    return linear


def make_model(**changes: Any) -> CausalLM:
    """Two layers of seven matrices."""
    torch.manual_seed(0)
    shape = {"n_layers": 2, "dim": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 96}
    model = CausalLM(
        ModelConfig(**{**shape, "vocab_size": 50, "context": 64, "rope": Rope(), "tie_embeddings": True, **changes})
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def output_and_gradients(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradient_are_those_of_the_dequantized_layer(dtype: torch.dtype, bias: bool, kind: str) -> None:
    layer = PackedLinear.from_linear(make_linear(bias, kind))
    assert layer.kind == kind
    x = torch.randn(2, 5, IN, dtype=dtype)
    found, expected = output_and_gradients(layer, x), output_and_gradients(layer.to_linear(), x)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert torch.allclose(one, other, rtol=0, atol=1e-6 if dtype == torch.float32 else 0)


def test_weight_is_frozen_and_near_the_original() -> None:
    linear = make_linear()
    layer = PackedLinear.from_linear(linear)
    assert not any(p.requires_grad for p in layer.parameters())
    assert torch.equal(layer.bias, linear.bias)  # type: ignore[arg-type]
    assert (layer.to_linear().weight - linear.weight).norm() / linear.weight.norm() < 0.1


def test_a_bias_can_be_trained() -> None:
    layer = PackedLinear.from_linear(make_linear())
    plain = layer.to_linear()
    x = torch.randn(2, 5, IN)
    for module in (layer, plain):
        module.bias.requires_grad_()
        module(x).square().sum().backward()
    assert torch.allclose(layer.bias.grad, plain.bias.grad, atol=1e-5)  # type: ignore[union-attr,arg-type]


def test_nothing_is_kept_for_the_backward_pass() -> None:
    """A plain layer keeps its weight, and in another dtype a copy of it."""
    kept: dict[str, int] = {}
    for name, layer in (
        ("packed", PackedLinear.from_linear(make_linear())),
        ("plain", make_linear().requires_grad_(False)),
    ):
        sizes: list[int] = []
        with saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            layer(torch.randn(2, 5, IN, dtype=torch.bfloat16, requires_grad=True))
        kept[name] = sum(sizes)
    assert kept == {"packed": 0, "plain": IN * 33}


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant: bool) -> None:
    network = nn.Sequential(PackedLinear.from_linear(make_linear()), nn.Tanh())
    x = torch.randn(4, IN)
    expected = output_and_gradients(network, x)
    found = output_and_gradients(_Checkpointed(network, reentrant), x)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


@pytest.mark.parametrize("double", [False, True])
def test_state_comes_back(double: bool) -> None:
    layer = PackedLinear.from_linear(make_linear(), double=double)
    other = PackedLinear.from_linear(Linear(IN, 33), double=double)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, IN)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert set(layer.state_dict()) == {"codes", "absmax", "bias"} | ({"steps", "mean"} if double else set())


def test_state_of_a_files_blocks_comes_back() -> None:
    layer, other = (PackedLinear.from_linear(make_linear(kind="Q4_1")) for _ in range(2))
    other.data.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.to_linear().weight, layer.to_linear().weight)
    assert set(layer.to(torch.bfloat16).state_dict()) == {"data", "bias"}
    assert torch.equal(other.to_linear().weight, layer.to_linear().weight)


@pytest.mark.parametrize("double", [False, True])
def test_a_cast_leaves_the_weight_as_it_is(double: bool) -> None:
    layer = PackedLinear.from_linear(make_linear(), double=double)
    before = layer.to_linear().weight
    layer.to(torch.bfloat16).half()
    assert torch.equal(layer.to_linear().weight, before)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float16
    moved = layer.to("meta")
    assert all(part.device.type == "meta" for part in moved.state_dict().values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_of_it_is_whole(kind: str) -> None:
    """`torch.compile` breaks nowhere, and what it traced is the same."""
    layer = PackedLinear.from_linear(make_linear(kind=kind))
    x = torch.randn(4, IN)
    expected = output_and_gradients(layer, x)
    found = output_and_gradients(torch.compile(layer, backend="aot_eager", fullgraph=True), x)  # type: ignore[arg-type]
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, expected, strict=True))


def test_a_model_computes_as_with_the_dequantized_weights() -> None:
    model = make_model(qkv_bias=True)
    original = copy.deepcopy(model)
    quantize_linears(model)
    linears = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert len(linears) == 14
    assert all(name.startswith("layers.") for name in linears)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, original.embed.weight)

    ids = torch.randint(0, 50, (2, 12))
    plain = copy.deepcopy(model)
    dequantize_linears(plain)
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in original.named_parameters()}
    gradients = []
    for one in (model, plain):
        one.train().gradient_checkpointing = one is model
        one(ids).logsumexp(-1).sum().backward()
        gradients.append(one.embed.weight.grad)
    assert torch.equal(model(ids), plain(ids))
    assert not torch.allclose(model(ids), original(ids), atol=1e-3)
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]


def test_a_wide_weight_is_gone_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    wide = [weakref.ref(module.weight) for module in model.layers.modules() if isinstance(module, Linear)]
    alive: list[int] = []
    from_linear = PackedLinear.from_linear

    def counted(linear: nn.Linear, **options: Any) -> PackedLinear:
        alive.append(sum(weight() is not None for weight in wide))
        return from_linear(linear, **options)

    monkeypatch.setattr(PackedLinear, "from_linear", counted)
    quantize_linears(model)
    assert alive == list(range(14, 0, -1))


def test_a_mapped_file_leaves_no_pages(tmp_path: Path) -> None:
    model = make_model(dim=512, n_heads=8, n_kv_heads=8, head_dim=64, ffn_dim=1024, qk_norm="head")
    n_bytes = 4 * sum(p.numel() for p in model.layers.parameters())
    save_model(model, tmp_path)
    before = mapped_bytes()
    model = load_model(tmp_path)
    quantize_linears(model)
    assert n_bytes > 20e6
    assert mapped_bytes() - before < 0.5 * n_bytes  # code of libraries is mapped, too


def mapped_bytes() -> int:
    """Pages of mapped files that lie in memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssFile:")[1].split()[0]) * 1024


def test_layers_can_be_kept() -> None:
    model = make_model()
    quantize_linears(model, keep=("head", "layers.0", "o_proj"))
    kept = {name for name, module in model.named_modules() if type(module) is Linear}
    assert {name.split(".")[1] for name in kept} == {"0", "1"}
    assert {name for name in kept if name.startswith("layers.1")} == {"layers.1.attention.o_proj"}
    with pytest.raises(DanluError, match=r"no layer is called layers\.9"):
        quantize_linears(make_model(), keep=("layers.9",))


def test_what_belongs_to_a_head_stays() -> None:
    model = MaskedLM(make_model().config)
    quantize_linears(model, keep=())
    assert type(model.transform) is Linear
    assert type(model.head) is Head
    assert isinstance(model.get_submodule("layers.0.attention.q_proj"), PackedLinear)


def test_what_cannot_be_quantized_is_refused_by_name() -> None:
    model = make_model()
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[3, 5] = torch.nan  # type: ignore[union-attr,index]
    with pytest.raises(DanluError, match=r"layers\.1\.mlp\.down_proj\.weight: holds NaN"):
        quantize_linears(model)
    with pytest.raises(DanluError, match=r"layers\.0\.mlp: the experts"):
        quantize_linears(make_model(experts=Experts(number=4, top_k=2, ffn_dim=32, normalize_top_k=True)))
    with pytest.raises(DanluError, match="no linear layer"):
        quantize_linears(nn.Sequential(nn.Tanh()))
