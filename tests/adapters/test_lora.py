"""Adapters compute what their formulas say, leave the base alone, and go into the weights and out again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import assert_close, random_ids, randomize, save_random
from torch import Tensor

from danlu.adapters.config import AdapterShape, parse_share
from danlu.adapters.lora import adapted, attach, merge, training_flops, unmerge
from danlu.adapters.sites import n_weights
from danlu.adapters.wrapper import activate, disabled, effective_weights, unwrap, wrappers
from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.models.heads import RewardModel
from danlu.models.load import load_model, save_model
from danlu.objectives.causal_lm import next_token_nll_sum
from danlu.quantization.packed_linear import PackedLinear, dequantize_linears, quantize_linears

IDS = random_ids(2, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a random model of a family."""
    root = tmp_path_factory.mktemp("bases")

    def of(family: str) -> Path:
        path = root / family
        return path if path.exists() else save_random(path, family)

    return of


def logits(model: CausalLM) -> Tensor:
    with torch.no_grad():
        return model(IDS)


def trained(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("quantize", [False, True])
def test_a_fresh_adapter_changes_nothing(folder: Callable[[str], Path], kind: Any, quantize: bool) -> None:
    model = load_model(folder("llama"))
    if quantize:
        quantize_linears(model)
    before = logits(model)
    attach(model, AdapterShape(kind, rank=3))
    assert_close(logits(model), before, 1e-5)
    assert set(trained(model)) == {name for name, _ in model.named_parameters() if ".adapters." in name}
    randomize(model)
    assert (logits(model) - before).abs().max() > 0.05
    with disabled(model):
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("rslora", [False, True])
def test_dora_is_its_formula(folder: Callable[[str], Path], rslora: bool) -> None:
    model = load_model(folder("llama"))  # its query projections have biases
    attach(model, AdapterShape("dora", rank=4, alpha=6, rslora=rslora, targets=("q_proj",)))
    randomize(model)
    layer = adapted(model)[0]
    adapter: Any = layer.adapters["default"]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    v = layer.weight + 6 / (2 if rslora else 4) * adapter.b @ adapter.a
    expected = x @ (adapter.magnitude[:, None] * v / v.norm(dim=1, keepdim=True)).T + layer.bias
    assert_close(layer(x), expected, 1e-5)
    # The norm counts as a constant in the gradient (section 4.3).
    frozen = x @ (adapter.magnitude[:, None] * v / v.norm(dim=1, keepdim=True).detach()).T
    wanted = torch.autograd.grad(frozen.square().sum(), [adapter.a, adapter.b, adapter.magnitude, x])
    got = torch.autograd.grad((layer(x) - layer.bias).square().sum(), [adapter.a, adapter.b, adapter.magnitude, x])
    for ours, theirs in zip(got, wanted, strict=True):
        assert_close(ours, theirs, 1e-3)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "llama, tied", "phi3", "gpt2"])
def test_merged_weights_compute_the_same_and_come_out_again(
    folder: Callable[[str], Path], tmp_path: Path, family: str, kind: Any
) -> None:
    model = load_model(folder(family))
    before = {name: p.clone() for name, p in model.named_parameters()}
    attach(model, AdapterShape(kind, rank=3, token_ids=(4, 7)))
    randomize(model)
    beside = logits(model)
    weights = effective_weights(model)
    assert set(weights) == set(before)
    merge(model)
    assert_close(logits(model), beside, 1e-5)
    plain = load_model(folder(family))
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(weights[name])
    assert_close(logits(plain), beside, 1e-5)
    with pytest.raises(ValueError, match="unmerge"), disabled(model):
        pass
    unmerge(model)
    assert_close(logits(model), beside, 1e-5)
    activate(model, None)
    unwrap(model)
    for name, p in model.named_parameters():
        assert_close(p, before[name], 1e-5)


def test_a_tied_head_with_an_adapter_is_untied_when_it_is_merged(folder: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = load_model(folder("llama, tied"))
    embedding = model.embed.weight.clone()
    attach(model, AdapterShape(rank=3, targets=("lm_head",)))
    randomize(model)
    beside = logits(model)
    merge(model)
    assert not model.config.tie_embeddings
    assert torch.equal(model.embed.weight, embedding)
    assert_close(logits(model), beside, 1e-5)
    unmerge(model)
    assert model.config.tie_embeddings
    assert model.head.base.weight is model.embed.weight  # type: ignore[union-attr]
    merge(model)
    unwrap(model)
    save_model(model, tmp_path / "merged")
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
    assert_close(reference, beside)
    assert_close(logits(load_model(tmp_path / "merged")), beside)


def test_four_bits_are_dequantized_to_be_merged(folder: Callable[[str], Path]) -> None:
    model = load_model(folder("llama"))
    quantize_linears(model)
    packed = sum(isinstance(module, PackedLinear) for module in model.modules())
    attach(model, AdapterShape("dora", rank=3, targets=("q_proj", "down_proj")))
    randomize(model)
    beside = logits(model)
    assert_close(logits_of_weights(folder("llama"), effective_weights(model)), beside, 1e-5)
    merge(model)
    assert_close(logits(model), beside, 1e-5)
    unmerge(model)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == packed
    assert torch.equal(logits(model), beside)
    merge(model)
    unwrap(model)
    dequantize_linears(model)
    assert_close(logits(model), beside, 1e-5)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def logits_of_weights(folder: Path, weights: dict[str, Tensor]) -> Tensor:
    plain = load_model(folder)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(weights[name])
    return logits(plain)


def test_only_the_active_one_of_two_adapters_counts(folder: Callable[[str], Path]) -> None:
    model = load_model(folder("llama"))
    base = logits(model)
    attach(model, AdapterShape(rank=2, targets=("q_proj",)), name="first")
    randomize(model, 1)
    first = logits(model)
    attach(model, AdapterShape(rank=3), name="second")
    assert torch.equal(logits(model), base)
    randomize(model, 2)
    second = logits(model)
    activate(model, "first")
    assert torch.equal(logits(model), first)
    with disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), first)
    activate(model, "second")
    assert torch.equal(logits(model), second)
    with pytest.raises(ValueError, match="already"):
        attach(model, AdapterShape(rank=2), name="first")
    with pytest.raises(ValueError, match="no adapter"):
        activate(model, "third")


@pytest.mark.parametrize("quantize", [False, True])
def test_gradients_survive_checkpointing_and_the_base_gets_none(folder: Callable[[str], Path], quantize: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = load_model(folder("llama"))
        if quantize:
            quantize_linears(model)
        attach(model, AdapterShape("dora", rank=3, token_ids=(2, 9)))
        randomize(model)
        model.train().gradient_checkpointing = checkpointing
        next_token_nll_sum(model.head(model.hidden_states(IDS)), IDS.roll(-1)).backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        return {name: p.grad for name, p in trained(model).items() if p.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    assert all(grad.abs().max() > 0 for grad in plain.values())
    for name in plain:
        assert_close(plain[name], again[name], 1e-5)


def test_adapters_stay_fp32_beside_half_weights(folder: Callable[[str], Path]) -> None:
    exact, half = load_model(folder("llama")), load_model(folder("llama"), dtype=torch.bfloat16)
    for model in (exact, half):
        attach(model, AdapterShape("dora", rank=3))
        randomize(model)
        assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert half.embed.weight.dtype == torch.bfloat16
    assert (logits(half) - logits(exact)).abs().max() < 0.02 * logits(exact).abs().max()
    next_token_nll_sum(half.head(half.hidden_states(IDS)), IDS).backward()
    assert {p.grad.dtype for p in trained(half).values() if p.grad is not None} == {torch.float32}


def test_dropout_acts_while_training_only(folder: Callable[[str], Path]) -> None:
    model = load_model(folder("llama"))
    attach(model, AdapterShape(rank=3, dropout=0.5))
    randomize(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


@pytest.mark.slow
def test_blocks_with_adapters_compile_into_one_graph(folder: Callable[[str], Path]) -> None:
    model = load_model(folder("llama"))
    attach(model, AdapterShape("dora", rank=3))
    randomize(model)
    expected = logits(model)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for block in model.layers:
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    assert_close(logits(model), expected, 1e-6)
    assert len(graphs) == 1
    with disabled(model):
        logits(model)
    assert_close(logits(model), expected, 1e-6)


def test_rows_of_tokens_are_all_that_is_trained_of_the_tables(folder: Callable[[str], Path]) -> None:
    for family in ("llama", "llama, tied"):
        model = load_model(folder(family))
        attach(model, AdapterShape(rank=2, targets=("q_proj",), token_ids=(3, 5)))
        rows = {name: p for name, p in trained(model).items() if p.shape == (2, 32) and "table" in name}
        assert len(rows) == (1 if "tied" in family else 2)
        before = logits(model)
        with torch.no_grad():
            for p in rows.values():
                p.add_(1.0)
        after = logits(model)
        seen = ((IDS == 3) | (IDS == 5)).cumsum(dim=1) > 0  # from the first of them on, all hidden states change
        others = [i for i in range(80) if i not in (3, 5)]
        assert (before[..., [3, 5]] != after[..., [3, 5]]).any()
        assert torch.equal(before[~seen][:, others], after[~seen][:, others])


def test_a_reward_head_is_trained_whole(folder: Callable[[str], Path]) -> None:
    model = load_model(folder("llama"), RewardModel, new_head=True)
    attach(model, AdapterShape(rank=2))
    assert [name for name in trained(model) if ".adapters." not in name] == ["head.weight"]


def test_the_budget_chooses_as_many_matrices_as_get_rank_one(folder: Callable[[str], Path]) -> None:
    def chosen(budget: float, **options: Any) -> tuple[Any, int, int]:
        model = load_model(folder("llama"))
        total = n_weights(model)
        shape = attach(model, AdapterShape(budget=budget, **options))
        return shape, sum(p.numel() for p in trained(model).values()), int(budget * total)

    for budget in (0.25, 0.1, 0.055, 0.03):
        for kind in ("lora", "dora"):
            shape, n, allowed = chosen(budget, kind=kind)
            assert n <= allowed < n + n / shape.rank
    assert chosen(0.25)[0].targets == ("all-linear",)
    assert chosen(0.04)[0].targets == ("k_proj", "o_proj", "q_proj", "v_proj")
    assert chosen(0.02)[0].targets == ("q_proj", "v_proj")
    assert chosen(0.25, targets=("v_proj",))[0].targets == ("v_proj",)
    with pytest.raises(DanluError, match=r"rank 1 on q_proj, v_proj has [\d,]+ \(1\.\d+%\)"):
        chosen(0.001)
    assert (parse_share("0.1%"), parse_share("0.5")) == (0.001, 0.5)
    for text in ("0", "-1%", "101%", "nan", "much", "%"):
        with pytest.raises(DanluError, match="share"):
            parse_share(text)


def test_targets_are_named_as_in_peft(folder: Callable[[str], Path]) -> None:
    def names(family: str, *targets: str) -> list[str]:
        model = load_model(folder(family))
        attach(model, AdapterShape(rank=1, targets=targets))
        return list(wrappers(model))

    assert names("llama", "v_proj") == [f"layers.{i}.attention.v_proj" for i in (0, 1)]
    assert names("llama", "1.self_attn.v_proj", "lm_head") == ["layers.1.attention.v_proj", "head"]
    assert len(names("llama", r"model\.layers\.0\..*_proj")) == 7
    assert names("phi3", "qkv_proj") == [f"layers.{i}.attention.{p}_proj" for i in (0, 1) for p in "qkv"]
    assert len(names("mixtral", "all-linear")) == 8  # neither experts nor routers
    with pytest.raises(DanluError, match="'q_proj'; there are down_proj, gate_up_proj, lm_head, o_proj, qkv_proj"):
        names("phi3", "q_proj")
    with pytest.raises(DanluError, match="experts cannot have adapters"):
        names("mixtral", "w1")
    with pytest.raises(DanluError, match="regular expression"):
        names("llama", "(")
    with pytest.raises(DanluError, match="caps its logits"):
        names("gemma2", "lm_head")
    with pytest.raises(DanluError, match="rank 100 is more"):
        attach(load_model(folder("llama")), AdapterShape(rank=100))


def test_layers_that_are_stored_in_one_share_an_a(folder: Callable[[str], Path]) -> None:
    model = load_model(folder("phi3"))
    attach(model, AdapterShape(rank=2, targets=("qkv_proj",)))
    adapters: list[Any] = [layer.adapters["default"] for layer in adapted(model)]
    assert len({id(adapter.a) for adapter in adapters}) == 2
    assert sum(p.numel() for p in trained(model).values()) == 2 * 2 * (32 + 32 + 16 + 16)


def test_frozen_weights_cost_two_thirds(folder: Callable[[str], Path]) -> None:
    model = load_model(folder("llama"))
    full, attention = model.estimate_flops(64), model.estimate_flops(64) - model.estimate_flops(0)
    assert training_flops(model, 64) == full
    attach(model, AdapterShape(rank=2))
    added = 6 * sum(p.numel() for p in trained(model).values())
    assert training_flops(model, 64) == attention + (full - attention) * 4 // 6 + added
    packed = load_model(folder("llama"))
    quantize_linears(packed)
    attach(packed, AdapterShape(rank=2))
    assert training_flops(packed, 64) == training_flops(model, 64)
    assert n_weights(packed) == n_weights(load_model(folder("llama")))


def test_no_model_folder_is_written_of_what_has_adapters_or_is_quantized(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load_model(folder("llama"))
    quantize_linears(model)
    with pytest.raises(DanluError, match=r"layers\.0\.attention\.q_proj: is a PackedLinear.*dequantize"):
        save_model(model, tmp_path / "out")
    dequantize_linears(model)
    attach(model, AdapterShape(rank=2))
    randomize(model)
    expected = logits(model)
    for _ in range(2):
        with pytest.raises(DanluError, match=r"adapter.*save_adapter.*lora\.merge, then wrapper\.unwrap"):
            save_model(model, tmp_path / "out")
        merge(model)
    assert not (tmp_path / "out").exists()
    unwrap(model)
    save_model(model, tmp_path / "out")
    assert_close(logits(load_model(tmp_path / "out")), expected)
