"""The paged runner against the same model without a cache: whatever is mixed in a step, wherever the blocks lie."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from paged_sequences import SHAPE, Sequences, random_model

from danlu.engine.torch_runner import TorchRunner
from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.nn.config import Experts, ModelConfig, Rope, RopeScaling
from danlu.nn.paged import PagedKV

GPT: dict[str, Any] = {
    "norm": "layer", "gated": False, "activation": "gelu_tanh", "qkv_bias": True, "attention_out_bias": True,
    "ffn_bias": True, "n_kv_heads": 4,
}  # fmt: skip
LONGROPE = RopeScaling(
    "longrope", 4.0, original_context=16, short_factors=(1.0, 1.1, 1.2, 1.3), long_factors=(1.5, 2.0, 3.0, 4.0)
)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope": Rope()},
    "llama 3": {"rope": Rope(base=500.0, scaling=RopeScaling("llama3", 8.0, original_context=32))},
    "yarn": {"rope": Rope(scaling=RopeScaling("yarn", 4.0, original_context=16))},
    "mistral": {"rope": Rope(), "window": 7},
    "qwen 3 moe": {"rope": Rope(), "qk_norm": "head", "experts": Experts(4, 2, 16, dense_layers=(1,))},
    "gemma 2": {
        "rope": Rope(), "window": 6, "full_layers": (1,), "attention_softcap": 2.0, "logit_softcap": 3.0,
        "attention_scale": 0.3, "arrangement": "sandwich", "norm_offset": True, "embed_scale": 5.66,
    },
    "gemma 3": {
        "rope": Rope(base=900.0, scaling=RopeScaling("linear", 8.0)), "local_rope": Rope(base=20.0), "window": 5,
        "full_layers": (2,), "qk_norm": "head", "arrangement": "sandwich", "norm_offset": True,
    },
    "smollm 3": {"rope": Rope(), "nope_layers": (1,)},
    "olmo 2": {"rope": Rope(), "qk_norm": "full", "arrangement": "branch"},
    "glm 4": {"rope": Rope(dim=4, interleaved=True), "arrangement": "sandwich", "qkv_bias": True},
    "gpt-2": {**GPT, "learned_positions": True, "attention_scale_by_layer": True},
    "gpt-neox": {**GPT, "rope": Rope(dim=4), "arrangement": "parallel_two_norms"},
    "phi-2": {**GPT, "rope": Rope(dim=4), "arrangement": "parallel", "head_bias": True},
    "bloom": {**GPT, "alibi": "bloom", "embed_norm": True, "n_heads": 6, "n_kv_heads": 6},
    "falcon 7b": {**GPT, "rope": Rope(), "arrangement": "parallel", "n_kv_heads": 1},
    "falcon rw": {**GPT, "alibi": "falcon"},
    "relative": {"relative_buckets": 8, "relative_max_distance": 20},
}  # fmt: skip


def decoder(options: dict[str, Any]) -> CausalLM:
    return random_model(lambda: CausalLM(ModelConfig(**{**SHAPE, **options})))


LENGTHS = [40, 3, 1, 28, 17, 33, 40]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block_size", [1, 4])
def test_steps_of_any_mixture_give_the_logits_of_the_model(family: str, block_size: int) -> None:
    sequences = Sequences(TorchRunner(decoder(FAMILIES[family]), block_size=block_size), LENGTHS)
    assert sequences.errors(sequences.play()).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma 2", "bloom"])
def test_decodes_of_many_sequences(family: str) -> None:
    """One token of each, after prompts of all lengths at once."""
    sequences = Sequences(TorchRunner(decoder(FAMILIES[family])), list(range(21, 45)), seed=1)
    parts = [[logits] for logits in sequences.advance([(i, i + 1) for i in range(24)])]
    for _ in range(20):
        for part, logits in zip(parts, sequences.advance([(i, 1) for i in range(24)]), strict=True):
            part.append(logits)
    assert sequences.errors([torch.cat(part) for part in parts]).abs().max() < 1e-4


@pytest.mark.parametrize("scaling", [RopeScaling("dynamic", 2.0), LONGROPE], ids=lambda scaling: scaling.kind)
def test_rotary_scaling_goes_by_the_length_each_sequence_may_reach(scaling: RopeScaling) -> None:
    model = decoder({"rope": Rope(scaling=scaling), "context": 24})
    lengths, max_lens = [30, 10, 25, 12, 10], [40, 10, 60, 30, 16]
    sequences = Sequences(TorchRunner(model, block_size=4), lengths, max_lens)
    found = sequences.play()
    far = 0.0
    for ids, max_len, logits in zip(sequences.ids, max_lens, found, strict=True):
        with torch.inference_mode():
            longer = torch.cat((ids, torch.zeros(max_len - len(ids), dtype=torch.long)))  # looks at its length
            assert (model(longer[None])[0, : len(ids)] - logits).abs().max() < 1e-4
            far = max(far, (model(ids[None])[0] - logits).abs().max().item())
    assert far > 1e-2, "the scaling does not show"


@pytest.mark.parametrize("family", ["llama", "gemma 2", "falcon rw"])
@pytest.mark.parametrize(("kv_dtype", "bound"), [("int8", 0.025), (torch.bfloat16, 0.01), (torch.float32, 1e-5)])
def test_cache_dtypes(family: str, kv_dtype: Any, bound: float) -> None:
    """``bound``: root mean square of the errors, in standard deviations of the logits; the worst may be ten times that.
    Measured here: up to 0.016 with int8 and 0.0065 with bfloat16; 0.019 where flipped choices of experts add to it."""
    model = decoder(FAMILIES[family])
    sequences = Sequences(TorchRunner(model, block_size=4, kv_dtype=kv_dtype), LENGTHS)
    found = sequences.play()
    errors = sequences.errors(found) / torch.cat(found).std()
    assert errors.square().mean().sqrt() < bound
    assert errors.abs().max() < 10 * bound


def test_int8_is_within_half_a_step_of_each_head() -> None:
    """The step is a 127th of the head's largest, rounded to bfloat16; heads of very different sizes keep their own."""
    kv = PagedKV(ModelConfig(**SHAPE), [(0, 1, 2)], 4, torch.int8)
    kv.allocate([3])
    sizes = 10.0 ** torch.arange(-8, 8).view(2, 4, 2, 1)
    k, v = torch.randn(2, 4, 2, 8, generator=torch.Generator().manual_seed(0)) * sizes
    v[0] = 0
    slots = torch.tensor([9, 2, 0, 5])
    kv.write(1, slots, k, v)
    for stored, exact in zip(kv.read(1, slots[None], torch.float32), (k, v), strict=True):
        step = exact.abs().amax(-1, keepdim=True) / 127
        assert ((stored[0].transpose(0, 1) - exact).abs() <= step * 0.51).all()


def test_a_prompt_may_be_cut_anywhere_with_int8() -> None:
    """What a token sees of another is what is stored, also in one step: pieces of a prompt change nothing."""
    model = decoder(FAMILIES["llama"])
    whole, cut = (Sequences(TorchRunner(model, kv_dtype="int8"), [30]) for _ in range(2))
    pieces = [*cut.advance([(0, 7)]), *cut.advance([(0, 20)]), *cut.advance([(0, 1)]), *cut.advance([(0, 2)])]
    assert (whole.advance([(0, 30)])[0] - torch.cat(pieces)).abs().max() < 1e-4


def test_activations_in_bfloat16() -> None:
    model = decoder(FAMILIES["gemma 3"])
    model.compute_dtype = torch.bfloat16
    sequences = Sequences(TorchRunner(model, block_size=4), LENGTHS)
    assert sequences.runner._kv.dtype == torch.bfloat16
    assert sequences.errors(sequences.play()).abs().max() < 0.15


def test_memory_of_a_block() -> None:
    model = decoder({"rope": Rope(), "head_dim": 64, "window": 8, "full_layers": (0,)})
    sizes = {}
    for kv_dtype in (None, torch.bfloat16, "int8"):
        runner = TorchRunner(model, block_size=16, kv_dtype=kv_dtype)
        runner.allocate([5, 9])
        for group, n in enumerate((5, 9)):
            memory = runner._kv._blocks[group].nbytes + (runner._kv._scales[group].nbytes if kv_dtype == "int8" else 0)
            assert memory == (n + 1) * runner.block_bytes(group)
        sizes[kv_dtype] = runner.block_bytes(0)
        assert runner.block_bytes(1) == 2 * runner.block_bytes(0)  # two layers have the window, one sees everything
    assert sizes[None] == 2 * 2 * 16 * 64 * 4
    assert sizes[torch.bfloat16] == sizes[None] / 2
    assert 0.5 < sizes["int8"] / sizes[torch.bfloat16] < 0.52


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_copied_blocks_go_their_own_way(kv_dtype: Any) -> None:
    """Two answers to one prompt: they share its full blocks, and each has its own copy of the last."""
    model = decoder({**FAMILIES["gemma 3"], "window": 40})
    sequences = Sequences(TorchRunner(model, block_size=4, kv_dtype=kv_dtype), [14, 14], seed=3)
    sequences.ids[1][:10] = sequences.ids[0][:10]
    sequences.advance([(0, 10)])
    for group, blocks in enumerate(sequences.tables):
        blocks[1, :2] = blocks[0, :2]
        blocks[1, 2] = sequences.free[group].pop()
        sequences.runner.copy_blocks(group, [(int(blocks[0, 2]), int(blocks[1, 2]))])
    sequences.done[1] = 10
    found = sequences.advance([(0, 4), (1, 4)])
    with torch.inference_mode():
        for logits, ids in zip(found, sequences.ids, strict=True):
            assert (model(ids[None])[0, 10:] - logits).abs().max() < (1e-4 if kv_dtype is None else 0.3)
    assert (found[0] - found[1]).abs().max() > 1
    sequences.runner.copy_blocks(0, [])


def test_chosen_rows_and_hidden_states() -> None:
    model = decoder(FAMILIES["gemma 2"])
    sequences = Sequences(TorchRunner(model), [9, 5])
    batch = sequences.batch([(1, 5), (0, 9)], logits_at=[13, 4])
    with torch.inference_mode():
        hidden = torch.stack([model.hidden_states(ids[None])[0, -1] for ids in sequences.ids])
        assert (sequences.runner.hidden(batch) - hidden).abs().max() < 1e-5
        assert (sequences.runner.run(batch) - model.head(hidden)).abs().max() < 1e-5


def test_weights_are_read_at_each_run() -> None:
    model = decoder(FAMILIES["llama"])
    sequences = Sequences(TorchRunner(model), [5])
    batch = sequences.batch([(0, 5)])
    before = sequences.runner.run(batch)
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight.mul_(2)
    after = sequences.runner.run(batch)
    assert sequences.errors([after]).abs().max() < 1e-5
    assert (after - before).abs().max() > 0.1
    model(sequences.ids[0][None]).sum().backward()  # nothing of a run is left in the model


def test_what_cannot_run_is_refused() -> None:
    model = decoder({**FAMILIES["gpt-2"], "context": 8})
    with pytest.raises(DanluError, match="cannot be kept as float64"):
        TorchRunner(model, kv_dtype=torch.float64)
    with pytest.raises(DanluError, match="block_size is 0"):
        TorchRunner(model, block_size=0)
    sequences = Sequences(TorchRunner(model), [9])
    with pytest.raises(DanluError, match="9 tokens is longer than the model's table of 8 positions"):
        sequences.runner.run(sequences.batch([(0, 9)]))
    sequences = Sequences(TorchRunner(model), [3])
    with pytest.raises(DanluError, match="'mine' is asked for"):
        sequences.runner.run(replace(sequences.batch([(0, 3)]), adapters=("mine",)))
