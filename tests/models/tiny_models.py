"""Tiny random model folders in the Hugging Face layout, one for each family that GGUF knows, with a tokenizer."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from parity import random_reference
from transformers import AutoModelForCausalLM

from danlu.tokenizer.tokenizer import Tokenizer
from danlu.tokenizer.train import train_on

VOCAB_SIZE = 320
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
# Few dimensions and a small base, so that all three of its stretches occur: kept, mixed and divided frequencies.
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 7}
EXPERTS = {"num_experts_per_tok": 2, "num_key_value_heads": 2}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True, "rms_norm_eps": 1e-4}),
    "llama, biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama, llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama, linear": ("LlamaConfig", {"rope_parameters": {**YARN, "rope_type": "linear"}}),
    "llama, yarn": ("LlamaConfig", {"rope_parameters": YARN}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 32}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": None, **EXPERTS}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16, "norm_topk_prob": True, **EXPERTS},
    ),
    "gemma2": ("Gemma2Config", GEMMA),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "num_hidden_layers": 7}),
    "gemma3, linear": (
        "Gemma3TextConfig",
        {
            **GEMMA,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
            "num_hidden_layers": 7,
        },
    ),
    "gemma3, every third": (
        "Gemma3TextConfig",
        {
            **GEMMA,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        },
    ),
    "phi3": ("Phi3Config", {}),
    "olmo2": ("Olmo2Config", {"tie_word_embeddings": False}),
    "smollm3": ("SmolLM3Config", {"num_hidden_layers": 5}),
    "glm4": ("Glm4Config", {"head_dim": 16}),
}


@functools.cache
def tokenizer() -> Tokenizer:
    """Byte-level BPE with a way to cut text that llama.cpp knows."""
    texts = [f"def f{i}(x):\n    return x + {i}  # 丹炉 refines the text again\n" for i in range(200)]
    return train_on(texts, VOCAB_SIZE, 2)


def model_config(name: str, **options: Any) -> Any:
    """The config of `transformers` for one of MODELS."""
    kind, more = MODELS[name]
    return getattr(transformers, kind)(**{**SHAPE, **more, **options})


def save_reference(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Path:
    """A random model of `transformers` and the tokenizer, as they lie on a hub."""
    reference = random_reference(config, AutoModelForCausalLM)
    reference.to(dtype).save_pretrained(folder)
    tokenizer().save(folder)
    return folder
