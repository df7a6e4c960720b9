"""Phi-1 to Phi-2 against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import check_causal_lm, check_every_head, check_fields_are_not_ignored, random_ids, random_reference
from transformers import AutoModelForCausalLM, PhiConfig

from danlu.models.load import load_model

SHAPE: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 60, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 3,
    "max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_key_value_heads": 1, "partial_rotary_factor": 0.4, "qk_layernorm": True, "layer_norm_eps": 1e-2},
        {"num_attention_heads": 6, "num_key_value_heads": 2, "partial_rotary_factor": 1.0, "rope_theta": 500.0,
         "tie_word_embeddings": True, "hidden_act": "relu"},
        {"head_dim": 24},
    ],
)  # fmt: skip
def test_phi(options: dict[str, Any], tmp_path: Path) -> None:
    check_causal_lm(PhiConfig(**{**SHAPE, **options}), tmp_path)


def test_half_of_a_head_is_rotated_where_the_config_does_not_say(tmp_path: Path) -> None:
    reference = random_reference(PhiConfig(**SHAPE), AutoModelForCausalLM)
    reference.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    ids = random_ids(101, 2, 24)
    torch.testing.assert_close(load_model(tmp_path)(ids), reference(ids).logits, atol=1e-5, rtol=0)


def test_heads(tmp_path: Path) -> None:
    check_every_head(PhiConfig(**SHAPE), tmp_path)


@pytest.mark.parametrize("options", [{"partial_rotary_factor": 0.4}, {"qk_layernorm": True, "head_dim": 20}])
def test_fields(options: dict[str, Any], tmp_path: Path) -> None:
    refused = check_fields_are_not_ignored(PhiConfig(**SHAPE, **options), tmp_path)
    assert refused - {"head_dim"} == {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "is_encoder_decoder", "qk_layernorm", "tie_word_embeddings",
    }  # fmt: skip
