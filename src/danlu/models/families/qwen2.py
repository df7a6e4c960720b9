"""Qwen2 and Qwen2.5 (arXiv:2407.10671, arXiv:2412.15115): the Llama block with biases on queries, keys and values;
the upper layers may see a sliding window only."""

from __future__ import annotations

from danlu.models.families import llama
from danlu.models.family import Family
from danlu.models.hf_config import HFConfig
from danlu.models.windows import read_window
from danlu.nn.config import ModelConfig


def read(hf: HFConfig) -> ModelConfig:
    """Shape from `config.json`."""
    dim, n_heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    n_layers = hf.integer("num_hidden_layers")
    head_dim = hf.integer("head_dim", None) or dim // n_heads
    context = hf.integer("max_position_embeddings", 32768)
    window, full_layers = read_window(hf, n_layers)
    return ModelConfig(
        vocab_size=hf.integer("vocab_size"),
        n_layers=n_layers,
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=hf.integer("num_key_value_heads", n_heads),
        head_dim=head_dim,
        ffn_dim=hf.integer("intermediate_size"),
        context=context,
        qkv_bias=True,
        window=window,
        full_layers=full_layers,
        rope=hf.rope(head_dim, context),
        activation=hf.activation("hidden_act", "silu"),
        norm_eps=hf.number("rms_norm_eps", 1e-6),
        tie_embeddings=hf.flag("tie_word_embeddings"),
    )


FAMILY = Family(
    model_type="qwen2",
    architectures={
        "Qwen2ForCausalLM": "causal_lm",
        "Qwen2ForSequenceClassification": "sequence_classification",
        "Qwen2ForTokenClassification": "token_classification",
        "Qwen2Model": "embedding",
    },
    read=read,
    names=llama.NAMES,
    prefix="model.",
    heads=llama.FAMILY.heads,
    ignored=llama.FAMILY.ignored,
)
