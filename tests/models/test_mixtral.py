"""Mixtral against transformers, with several numbers of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from legacy import check_config_json
from moe_checks import check_flops, check_gradient_checkpointing
from parity import check_causal_lm, check_fields_are_not_ignored, check_head, random_reference
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    MixtralConfig,
)

from danlu.errors import DanluError
from danlu.models.heads import SequenceClassifier, TokenClassifier
from danlu.models.load import load_model
from danlu.models.transformer import Transformer

SHAPE: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 7},
        {"num_local_experts": 5, "num_experts_per_tok": 3, "head_dim": 12, "tie_word_embeddings": True},
        {"num_local_experts": 4, "num_experts_per_tok": 1, "num_key_value_heads": 4, "hidden_act": "gelu"},
        {"num_local_experts": 3, "num_experts_per_tok": 3, "rms_norm_eps": 1e-3},
    ],
)
def test_mixtral(options: dict[str, Any], tmp_path: Path) -> None:
    check_causal_lm(MixtralConfig(**{**SHAPE, **options}), tmp_path)


# As published with Mixtral 8x7B.
PUBLISHED: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 40,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 4, "num_experts_per_tok": 2,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0",
    "use_cache": True, "vocab_size": 101,
}  # fmt: skip


@pytest.mark.parametrize("drop", [(), ("rope_theta", "sliding_window", "num_local_experts", "num_experts_per_tok")])
def test_published_configs(drop: tuple[str, ...], tmp_path: Path) -> None:
    content = {key: value for key, value in PUBLISHED.items() if key not in drop}
    experts = check_config_json(content, tmp_path).config.experts
    assert experts is not None
    assert (experts.number, experts.top_k) == (8, 2)


def test_flops_and_checkpointing(tmp_path: Path) -> None:
    random_reference(MixtralConfig(**SHAPE), AutoModelForCausalLM).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    check_flops(model)
    check_gradient_checkpointing(model)


def test_a_checkpoint_that_lacks_an_expert_is_refused(tmp_path: Path) -> None:
    random_reference(MixtralConfig(**SHAPE, num_local_experts=3), AutoModelForCausalLM).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"num_local_experts": 3', '"num_local_experts": 4'))
    with pytest.raises(DanluError, match=r"shape|lacks .*experts"):
        load_model(tmp_path)
    config.write_text(text.replace('"num_local_experts": 3', '"num_local_experts": 2'))
    with pytest.raises(DanluError, match=r"shape|no place"):
        load_model(tmp_path)
    config.write_text(text.replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 4'))
    with pytest.raises(DanluError, match=r"top_k \(4\) is more than there are experts \(3\)"):
        load_model(tmp_path)


def test_no_field_is_ignored(tmp_path: Path) -> None:
    refused = check_fields_are_not_ignored(MixtralConfig(**SHAPE, sliding_window=7), tmp_path)
    assert {"num_local_experts", "num_hidden_layers"} <= refused


@pytest.mark.parametrize(
    ("kind", "auto_class"),
    [(SequenceClassifier, AutoModelForSequenceClassification), (TokenClassifier, AutoModelForTokenClassification)],
)
def test_heads(kind: type[Transformer], auto_class: Any, tmp_path: Path) -> None:
    check_head(kind, MixtralConfig(**SHAPE, num_labels=3, pad_token_id=100), auto_class, tmp_path)
