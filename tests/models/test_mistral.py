"""Mistral against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from legacy import check_config_json, read_config_json
from parity import check_causal_lm, check_fields_are_not_ignored, check_head
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, MistralConfig

from danlu.errors import DanluError
from danlu.models.heads import SequenceClassifier, TokenClassifier
from danlu.models.transformer import Transformer

SHAPE: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 7, "rms_norm_eps": 1e-3},
        {"sliding_window": None, "head_dim": 24, "tie_word_embeddings": True},
        {"sliding_window": 1, "num_key_value_heads": 1, "hidden_act": "gelu"},
        {"sliding_window": 24, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    ],
)
def test_mistral(options: dict[str, Any], tmp_path: Path) -> None:
    check_causal_lm(MistralConfig(**{**SHAPE, **options}), tmp_path)


# As published with Mistral 7B v0.1: the base at top level, no head_dim, no rotary parameters.
PUBLISHED: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 88, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05, "rope_theta": 300.0, "sliding_window": 6, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 101,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "window"),
    [
        ({}, 6),
        ({"sliding_window": None, "rope_theta": 1e6}, None),  # as v0.2 and v0.3
        ({"head_dim": 24, "rope_scaling": {"type": "linear", "factor": 4.0}}, 6),
    ],
)
def test_published_configs(change: dict[str, Any], window: int | None, tmp_path: Path) -> None:
    assert check_config_json({**PUBLISHED, **change}, tmp_path).config.window == window


def test_a_missing_window_is_the_default_and_null_is_none() -> None:
    without = {key: value for key, value in PUBLISHED.items() if key != "sliding_window"}
    assert read_config_json(without).window == MistralConfig().sliding_window == 4096
    assert read_config_json({**without, "sliding_window": None}).window is None


@pytest.mark.parametrize(
    "change", [{"layer_types": ["full_attention"] * 2}, {"attention_bias": True}, {"sliding_window": 0}]
)
def test_what_mistral_does_not_have_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(DanluError, match=next(iter(change))):
        read_config_json({**PUBLISHED, **change})


def test_no_field_is_ignored(tmp_path: Path) -> None:
    refused = check_fields_are_not_ignored(MistralConfig(**SHAPE, sliding_window=7, head_dim=16), tmp_path)
    assert {"vocab_size", "num_hidden_layers", "head_dim"} <= refused


@pytest.mark.parametrize(
    ("kind", "auto_class"),
    [(SequenceClassifier, AutoModelForSequenceClassification), (TokenClassifier, AutoModelForTokenClassification)],
)
def test_heads(kind: type[Transformer], auto_class: Any, tmp_path: Path) -> None:
    check_head(kind, MistralConfig(**SHAPE, num_labels=3, pad_token_id=100), auto_class, tmp_path)
