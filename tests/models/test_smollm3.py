"""SmolLM3 against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from legacy import check_config_json, read_config_json
from parity import check_causal_lm, check_fields_are_not_ignored, check_head
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, SmolLM3Config

from danlu.errors import DanluError
from danlu.models.heads import SequenceClassifier, TokenClassifier
from danlu.models.transformer import Transformer

SHAPE: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 40,
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
        {"no_rope_layers": [0, 1, 0, 1], "tie_word_embeddings": False, "num_key_value_heads": 1},
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 7, "hidden_act": "gelu"},
        {"use_sliding_window": True, "sliding_window": 5, "head_dim": 24, "no_rope_layer_interval": 3,
         "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]},
    ],
)  # fmt: skip
def test_smollm3(options: dict[str, Any], tmp_path: Path) -> None:
    check_causal_lm(SmolLM3Config(**{**SHAPE, **options}), tmp_path)


# As published with SmolLM3-3B.
PUBLISHED: dict[str, Any] = {
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": None,
    "eos_token_id": 99, "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 88,
    "layer_types": ["full_attention"] * 4, "max_position_embeddings": 65536, "max_window_layers": 28,
    "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0],
    "num_attention_heads": 4, "num_hidden_layers": 4, "num_key_value_heads": 2, "pad_token_id": 100,
    "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.54.0.dev0", "use_cache": False,
    "use_sliding_window": False, "vocab_size": 101,
}  # fmt: skip


@pytest.mark.parametrize(
    "drop", [(), ("layer_types", "no_rope_layers", "no_rope_layer_interval", "rope_theta", "tie_word_embeddings")]
)
def test_published_configs(drop: tuple[str, ...], tmp_path: Path) -> None:
    content = {key: value for key, value in PUBLISHED.items() if key not in drop}
    config = check_config_json(content, tmp_path).config
    assert config.nope_layers == (3,)
    assert config.tie_embeddings


def test_windows_without_layer_types_are_on_the_layers_without_positions(tmp_path: Path) -> None:
    content = {key: value for key, value in PUBLISHED.items() if key != "layer_types"}
    config = check_config_json({**content, "use_sliding_window": True, "sliding_window": 6}, tmp_path).config
    assert (config.window, config.full_layers) == (6, (0, 1, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"no_rope_layers": [1, 0]}, "no_rope_layers must list one value for each of the 4 layers"),
        ({"no_rope_layers": [1, 1, 1, 2]}, "no_rope_layers holds 2"),
        ({"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        # transformers would mask these layers all the same, but tell fused kernels that there is no window
        ({"layer_types": ["sliding_attention"] * 4, "sliding_window": 8}, "switches it off"),
    ],
)
def test_what_cannot_be_honoured_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DanluError, match=message):
        read_config_json({**PUBLISHED, **change})


def test_no_field_is_ignored(tmp_path: Path) -> None:
    refused = check_fields_are_not_ignored(SmolLM3Config(**SHAPE, use_sliding_window=True, sliding_window=7), tmp_path)
    assert {"num_hidden_layers"} <= refused


@pytest.mark.parametrize(
    ("kind", "auto_class"),
    [(SequenceClassifier, AutoModelForSequenceClassification), (TokenClassifier, AutoModelForTokenClassification)],
)
def test_heads(kind: type[Transformer], auto_class: Any, tmp_path: Path) -> None:
    check_head(kind, SmolLM3Config(**SHAPE, num_labels=3), auto_class, tmp_path)
