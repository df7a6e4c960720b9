"""The decoder against transformers, and against itself: packed, cached and checkpointed runs agree with plain ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.models.config import model_config_for
from danlu.models.load import load_model, save_model
from danlu.nn.config import ModelConfig
from danlu.nn.kv_cache import KVCache
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.tokenizer.train import train_on

VOCAB = 320
CONFIGS = {
    "grouped-query, tied": model_config_for(2, VOCAB, context=64, tie_embeddings=True),
    "multi-head, untied": model_config_for(2, VOCAB, context=64, n_kv_heads=2),
    "narrow heads, other base": model_config_for(
        3, VOCAB, context=64, dim=96, n_heads=6, n_kv_heads=2, rope_base=50_000
    ),
}


def random_model(config: ModelConfig) -> CausalLM:
    """All weights random: zero-initialised projections would hide half of the model from a test."""
    model = CausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(mean=1.0 if p.ndim == 1 else 0.0, std=0.1, generator=generator)
    return model.eval()


def random_ids(*shape: int) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_on([f"def f{i}(x):\n    return x + {i}\n" for i in range(200)], VOCAB, 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = random_model(CONFIGS[name])
    save_model(model, tmp_path, tokenizer)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = random_ids(2, 64)
    with torch.no_grad():
        difference = (reference(ids).logits - model(ids)).abs().max()
    assert difference < 1e-4
    assert reference.config.eos_token_id == tokenizer.eos_id
    assert type(reference).__name__ == "Qwen3ForCausalLM"


def test_folder_round_trip_is_exact(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(CONFIGS["grouped-query, tied"])
    save_model(model, tmp_path, tokenizer)
    again = load_model(tmp_path)
    assert again.config == model.config
    assert again.head.weight is again.embed.weight
    assert torch.equal(again(random_ids(1, 16)), model(random_ids(1, 16)))


def test_packed_documents_do_not_see_each_other() -> None:
    model = random_model(CONFIGS["grouped-query, tied"])
    first, second = random_ids(1, 20), random_ids(1, 30).flip(1)
    packed = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(20), torch.arange(30)])[None]
    segments = torch.tensor([0] * 20 + [1] * 30)[None]
    logits = model(packed, positions, segments)
    torch.testing.assert_close(logits[:, :20], model(first), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[:, 20:], model(second), atol=1e-5, rtol=0)
    leaking = model(packed, positions, None)  # the same without the mask must differ, or this test shows nothing
    assert (leaking[:, 20:] - model(second)).abs().max() > 1e-2


def test_cache_equals_full_pass_with_left_padding() -> None:
    model = random_model(CONFIGS["narrow heads, other base"])
    ids = random_ids(2, 24)
    cache = KVCache(model.config, 2, 24, left_pad_b=torch.tensor([0, 5]))
    stepwise = torch.cat([model(part, cache=cache) for part in ids.split([9, 1, 6, 8], dim=1)], dim=1)
    torch.testing.assert_close(stepwise[0], model(ids[:1])[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(stepwise[1, 5:], model(ids[1:, 5:])[0], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="24 slots"):
        model(ids[:, :1], cache=cache)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = random_model(CONFIGS["grouped-query, tied"]).train()
    ids = random_ids(2, 16)

    def gradients(recompute: bool) -> list[Tensor]:
        model.gradient_checkpointing = recompute
        model.zero_grad()
        model(ids).logsumexp(-1).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_init_starts_at_the_uniform_distribution() -> None:
    model = CausalLM(CONFIGS["grouped-query, tied"])
    model.init_weights(torch.Generator().manual_seed(0))
    log_probs = model(random_ids(4, 64)).log_softmax(-1)
    assert abs(-log_probs.mean().item() - torch.log(torch.tensor(VOCAB)).item()) < 0.2
    again = CausalLM(CONFIGS["grouped-query, tied"])
    again.init_weights(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_flops_count_what_the_matmuls_do() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = model_config_for(2, VOCAB, context=64, n_kv_heads=2)
    model = CausalLM(config).train()
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # as plain products, which the counter knows
        model(random_ids(1, 64)).sum().backward()
    assert model.estimate_flops(64) == counter.get_total_flops() / 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen4"}, "'qwen4'.*nearest is qwen.*known: .*llama"),
        ({"hidden_size": -4}, "hidden_size is -4"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"attention_bias": True}, "lacks"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type is 'spiral'"),
        ({"a_new_trick": 3}, "a_new_trick: not known"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"intermediate_size": 128}, "gate_proj.*has shape"),
        ({"num_hidden_layers": 3}, "lacks"),
        ({"num_hidden_layers": 1}, "no place"),
    ],
)
def test_configs_that_cannot_be_honoured_are_refused(
    change: dict[str, object], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_model(random_model(CONFIGS["grouped-query, tied"]), tmp_path, tokenizer)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(DanluError, match=message):
        load_model(tmp_path)


def test_broken_folders_are_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="no such model folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(DanluError, match="not a model folder"):
        load_model(tmp_path)
    save_model(random_model(CONFIGS["grouped-query, tied"]), tmp_path, tokenizer)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DanluError, match="is cut short"):
        load_model(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(DanluError, match=r"m.gguf: .*cut short"):
        load_model(tmp_path / "m.gguf")


def test_the_dial_derives_and_can_be_overridden() -> None:
    assert model_config_for(6, 8192).dim == 384
    assert model_config_for(6, 8192).ffn_dim == 1024
    assert model_config_for(6, 8192, dim=512).n_heads == 8
    assert model_config_for(3, 100).n_kv_heads == 3  # three heads cannot be halved
    with pytest.raises(ValueError, match="multiple"):
        CausalLM(dataclasses.replace(model_config_for(4, 100), n_kv_heads=3))
