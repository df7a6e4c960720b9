"""The three shapes of Falcon against transformers, and their first names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import check_causal_lm, check_every_head, check_fields_are_not_ignored, random_ids, random_reference
from transformers import AutoModelForCausalLM, FalconConfig

from danlu.errors import DanluError
from danlu.models.load import load_model, save_model

SHAPE: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6,
    "max_position_embeddings": 32,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "7B": {},
    "7B, many key heads": {"multi_query": False, "ffn_hidden_size": 52},
    "40B": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "40B, biases": {"new_decoder_architecture": True, "num_kv_heads": 3, "bias": True, "tie_word_embeddings": False},
    "11B": {
        "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "activation": "gelu_new",
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "tie_word_embeddings": False,
    },
    "RW": {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    "RW, one key head": {"alibi": True, "parallel_attn": False, "layer_norm_epsilon": 1e-2},
    # With more than eight heads the slopes are no powers of two, and bfloat16 rounds them.
    "RW, twelve heads": {"alibi": True, "multi_query": False, "parallel_attn": False, "num_attention_heads": 12},
    "nulls": {"multi_query": None, "parallel_attn": None},
    "RW, rotary": {"multi_query": False, "parallel_attn": False, "bias": True},
    "40B, alibi": {"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_falcon(shape: str, tmp_path: Path) -> None:
    # The eager attention of transformers adds ALiBi twice, the other, which is its default here, once.
    check_causal_lm(FalconConfig(**{**SHAPE, **SHAPES[shape]}), tmp_path, attention="sdpa")


def test_heads(tmp_path: Path) -> None:
    check_every_head(FalconConfig(**SHAPE, **SHAPES["40B"]), tmp_path)


@pytest.mark.parametrize("shape", ["7B", "40B", "RW"])
def test_fields(shape: str, tmp_path: Path) -> None:
    refused = check_fields_are_not_ignored(FalconConfig(**SHAPE, **SHAPES[shape]), tmp_path, attention="sdpa")
    expected = {
        "vocab_size", "hidden_size", "num_hidden_layers", "ffn_hidden_size", "is_encoder_decoder", "bias",
        "new_decoder_architecture", "parallel_attn", "multi_query",
    }  # fmt: skip
    assert refused >= expected - ({"multi_query"} if shape == "40B" else set())


@pytest.mark.parametrize(
    ("shape", "fields", "message"),
    [
        ("40B", {"parallel_attn": False}, "parallel_attn is False"),
        ("40B", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn is 3"),
        ("7B", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn is 2"),
        ("RW", {"num_kv_heads": 2}, "num_kv_heads is 2"),
        ("7B", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supported"),
        ("7B", {"head_dim": 16}, "head_dim is 16"),
        ("7B", {"ff_factor": 8}, "ff_factor is 8"),
    ],
)
def test_refused(shape: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    random_reference(FalconConfig(**SHAPE, **SHAPES[shape]), AutoModelForCausalLM).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, **fields}))
    with pytest.raises(DanluError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("shape", "model_type"), [("40B", "RefinedWeb"), ("7B", "RefinedWebModel"), ("RW", "RefinedWebModel")]
)
def test_first_names(shape: str, model_type: str, tmp_path: Path) -> None:
    reference = random_reference(FalconConfig(**SHAPE, **SHAPES[shape]), AutoModelForCausalLM, attention="sdpa")
    reference.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    new = json.loads(path.read_text())
    kept = ("vocab_size", "hidden_size", "alibi", "bias", "layer_norm_epsilon", "parallel_attn")
    old = {key: new[key] for key in kept} | {
        "model_type": model_type, "architectures": ["RWForCausalLM"], "n_layer": 2, "n_head": 6,
        "apply_residual_connection_post_layernorm": False,
    }  # fmt: skip
    old.update({"n_head_kv": 2} if shape == "40B" else {"multi_query": new["multi_query"]})
    path.write_text(json.dumps(old))
    ids = random_ids(101, 2, 24)
    model = load_model(tmp_path / "theirs")
    torch.testing.assert_close(model(ids), reference(ids).logits, atol=1e-5, rtol=0)
    save_model(model, tmp_path / "ours")
    torch.testing.assert_close(load_model(tmp_path / "ours")(ids), model(ids), atol=0, rtol=0)
