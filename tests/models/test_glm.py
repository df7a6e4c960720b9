"""GLM-4, both generations, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from legacy import check_config_json
from parity import check_causal_lm, check_fields_are_not_ignored, check_head
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, Glm4Config, GlmConfig

from danlu.models.heads import SequenceClassifier, TokenClassifier
from danlu.models.transformer import Transformer

SHAPE: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 40,
}  # fmt: skip


@pytest.mark.parametrize("kind", [GlmConfig, Glm4Config])
@pytest.mark.parametrize(
    "options",
    [
        {"attention_bias": True, "rms_norm_eps": 1e-3},
        {"attention_bias": False, "tie_word_embeddings": True, "head_dim": 24, "num_key_value_heads": 1},
        {"partial_rotary_factor": 0.25, "hidden_act": "gelu", "num_key_value_heads": 4},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50.0, "partial_rotary_factor": 1.0}},
    ],
)
def test_glm(kind: type[Any], options: dict[str, Any], tmp_path: Path) -> None:
    check_causal_lm(kind(**{**SHAPE, **options}), tmp_path)


# As published with GLM-4-9B-0414; the older GLM-4-9B differs in its type only.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Glm4ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": [98, 99],
    "head_dim": 16, "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 88,
    "max_position_embeddings": 32768, "model_type": "glm4", "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "pad_token_id": 100, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.52.0.dev0", "use_cache": True, "vocab_size": 101,
}  # fmt: skip


@pytest.mark.parametrize("model_type", ["glm", "glm4"])
@pytest.mark.parametrize(
    "drop", [(), ("partial_rotary_factor", "rope_theta", "attention_bias", "rms_norm_eps", "num_key_value_heads")]
)
def test_published_configs(model_type: str, drop: tuple[str, ...], tmp_path: Path) -> None:
    content = {key: value for key, value in PUBLISHED.items() if key not in drop}
    rope = check_config_json({**content, "model_type": model_type}, tmp_path).config.rope
    assert rope is not None
    assert (rope.dim, rope.interleaved) == (8, True)


@pytest.mark.parametrize("kind", [GlmConfig, Glm4Config])
def test_no_field_is_ignored(kind: type[Any], tmp_path: Path) -> None:
    refused = check_fields_are_not_ignored(kind(**SHAPE), tmp_path)
    assert {"num_hidden_layers", "attention_bias"} <= refused


@pytest.mark.parametrize(
    ("kind", "auto_class"),
    [(SequenceClassifier, AutoModelForSequenceClassification), (TokenClassifier, AutoModelForTokenClassification)],
)
def test_heads(kind: type[Transformer], auto_class: Any, tmp_path: Path) -> None:
    for config in (GlmConfig(**SHAPE, num_labels=3), Glm4Config(**SHAPE, num_labels=3)):
        check_head(kind, config, auto_class, tmp_path / config.model_type)
