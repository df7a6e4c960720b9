"""OLMo 2 (arXiv:2501.00656): norms on what the branches put out instead of on what goes in, and queries and keys
normalised over their full width."""

from __future__ import annotations

from danlu.models.families import llama
from danlu.models.family import Family
from danlu.models.hf_config import HFConfig
from danlu.models.names import Names
from danlu.nn.config import ModelConfig

NAMES: Names = {
    **llama.NAMES,
    "layers.{i}.post_attention_norm.weight": "layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.post_mlp_norm.weight": "layers.{i}.post_feedforward_layernorm.weight",
}


def read(hf: HFConfig) -> ModelConfig:
    """Shape from `config.json`."""
    dim, n_heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    head_dim = hf.integer("head_dim", None) or dim // n_heads
    context = hf.integer("max_position_embeddings", 2048)
    bias = hf.flag("attention_bias")
    return ModelConfig(
        vocab_size=hf.integer("vocab_size"),
        n_layers=hf.integer("num_hidden_layers"),
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=hf.integer("num_key_value_heads", n_heads),
        head_dim=head_dim,
        ffn_dim=hf.integer("intermediate_size"),
        context=context,
        qkv_bias=bias,
        attention_out_bias=bias,
        qk_norm="full",
        rope=hf.rope(head_dim, context),
        activation=hf.activation("hidden_act", "silu"),
        norm_eps=hf.number("rms_norm_eps", 1e-5),
        arrangement="branch",
        tie_embeddings=hf.flag("tie_word_embeddings"),
    )


FAMILY = Family(
    model_type="olmo2",
    architectures={
        "Olmo2ForCausalLM": "causal_lm",
        "Olmo2ForSequenceClassification": "sequence_classification",
        "Olmo2Model": "embedding",
    },
    read=read,
    names=NAMES,
    prefix="model.",
    heads={"causal_lm": llama.LM_HEAD, "sequence_classification": llama.SCORE},
    ignored=llama.FAMILY.ignored,
)
