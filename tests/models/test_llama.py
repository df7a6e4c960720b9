"""Llama and Qwen3 against transformers, with every rotary scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import check_causal_lm, close, random_ids, random_reference
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from danlu.models.causal_lm import CausalLM
from danlu.models.load import load_model
from danlu.nn.config import ModelConfig, Rope, RopeScaling
from danlu.nn.kv_cache import KVCache

SHAPE: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4},
    "yarn with mscale": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7,
        "mscale_all_dim": 1.3, "beta_fast": 8, "beta_slow": 1, "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "longrope": {
        "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 32,
        "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)],
    },
    "longrope, long": {
        "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 4,
        "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)],
    },
}  # fmt: skip


@pytest.mark.parametrize("scaling", [name for name in SCALINGS if name != "longrope, long"])
def test_rotary_scalings(scaling: str, tmp_path: Path) -> None:
    config = LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 500.0, **SCALINGS[scaling]})
    check_causal_lm(config, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"head_dim": 24, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
        {"num_key_value_heads": 4, "hidden_act": "gelu"},
    ],
)
def test_llama(options: dict[str, Any], tmp_path: Path) -> None:
    check_causal_lm(LlamaConfig(**{**SHAPE, **options}), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"head_dim": 16, "tie_word_embeddings": True},
        {"head_dim": 32, "attention_bias": True, "use_sliding_window": True, "sliding_window": 7,
         "max_window_layers": 1},
    ],
)  # fmt: skip
def test_qwen3(options: dict[str, Any], tmp_path: Path) -> None:
    check_causal_lm(Qwen3Config(**SHAPE, **options), tmp_path)


@pytest.mark.parametrize("scaling", ["longrope, long", "dynamic"])
def test_scalings_that_depend_on_the_length_agree_with_a_cache_across_the_limit(scaling: str) -> None:
    """Keys that were cached before the limit must be turned like those behind it."""
    longrope = RopeScaling("longrope", 4.0, 8, short_factors=(1.0,) * 8, long_factors=tuple(2.0 + i for i in range(8)))
    rope = Rope(scaling=longrope if "longrope" in scaling else RopeScaling("dynamic", 4.0))
    model = CausalLM(ModelConfig(101, 2, 64, 4, 2, 16, 88, context=8, rope=rope)).eval()
    ids = random_ids(101, 2, 20)
    with torch.no_grad():
        cache = KVCache(model.config, 2, 20)
        pieces = torch.cat([model(piece, cache=cache) for piece in ids.split(3, dim=1)], dim=1)
        close(pieces, model(ids), 1e-4, "a cache across the limit")


def test_dynamic_scaling(tmp_path: Path) -> None:
    """In one pass beyond the context, as transformers stretches it."""
    config = LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 500.0, "factor": 3.0})
    reference = random_reference(config, AutoModelForCausalLM)
    reference.save_pretrained(tmp_path)
    ids = random_ids(101, 2, 24)
    with torch.no_grad():
        close(load_model(tmp_path)(ids), reference(ids).logits, 1e-4, "beyond the context")
