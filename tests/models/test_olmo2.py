"""OLMo 2 against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from legacy import check_config_json
from parity import check_causal_lm, check_fields_are_not_ignored, check_head
from transformers import AutoModelForSequenceClassification, Olmo2Config

from danlu.models.heads import SequenceClassifier

SHAPE: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"attention_bias": True, "rms_norm_eps": 1e-3},
        {"tie_word_embeddings": True, "num_key_value_heads": 1},
        {"num_key_value_heads": 4, "hidden_act": "gelu", "head_dim": 24},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ],
)
def test_olmo2(options: dict[str, Any], tmp_path: Path) -> None:
    check_causal_lm(Olmo2Config(**{**SHAPE, **options}), tmp_path)


# As published with OLMo 2 7B.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 99,
    "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 88,
    "max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 4, "num_hidden_layers": 3,
    "num_key_value_heads": 4, "pad_token_id": 100, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "float32",
    "transformers_version": "4.47.0.dev0", "use_cache": True, "vocab_size": 101,
}  # fmt: skip


@pytest.mark.parametrize("drop", [(), ("num_key_value_heads", "rms_norm_eps", "rope_theta")])
def test_published_configs(drop: tuple[str, ...], tmp_path: Path) -> None:
    check_config_json({key: value for key, value in PUBLISHED.items() if key not in drop}, tmp_path)


def test_no_field_is_ignored(tmp_path: Path) -> None:
    refused = check_fields_are_not_ignored(Olmo2Config(**SHAPE), tmp_path)
    assert {"num_hidden_layers"} <= refused


def test_heads(tmp_path: Path) -> None:
    config = Olmo2Config(**SHAPE, num_labels=3, pad_token_id=100)
    check_head(SequenceClassifier, config, AutoModelForSequenceClassification, tmp_path)
