"""Gemma 2 and the text model of Gemma 3 against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from legacy import check_config_json, read_config_json
from parity import check_causal_lm, check_fields_are_not_ignored, check_head
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
)

from danlu.errors import DanluError
from danlu.models.heads import SequenceClassifier, TokenClassifier
from danlu.models.load import load_model
from danlu.models.transformer import Transformer

SHAPE: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64,
}  # fmt: skip
ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 7, "query_pre_attn_scalar": 10, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 3.0},
        {"sliding_window": 5, "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True,
         "tie_word_embeddings": False, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        {"num_key_value_heads": 1, "hidden_activation": "silu", "rms_norm_eps": 1e-3, "sliding_window": 40,
         "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    ],
)  # fmt: skip
def test_gemma2(options: dict[str, Any], tmp_path: Path) -> None:
    check_causal_lm(Gemma2Config(**{**SHAPE, **options}), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 7, "query_pre_attn_scalar": 10, "rope_parameters": ROPES, "num_hidden_layers": 7},
        {"sliding_window": 5, "attention_bias": True, "tie_word_embeddings": False, "final_logit_softcapping": 3.0,
         "layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "rope_parameters": ROPES},
        {"sliding_window": 6, "sliding_window_pattern": 2, "num_key_value_heads": 4, "hidden_activation": "silu"},
        {"sliding_window": 6, "layer_types": ["full_attention"] * 3, "rms_norm_eps": 1e-3},
    ],
)  # fmt: skip
def test_gemma3(options: dict[str, Any], tmp_path: Path) -> None:
    check_causal_lm(Gemma3TextConfig(**{**SHAPE, **options}), tmp_path)


# As published with Gemma 2 27B: two activations, and a second name for the window.
GEMMA2: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
    "final_logit_softcapping": 30.0, "head_dim": 12, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 40,
    "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 4, "num_hidden_layers": 3,
    "num_key_value_heads": 2, "pad_token_id": 0, "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0, "sliding_window": 6, "sliding_window_size": 6, "torch_dtype": "bfloat16",
    "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 101,
}  # fmt: skip

# As published with Gemma 3 1B: two bases and a pattern in place of rope_parameters and layer_types.
GEMMA3: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
    "final_logit_softcapping": None, "head_dim": 12, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 32,
    "initializer_range": 0.02, "intermediate_size": 40, "max_position_embeddings": 32768, "model_type": "gemma3_text",
    "num_attention_heads": 4, "num_hidden_layers": 7, "num_key_value_heads": 1, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 30, "rope_scaling": None,
    "rope_theta": 700, "sliding_window": 6, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 101,
}  # fmt: skip


@pytest.mark.parametrize(
    "drop", [(), ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "hidden_activation")]
)
def test_published_gemma2(drop: tuple[str, ...], tmp_path: Path) -> None:
    config = check_config_json({key: value for key, value in GEMMA2.items() if key not in drop}, tmp_path).config
    assert config.tie_embeddings
    assert (config.attention_softcap, config.logit_softcap) == (50, 30)
    assert (config.window, config.full_layers) == (6, (1,))


@pytest.mark.parametrize(
    ("change", "full_layers"),
    [
        ({}, (5,)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 3}, (2, 5)),
        ({"rope_parameters": ROPES, "sliding_window_pattern": None}, (5,)),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, (5,)),
        ({"layer_types": ["full_attention", *["sliding_attention"] * 6], "_sliding_window_pattern": 6}, (0,)),
    ],
)
def test_published_gemma3(change: dict[str, Any], full_layers: tuple[int, ...], tmp_path: Path) -> None:
    content = {key: value for key, value in {**GEMMA3, **change}.items() if value is not None}
    assert check_config_json(content, tmp_path).config.full_layers == full_layers


@pytest.mark.parametrize(
    ("content", "change", "message"),
    [
        (GEMMA2, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (GEMMA2, {"sliding_window_size": 8}, "sliding_window_size is 8"),
        (GEMMA2, {"sliding_window": None, "sliding_window_size": None}, "switches it off"),
        (GEMMA2, {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0.0"),
        (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA2, {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar is -1"),
        (GEMMA2, {"rope_local_base_freq": 10000}, "rope_local_base_freq"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA3, {"rope_parameters": {"rope_theta": 10000.0}}, "full_attention, sliding_attention"),
        (GEMMA3, {"rope_scaling": 8.0}, "expected objects"),
        (GEMMA3, {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
    ],
)
def test_what_cannot_be_honoured_is_refused(content: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(DanluError, match=message):
        read_config_json({**content, **change})


def test_a_multimodal_config_is_refused_with_a_hint(tmp_path: Path) -> None:
    Gemma3Config(text_config=Gemma3TextConfig(**SHAPE)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gemma3"
    with pytest.raises(DanluError, match=r"gemma3 models take more than text.*gemma3_text"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SHAPE, sliding_window=7, query_pre_attn_scalar=10, attn_logit_softcapping=2.0),
        Gemma3TextConfig(**SHAPE, sliding_window=7, rope_parameters=ROPES, final_logit_softcapping=3.0),
    ],
    ids=lambda config: config.model_type,
)
def test_no_field_is_ignored(config: Any, tmp_path: Path) -> None:
    refused = check_fields_are_not_ignored(config, tmp_path)
    assert {"num_hidden_layers", "use_bidirectional_attention"} <= refused


@pytest.mark.parametrize(
    ("kind", "config", "auto_class"),
    [
        (SequenceClassifier, Gemma2Config, AutoModelForSequenceClassification),
        (TokenClassifier, Gemma2Config, AutoModelForTokenClassification),
        (SequenceClassifier, Gemma3TextConfig, AutoModelForSequenceClassification),
    ],
)
def test_heads(kind: type[Transformer], config: type[Any], auto_class: Any, tmp_path: Path) -> None:
    check_head(kind, config(**SHAPE, num_labels=3, sliding_window=7), auto_class, tmp_path)
