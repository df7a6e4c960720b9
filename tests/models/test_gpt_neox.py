"""GPT-NeoX and Pythia against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import check_causal_lm, check_every_head, check_fields_are_not_ignored, random_ids, random_reference
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from danlu.errors import DanluError
from danlu.models.load import load_model

SHAPE: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 3,
    "max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_parallel_residual": False, "rotary_pct": 1.0, "tie_word_embeddings": True},
        {"attention_bias": False, "rotary_pct": 0.5, "rotary_emb_base": 500, "layer_norm_eps": 1e-2},
        {"hidden_act": "gelu_fast", "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"max_position_embeddings": 24, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ],
)
def test_gpt_neox(options: dict[str, Any], tmp_path: Path) -> None:
    check_causal_lm(GPTNeoXConfig(**{**SHAPE, **options}), tmp_path)


def test_heads(tmp_path: Path) -> None:
    check_every_head(GPTNeoXConfig(**SHAPE), tmp_path)


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True, "use_parallel_residual": False}])
def test_fields(options: dict[str, Any], tmp_path: Path) -> None:
    refused = check_fields_are_not_ignored(GPTNeoXConfig(**SHAPE, **options), tmp_path)
    assert refused == {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "attention_bias", "is_encoder_decoder",
        "tie_word_embeddings",
    }  # fmt: skip


def test_published_checkpoints(tmp_path: Path) -> None:
    """The fields of Pythia's configs, and masks and frequencies among the tensors."""
    reference = random_reference(GPTNeoXConfig(**SHAPE), AutoModelForCausalLM)
    reference.save_pretrained(tmp_path)
    ids = random_ids(101, 2, 24)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "embed_out.weight" in tensors
    for layer in range(2):
        tensors[f"gpt_neox.layers.{layer}.attention.bias"] = torch.ones(24, 24, dtype=torch.bool).tril()
        tensors[f"gpt_neox.layers.{layer}.attention.masked_bias"] = torch.tensor(-1e9)
        tensors[f"gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, tmp_path / "model.safetensors")
    content = json.loads((tmp_path / "config.json").read_text())
    del content["rope_parameters"]
    content.update(rotary_pct=0.25, rotary_emb_base=10000, rope_theta=10000, partial_rotary_factor=0.25)
    (tmp_path / "config.json").write_text(json.dumps(content))
    torch.testing.assert_close(load_model(tmp_path)(ids), reference(ids).logits, atol=1e-5, rtol=0)

    for field in ("rotary_pct", "rotary_emb_base", "rope_theta", "partial_rotary_factor"):
        del content[field]
    (tmp_path / "config.json").write_text(json.dumps(content))
    torch.testing.assert_close(load_model(tmp_path)(ids), reference(ids).logits, atol=1e-5, rtol=0)

    (tmp_path / "config.json").write_text(json.dumps({**content, "rope_theta": 500.0}))
    with pytest.raises(DanluError, match=r"rope_theta is 500\.0, which is not supported"):
        load_model(tmp_path)
