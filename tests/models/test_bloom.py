"""BLOOM against transformers, and its published configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import check_causal_lm, check_every_head, check_fields_are_not_ignored, random_ids, random_reference
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BloomConfig

from danlu.errors import DanluError
from danlu.models.load import load_model

SHAPE: dict[str, Any] = {"vocab_size": 101, "n_layer": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_size": 48, "n_head": 3, "layer_norm_epsilon": 1e-2},
        {"hidden_size": 44, "n_head": 11, "tie_word_embeddings": False},
        {"hidden_size": 32, "n_head": 4, "slow_but_exact": True},
        {"hidden_size": 16, "n_head": 1, "pretraining_tp": 2},
    ],
)
def test_bloom(options: dict[str, Any], tmp_path: Path) -> None:
    check_causal_lm(BloomConfig(**SHAPE, **options), tmp_path)


def test_heads(tmp_path: Path) -> None:
    check_every_head(BloomConfig(**SHAPE, hidden_size=48, n_head=6), tmp_path)


@pytest.mark.parametrize("exact", [False, True])
def test_fields(exact: bool, tmp_path: Path) -> None:
    config = BloomConfig(**SHAPE, hidden_size=24, n_head=6, slow_but_exact=exact)
    refused = check_fields_are_not_ignored(config, tmp_path)
    assert refused == ({"pretraining_tp"} if exact else set()) | {
        "vocab_size", "hidden_size", "n_layer", "is_encoder_decoder", "tie_word_embeddings",
        "apply_residual_connection_post_layernorm",
    }  # fmt: skip


def test_published_checkpoints(tmp_path: Path) -> None:
    """No prefix, and the fields that Megatron left behind."""
    reference = random_reference(BloomConfig(**SHAPE, hidden_size=48, n_head=6), AutoModelForCausalLM)
    reference.save_pretrained(tmp_path)
    ids = random_ids(101, 2, 24)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    content = json.loads((tmp_path / "config.json").read_text())
    for name, alias in {"hidden_size": "n_embed", "n_head": "num_attention_heads"}.items():
        content[alias] = content.pop(name)
    content.update(
        attention_softmax_in_fp32=True, bias_dropout_fusion=True, masked_softmax_fusion=True, n_inner=None,
        offset_alibi=100, seq_length=512, skip_bias_add=True, skip_bias_add_qkv=False, unk_token_id=0,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = load_model(tmp_path)
    assert model.config.context == 512
    torch.testing.assert_close(model(ids), reference(ids).logits, atol=1e-5, rtol=0)


def test_sums_without_biases_are_refused(tmp_path: Path) -> None:
    config = BloomConfig(**SHAPE, hidden_size=48, n_head=6, slow_but_exact=True, pretraining_tp=2)
    random_reference(config, AutoModelForCausalLM).save_pretrained(tmp_path)
    with pytest.raises(DanluError, match="slow_but_exact is True, which is not supported"):
        load_model(tmp_path)
