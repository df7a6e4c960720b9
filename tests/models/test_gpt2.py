"""GPT-2 against transformers, and the spellings of its old checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import check_causal_lm, check_every_head, check_fields_are_not_ignored, random_ids, random_reference
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config

from danlu.errors import DanluError
from danlu.models.load import load_model

SHAPE: dict[str, Any] = {"vocab_size": 101, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 24}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_inner": 52, "activation_function": "gelu", "layer_norm_epsilon": 1e-2, "tie_word_embeddings": False},
        {"scale_attn_weights": False, "activation_function": "relu"},
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "activation_function": "silu"},
    ],
)
def test_gpt2(options: dict[str, Any], tmp_path: Path) -> None:
    check_causal_lm(GPT2Config(**SHAPE, **options), tmp_path)


def test_heads(tmp_path: Path) -> None:
    check_every_head(GPT2Config(**SHAPE), tmp_path)


def test_fields(tmp_path: Path) -> None:
    refused = check_fields_are_not_ignored(GPT2Config(**SHAPE), tmp_path)
    assert refused == {
        "vocab_size", "n_embd", "n_layer", "n_positions", "n_inner", "is_encoder_decoder", "add_cross_attention",
        "tie_word_embeddings",
    }  # fmt: skip


def test_first_checkpoints(tmp_path: Path) -> None:
    """No prefix, masks among the tensors, fields under their general names and some that have gone since."""
    reference = random_reference(GPT2Config(**SHAPE), AutoModelForCausalLM)
    reference.save_pretrained(tmp_path)
    ids = random_ids(101, 2, 24)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(24, 24).tril().view(1, 1, 24, 24)
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, tmp_path / "model.safetensors")
    content = json.loads((tmp_path / "config.json").read_text())
    for name, alias in {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
    }.items():
        content[alias] = content.pop(name)
    content.update(n_ctx=24, predict_special_tokens=True)
    (tmp_path / "config.json").write_text(json.dumps(content))
    torch.testing.assert_close(load_model(tmp_path)(ids), reference(ids).logits, atol=1e-5, rtol=0)

    content["n_embd"] = 64
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(DanluError, match="n_embd and hidden_size say the same thing differently"):
        load_model(tmp_path)
