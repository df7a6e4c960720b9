"""Mistral 7B (arXiv:2310.06825): the Llama block, every layer of which sees a sliding window only."""

from __future__ import annotations

from danlu.models.families import llama
from danlu.models.family import Family
from danlu.models.hf_config import HFConfig
from danlu.models.windows import window_size
from danlu.nn.config import ModelConfig


def read(hf: HFConfig) -> ModelConfig:
    """Shape from `config.json`."""
    dim, n_heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    head_dim = hf.integer("head_dim", None) or dim // n_heads
    context = hf.integer("max_position_embeddings", 131072)
    return ModelConfig(
        vocab_size=hf.integer("vocab_size"),
        n_layers=hf.integer("num_hidden_layers"),
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=hf.integer("num_key_value_heads", n_heads),
        head_dim=head_dim,
        ffn_dim=hf.integer("intermediate_size"),
        context=context,
        window=window_size(hf, 4096),
        rope=hf.rope(head_dim, context),
        activation=hf.activation("hidden_act", "silu"),
        norm_eps=hf.number("rms_norm_eps", 1e-6),
        tie_embeddings=hf.flag("tie_word_embeddings"),
    )


FAMILY = Family(
    model_type="mistral",
    architectures={
        "MistralForCausalLM": "causal_lm",
        "MistralForSequenceClassification": "sequence_classification",
        "MistralForTokenClassification": "token_classification",
        "MistralModel": "embedding",
    },
    read=read,
    names=llama.NAMES,
    prefix="model.",
    heads=llama.FAMILY.heads,
    ignored=llama.FAMILY.ignored,
)
