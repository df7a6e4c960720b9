"""Qwen3-MoE against transformers: experts in all layers, in some, and in none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from legacy import check_config_json, read_config_json
from moe_checks import check_flops, check_gradient_checkpointing
from parity import check_causal_lm, check_fields_are_not_ignored, check_head, random_reference
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Qwen3MoeConfig,
)

from danlu.errors import DanluError
from danlu.models.heads import SequenceClassifier, TokenClassifier
from danlu.models.load import load_model
from danlu.models.transformer import Transformer

SHAPE: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 20, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts": 6,
    "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"norm_topk_prob": True, "head_dim": 12, "use_sliding_window": True, "sliding_window": 7},
        {"norm_topk_prob": False, "attention_bias": True, "tie_word_embeddings": True, "decoder_sparse_step": 2},
        {"mlp_only_layers": [0, 2], "num_experts": 5, "num_experts_per_tok": 4, "num_key_value_heads": 1},
        {"num_experts": 3, "num_experts_per_tok": 1, "hidden_act": "gelu", "rms_norm_eps": 1e-3},
        {"num_experts": 0},
    ],
)
def test_qwen3_moe(options: dict[str, Any], tmp_path: Path) -> None:
    check_causal_lm(Qwen3MoeConfig(**{**SHAPE, **options}), tmp_path)


# As published with Qwen3-30B-A3B.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 99,
    "decoder_sparse_step": 1, "eos_token_id": 100, "head_dim": 16, "hidden_act": "silu", "hidden_size": 32,
    "initializer_range": 0.02, "intermediate_size": 40, "max_position_embeddings": 40960, "max_window_layers": 48,
    "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 20, "norm_topk_prob": True,
    "num_attention_heads": 4, "num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 101,
}  # fmt: skip


@pytest.mark.parametrize("drop", [(), ("norm_topk_prob", "mlp_only_layers", "decoder_sparse_step", "head_dim")])
def test_published_configs(drop: tuple[str, ...], tmp_path: Path) -> None:
    check_config_json({key: value for key, value in PUBLISHED.items() if key not in drop}, tmp_path)


def test_flops_and_checkpointing(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(**SHAPE, mlp_only_layers=[1])
    random_reference(config, AutoModelForCausalLM).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    check_flops(model)
    check_gradient_checkpointing(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_local_experts": 8}, "num_experts and num_local_experts say the same thing differently"),
        ({"use_sliding_window": True, "sliding_window": 8}, "max_window_layers is 48"),
        ({"mlp_only_layers": ["0"]}, "mlp_only_layers"),
        ({"mlp_only_layers": 1}, "mlp_only_layers"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
    ],
)
def test_what_cannot_be_honoured_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DanluError, match=message):
        read_config_json({**PUBLISHED, **change})


def test_no_field_is_ignored(tmp_path: Path) -> None:
    refused = check_fields_are_not_ignored(
        Qwen3MoeConfig(**SHAPE, use_sliding_window=True, sliding_window=7, mlp_only_layers=[0]), tmp_path
    )
    assert {"num_local_experts", "num_hidden_layers"} <= refused


@pytest.mark.parametrize(
    ("kind", "auto_class"),
    [(SequenceClassifier, AutoModelForSequenceClassification), (TokenClassifier, AutoModelForTokenClassification)],
)
def test_heads(kind: type[Transformer], auto_class: Any, tmp_path: Path) -> None:
    check_head(kind, Qwen3MoeConfig(**SHAPE, num_labels=3, pad_token_id=100), auto_class, tmp_path)
