"""Qwen2 against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from legacy import check_config_json, read_config_json
from parity import check_causal_lm, check_fields_are_not_ignored, check_head
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, Qwen2Config

from danlu.errors import DanluError
from danlu.models.heads import SequenceClassifier, TokenClassifier
from danlu.models.transformer import Transformer

SHAPE: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-3},
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 5, "num_key_value_heads": 1,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        {"num_key_value_heads": 4, "hidden_act": "gelu", "max_position_embeddings": 16,
         "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4,
                             "rope_theta": 500.0}},
    ],
)  # fmt: skip
def test_qwen2(options: dict[str, Any], tmp_path: Path) -> None:
    check_causal_lm(Qwen2Config(**{**SHAPE, **options}), tmp_path)


# As published with Qwen2.5: a window that is switched off, and the layers it would start at.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 99, "eos_token_id": 100,
    "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 88,
    "max_position_embeddings": 131072, "max_window_layers": 2, "model_type": "qwen2", "num_attention_heads": 4,
    "num_hidden_layers": 3, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 6, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
    "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 101,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "window", "full_layers"),
    [
        ({}, None, ()),
        ({"use_sliding_window": True}, 6, (0, 1)),
        ({"use_sliding_window": True, "max_window_layers": 0}, 6, ()),
        ({"use_sliding_window": True, "sliding_window": None}, None, ()),
        ({"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 8, "type": "yarn"}}, None, ()),
    ],
)
def test_published_configs(
    change: dict[str, Any], window: int | None, full_layers: tuple[int, ...], tmp_path: Path
) -> None:
    config = check_config_json({**PUBLISHED, **change}, tmp_path).config
    assert (config.window, config.full_layers) == (window, full_layers)


def test_fields_that_are_missing_have_the_defaults_of_transformers() -> None:
    missing = ("sliding_window", "max_window_layers")
    content = {key: value for key, value in PUBLISHED.items() if key not in missing}
    config = read_config_json({**content, "use_sliding_window": True, "num_hidden_layers": 30})
    theirs = Qwen2Config(**{**SHAPE, "num_hidden_layers": 30}, use_sliding_window=True)
    assert theirs.layer_types is not None
    full = tuple(layer for layer, kind in enumerate(theirs.layer_types) if kind == "full_attention")
    assert (config.window, config.full_layers) == (theirs.sliding_window, full)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["full_attention"] * 2}, "layer_types must list one value for each of the 3 layers"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types holds 'chunked_attention'"),
        ({"layer_types": ["full_attention", "full_attention", "sliding_attention"]}, "switches it off"),
        ({"use_mrope": True}, "use_mrope"),
        ({"use_sliding_window": "yes"}, "use_sliding_window is 'yes'"),
        ({"max_window_layers": -1}, "max_window_layers is -1"),
    ],
)
def test_windows_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DanluError, match=message):
        read_config_json({**PUBLISHED, **change})


def test_no_field_is_ignored(tmp_path: Path) -> None:
    refused = check_fields_are_not_ignored(
        Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=7, max_window_layers=1), tmp_path
    )
    assert {"num_hidden_layers"} <= refused


@pytest.mark.parametrize(
    ("kind", "auto_class"),
    [(SequenceClassifier, AutoModelForSequenceClassification), (TokenClassifier, AutoModelForTokenClassification)],
)
def test_heads(kind: type[Transformer], auto_class: Any, tmp_path: Path) -> None:
    check_head(kind, Qwen2Config(**SHAPE, num_labels=3, pad_token_id=100), auto_class, tmp_path)
