"""The native kernels against the model in torch: every shape they cover, every mixture of steps, packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paged_sequences import SHAPE, VOCAB, Sequences, random_model
from test_torch_runner import FAMILIES, LENGTHS, LONGROPE
from torch import Tensor, nn

from danlu.adapters.config import AdapterShape
from danlu.adapters.lora import attach
from danlu.engine.engine_config import EngineConfig
from danlu.engine.native_runner import NativeRunner, weights_in_use, why_not
from danlu.engine.runners import open_runner
from danlu.engine.torch_runner import TorchRunner
from danlu.errors import DanluError
from danlu.formats.gguf_blocks import PackedTensor, quantize
from danlu.kernels import native
from danlu.models.causal_lm import CausalLM
from danlu.nn.config import ModelConfig, Rope, RopeScaling
from packed_weights import packed
from random_adapters import random_adapter

pytestmark = pytest.mark.skipif(native.choose()[0] is None, reason=f"no native kernels: {native.choose()[1]}")

# Three query heads a key head, an odd vocabulary, and outputs that fill no tile.
OWN: dict[str, Any] = {"dim": 96, "n_heads": 6, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 72}
COVERED = ["llama", "llama 3", "yarn", "mistral", "gemma 2", "gemma 3", "smollm 3", "olmo 2", "glm 4"]


def options(family: str) -> dict[str, Any]:
    return {**FAMILIES[family], **OWN}


def decoder(options: dict[str, Any], seed: int = 0) -> CausalLM:
    return random_model(lambda: CausalLM(ModelConfig(**{**SHAPE, **options})), seed)


class NativeSequences(Sequences):
    """The same, over a runner whose model is beside it; ``weights`` in place of the model's own."""

    def __init__(self, model: CausalLM, lengths: Sequence[int], *args: Any, weights: Any = None, **how: Any) -> None:
        runner = NativeRunner(model.config, weights or dict(model.named_parameters()), threads=2, **how)
        runner.model = model  # type: ignore[attr-defined]
        super().__init__(runner, lengths, *args)  # type: ignore[arg-type]

    def poison(self, group: int, blocks: list[int]) -> None:
        for stored in self.runner._caches[group]:  # type: ignore[attr-defined]
            stored[blocks] = 0xFF  # NaN as float and as bfloat16; as int8 the scales are NaN


@pytest.mark.parametrize("family", COVERED)
def test_steps_of_any_mixture_give_the_logits_of_the_model(family: str) -> None:
    sequences = NativeSequences(decoder(options(family)), LENGTHS, kv_dtype="fp32")
    assert sequences.errors(sequences.play()).abs().max() < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "gelu"},
        {"activation": "relu", "tie_embeddings": True},
        {"attention_out_bias": True, "ffn_bias": True, "qkv_bias": True, "head_bias": True},
        {"head_scale": 0.3, "embed_scale": 3.0, "tie_embeddings": True},
        {"attention_scale_by_layer": True},
        {"n_kv_heads": 6, "head_dim": 32},
        {"n_kv_heads": 1, "head_dim": 48},
        {"n_kv_heads": 3, "head_dim": 80},
    ],
    ids=str,
)
def test_traits(changes: dict[str, Any]) -> None:
    model = decoder({**options("llama"), **changes})
    sequences = NativeSequences(model, LENGTHS, kv_dtype="fp32")
    assert sequences.errors(sequences.play()).abs().max() < 1e-4


def test_long_prompts_and_many_decodes() -> None:
    """More rows than a weight tile is kept for, more keys than are scored at once, windows that end in between."""
    for family in ("llama", "gemma 3"):
        model = decoder({**options(family), "context": 512, **({"window": 150} if family == "gemma 3" else {})})
        sequences = NativeSequences(model, [300, 290, 310], kv_dtype="fp32")
        parts = [[logits] for logits in sequences.advance([(0, 280), (1, 289), (2, 150)])]
        parts[2] += sequences.advance([(2, 150)])
        for _ in range(10):
            for part, i in zip((parts[0], parts[2]), (0, 2), strict=True):
                part += sequences.advance([(i, 1)])
        parts[1] += sequences.advance([(1, 1)])
        parts[0] += sequences.advance([(0, 10)])
        assert sequences.errors([torch.cat(part) for part in parts]).abs().max() < 2e-4


@pytest.mark.parametrize("scaling", [RopeScaling("dynamic", 2.0), LONGROPE], ids=lambda scaling: scaling.kind)
def test_rotary_scaling_goes_by_the_length_each_sequence_may_reach(scaling: RopeScaling) -> None:
    rope = Rope(
        scaling=replace(scaling, short_factors=scaling.short_factors * 2, long_factors=scaling.long_factors * 2)
    )
    model = decoder({**options("llama"), "rope": rope, "context": 24})
    max_lens = [40, 10, 60, 30, 16]
    sequences = NativeSequences(model, [30, 10, 25, 12, 10], max_lens, kv_dtype="fp32")
    for ids, max_len, logits in zip(sequences.ids, max_lens, sequences.play(), strict=True):
        with torch.inference_mode():
            longer = torch.cat((ids, torch.zeros(max_len - len(ids), dtype=torch.long)))
            assert (model(longer[None])[0, : len(ids)] - logits).abs().max() < 1e-4


@pytest.mark.parametrize("kv_dtype", ["int8", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gemma 2"])
def test_cache_dtypes(family: str, kv_dtype: str) -> None:
    """Rounding costs what it costs the torch runner."""
    model = decoder(options(family))
    theirs = Sequences(TorchRunner(model, kv_dtype="int8" if kv_dtype == "int8" else torch.bfloat16), LENGTHS)
    ours = NativeSequences(model, LENGTHS, kv_dtype=kv_dtype)
    expected, found = (of.errors(of.play()).pow(2).mean().sqrt() for of in (theirs, ours))
    assert 0.8 < found / expected < 1.25


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("family", ["llama", "gemma 3"])
def test_a_token_is_computed_alike_whatever_else_runs(family: str, kind: str) -> None:
    """To the bit: one row or many, few pieces of work (whose keys are split) or enough, any piece of a prompt."""
    model = decoder(
        {**options(family), "dim": 128, "ffn_dim": 160, "context": 512, "window": 150 if family == "gemma 3" else None}
    )
    weights: dict[str, Any] = dict(model.named_parameters())
    for name, value in weights.items():
        if kind != "F32" and value.ndim == 2:
            weights[name] = PackedTensor(kind, tuple(value.shape), quantize(value.detach(), kind))
    found = []
    for seed, lengths in ((0, [330]), (1, [330, 300, 280, 310, 200, 100, 50]), (2, [330, 20])):
        sequences = NativeSequences(model, lengths, weights=weights, kv_dtype="bf16")
        sequences.ids[0] = torch.arange(330) % VOCAB
        sequences.random.seed(seed)
        found.append(sequences.play()[0])
    together = NativeSequences(model, [330], weights=weights, kv_dtype="bf16")
    together.ids[0] = torch.arange(330) % VOCAB
    found += together.advance([(0, 330)])
    for logits in found[1:]:
        assert torch.equal(found[0], logits)


@pytest.mark.parametrize("family", ["llama", "gemma 2", "olmo 2"])
@pytest.mark.parametrize("wanted", [[], [4], [24, 44, 45], [0, 1, 2, 19, 30, 40]], ids=str)
def test_what_is_not_wanted_is_left_out_and_changes_nothing(family: str, wanted: list[int], tmp_path: Path) -> None:
    """To the bit: the last layer goes on with the wanted rows alone, each with its adapter."""
    model = decoder(options(family))
    sequences = NativeSequences(model, [25, 20, 20], kv_dtype="fp32")
    for name, seed in (("a", 0), ("b", 1)):
        sequences.runner.load_adapter(name, random_adapter(model, tmp_path / name, 4, seed=seed))
    batch = replace(sequences.batch([(0, 25), (1, 1), (2, 20)]), adapters=("a", None, "b"))
    every = sequences.runner.run(batch)
    few = replace(batch, logits_at=np.array(wanted, np.int32))
    assert torch.equal(sequences.runner.run(few), every[wanted])
    assert torch.equal(sequences.runner.hidden(few), sequences.runner.hidden(batch)[wanted])


def test_hidden_states_and_copies() -> None:
    model = decoder(options("llama"))
    sequences = NativeSequences(model, [20, 20], kv_dtype="fp32")
    batch = sequences.batch([(0, 20)], logits_at=[3, 19])
    with torch.inference_mode():
        hidden = model.hidden_states(sequences.ids[0][None])[0]
    torch.testing.assert_close(sequences.runner.hidden(batch), hidden[[3, 19]], atol=1e-4, rtol=0)
    # The second sequence takes over the first one's second block: its last four tokens continue the same keys.
    sequences.runner.copy_blocks(0, [(int(batch.tables[0][0, 1]), sequences.free[0][-1])])
    sequences.ids[1] = sequences.ids[0]
    sequences.tables[0][1, :2] = [batch.tables[0][0, 0], sequences.free[0].pop()]
    sequences.done[1] = 19
    (logits,) = sequences.advance([(1, 1)])
    with torch.inference_mode():
        torch.testing.assert_close(logits[0], model(sequences.ids[0][None])[0, -1], atol=1e-4, rtol=0)


def rounded_to_8_bits(x: Tensor, rest: bool) -> Tensor:
    """By blocks of 32; with what that leaves, in 8 bits more, or without."""
    blocks = x.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
    codes = (blocks / scale).round()
    more = ((blocks / scale - codes) * 254).round() / 254 if rest else 0
    return ((codes + more) * scale).flatten(-2)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K"])
def test_packed_products(kind: str) -> None:
    """The same sums as with the unpacked weights and activations rounded to 8 bits, for values to more. Where a value
    lies between two codes, rounding errors of fp32 decide, and all that follows differs: sequences of one token keep
    that to themselves."""
    model = decoder({**options("llama"), "ffn_dim": 256, "dim": 256, "head_dim": 32, "n_heads": 8, "n_layers": 1})
    weights = packed(model, kind)
    if kind not in native.WEIGHT_KINDS:  # repacked once
        packed(model, "Q8_0")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            of_values = name.endswith("v_proj")
            module.register_forward_pre_hook(lambda _, x, more=of_values: (rounded_to_8_bits(x[0], more),))
    sequences = NativeSequences(model, [1] * 48, weights=weights, kv_dtype="fp32")
    steps = [[0], [1], [2], list(range(3, 19)), list(range(19, 48))]  # one row at a time, a few, many
    found = [logits for step in steps for logits in sequences.advance([(i, 1) for i in step])]
    worst = sequences.errors(found).abs().amax(dim=1)
    assert worst.median() < 2e-5
    assert worst.max() < 0.5


def test_float_weights_are_packed_on_request() -> None:
    model = decoder({**options("llama"), "ffn_dim": 96, "n_layers": 1})
    ids = torch.randint(0, VOCAB, (40,))
    with torch.inference_mode():
        expected = model(ids[None])[0]
    for weight_dtype, bound in (("int8", 0.05), ("int4", 0.6)):
        sequences = NativeSequences(model, [40], weight_dtype=weight_dtype, kv_dtype="fp32")
        sequences.ids = [ids]
        error = (torch.cat(sequences.advance([(0, 40)])) - expected).pow(2).mean().sqrt()
        assert 1e-4 < error / expected.std() < bound
        assert {matrix.kind for matrix in sequences.runner._matrices} == {"Q8_0" if weight_dtype == "int8" else "Q4_1"}  # type: ignore[attr-defined]


def test_new_weights() -> None:
    first, second = (decoder(options("llama"), seed) for seed in (0, 1))
    sequences = NativeSequences(first, [30], kv_dtype="fp32")
    sequences.runner.update(dict(second.named_parameters()))  # type: ignore[attr-defined]
    sequences.runner.model = second
    assert sequences.errors(sequences.advance([(0, 30)])).abs().max() < 1e-4


def test_what_has_no_kernel_is_said() -> None:
    for family, what in {"gpt-2": "LayerNorm", "qwen 3 moe": "experts", "bloom": "positions in the scores"}.items():
        assert what in str(why_not(decoder(FAMILIES[family]).config))
    with pytest.raises(DanluError, match="heads of 8"):
        NativeRunner.of(decoder(FAMILIES["llama"]))


def test_a_model_in_training_runs_with_the_numbers_that_it_multiplies_with() -> None:
    """Master weights are fp32; of a step in bf16 the products see them rounded. Adapters are not rounded into them."""
    model = decoder({**options("llama"), "tie_embeddings": True})
    model.compute_dtype = torch.bfloat16
    runner, _ = open_runner(model, EngineConfig(), None)
    assert isinstance(runner, NativeRunner)
    assert {matrix.kind for matrix in runner._matrices} == {"BF16"}
    rounded = decoder({**options("llama"), "tie_embeddings": True})
    with torch.no_grad():
        for p in rounded.parameters():
            if p.ndim == 2:
                p.copy_(p.bfloat16())
    sequences = NativeSequences(rounded, LENGTHS, weights=weights_in_use(model), kv_dtype="fp32")
    assert sequences.errors(sequences.play()).abs().max() < 1e-4

    attach(model, AdapterShape(rank=2), seed=0)
    assert all(weight.dtype == torch.float32 for weight in weights_in_use(model).values())
