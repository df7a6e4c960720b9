"""Qwen3 (arXiv:2505.09388): the Llama block with normalised queries and keys. Models made here are in this family: it
opens in transformers, vLLM and llama.cpp."""

from __future__ import annotations

from typing import Any

from danlu.models.families import llama
from danlu.models.family import Family
from danlu.models.hf_config import HFConfig
from danlu.models.windows import read_window
from danlu.nn.config import ModelConfig


def read(hf: HFConfig) -> ModelConfig:
    """Shape from `config.json`."""
    context = hf.integer("max_position_embeddings", 32768)
    n_layers, n_heads = hf.integer("num_hidden_layers"), hf.integer("num_attention_heads")
    head_dim = hf.integer("head_dim", 128)
    bias = hf.flag("attention_bias")
    window, full_layers = read_window(hf, n_layers)
    return ModelConfig(
        vocab_size=hf.integer("vocab_size"),
        n_layers=n_layers,
        dim=hf.integer("hidden_size"),
        n_heads=n_heads,
        n_kv_heads=hf.integer("num_key_value_heads", n_heads),
        head_dim=head_dim,
        ffn_dim=hf.integer("intermediate_size"),
        context=context,
        qkv_bias=bias,
        attention_out_bias=bias,
        qk_norm="head",
        window=window,
        full_layers=full_layers,
        rope=hf.rope(head_dim, context),
        activation=hf.activation("hidden_act", "silu"),
        norm_eps=hf.number("rms_norm_eps", 1e-6),
        tie_embeddings=hf.flag("tie_word_embeddings"),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of a model made here."""
    assert config.rope is not None
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.base,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": 0.02,
        "use_cache": True,
    }


FAMILY = Family(
    model_type="qwen3",
    architectures={
        "Qwen3ForCausalLM": "causal_lm",
        "Qwen3ForSequenceClassification": "sequence_classification",
        "Qwen3ForTokenClassification": "token_classification",
        "Qwen3Model": "embedding",
    },
    read=read,
    names=llama.NAMES,
    prefix="model.",
    heads=llama.FAMILY.heads,
    ignored=llama.FAMILY.ignored,
    write=write,
)
