"""Llama 1 to 3 (arXiv:2302.13971, arXiv:2307.09288, arXiv:2407.21783): pre-norm blocks with RMSNorm, rotary positions,
grouped queries and SwiGLU. Most later decoders start from this block and its names."""

from __future__ import annotations

from danlu.models.family import Family
from danlu.models.hf_config import HFConfig
from danlu.models.names import Names
from danlu.nn.config import ModelConfig

NAMES: Names = {
    "embed.weight": "embed_tokens.weight",
    "norm.weight": "norm.weight",
    "layers.{i}.attention_norm.weight": "layers.{i}.input_layernorm.weight",
    "layers.{i}.attention.q_proj.weight": "layers.{i}.self_attn.q_proj.weight",
    "layers.{i}.attention.k_proj.weight": "layers.{i}.self_attn.k_proj.weight",
    "layers.{i}.attention.v_proj.weight": "layers.{i}.self_attn.v_proj.weight",
    "layers.{i}.attention.o_proj.weight": "layers.{i}.self_attn.o_proj.weight",
    "layers.{i}.attention.q_proj.bias": "layers.{i}.self_attn.q_proj.bias",
    "layers.{i}.attention.k_proj.bias": "layers.{i}.self_attn.k_proj.bias",
    "layers.{i}.attention.v_proj.bias": "layers.{i}.self_attn.v_proj.bias",
    "layers.{i}.attention.o_proj.bias": "layers.{i}.self_attn.o_proj.bias",
    "layers.{i}.attention.q_norm.weight": "layers.{i}.self_attn.q_norm.weight",
    "layers.{i}.attention.k_norm.weight": "layers.{i}.self_attn.k_norm.weight",
    "layers.{i}.mlp_norm.weight": "layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp.gate_proj.weight": "layers.{i}.mlp.gate_proj.weight",
    "layers.{i}.mlp.up_proj.weight": "layers.{i}.mlp.up_proj.weight",
    "layers.{i}.mlp.down_proj.weight": "layers.{i}.mlp.down_proj.weight",
    "layers.{i}.mlp.gate_proj.bias": "layers.{i}.mlp.gate_proj.bias",
    "layers.{i}.mlp.up_proj.bias": "layers.{i}.mlp.up_proj.bias",
    "layers.{i}.mlp.down_proj.bias": "layers.{i}.mlp.down_proj.bias",
}
LM_HEAD: Names = {"head.weight": "lm_head.weight"}
SCORE: Names = {"head.weight": "score.weight"}
TOKEN_SCORE: Names = {"head.weight": "score.weight", "head.bias": "score.bias"}


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
        ffn_bias=hf.flag("mlp_bias"),
        rope=hf.rope(head_dim, context),
        activation=hf.activation("hidden_act", "silu"),
        norm_eps=hf.number("rms_norm_eps", 1e-6),
        tie_embeddings=hf.flag("tie_word_embeddings"),
    )


FAMILY = Family(
    model_type="llama",
    architectures={
        "LlamaForCausalLM": "causal_lm",
        "LlamaForSequenceClassification": "sequence_classification",
        "LlamaForTokenClassification": "token_classification",
        "LlamaModel": "embedding",
    },
    read=read,
    names=NAMES,
    prefix="model.",
    heads={"causal_lm": LM_HEAD, "sequence_classification": SCORE, "token_classification": TOKEN_SCORE},
    ignored=("*rotary_emb.inv_freq",),
)
