"""Phi-1, Phi-1.5 and Phi-2 (arXiv:2306.11644, arXiv:2309.05463): attention and feed-forward side by side behind one
norm, a part of each head rotated, biases everywhere, in the head too."""

from __future__ import annotations

from danlu.models.families import llama
from danlu.models.family import Family
from danlu.models.hf_config import HFConfig
from danlu.models.names import Names
from danlu.nn.config import ModelConfig

NAMES: Names = {
    "embed.weight": "embed_tokens.weight",
    "norm.weight": "final_layernorm.weight",
    "norm.bias": "final_layernorm.bias",
    "layers.{i}.attention_norm.weight": "layers.{i}.input_layernorm.weight",
    "layers.{i}.attention_norm.bias": "layers.{i}.input_layernorm.bias",
    "layers.{i}.attention.q_proj.weight": "layers.{i}.self_attn.q_proj.weight",
    "layers.{i}.attention.k_proj.weight": "layers.{i}.self_attn.k_proj.weight",
    "layers.{i}.attention.v_proj.weight": "layers.{i}.self_attn.v_proj.weight",
    "layers.{i}.attention.o_proj.weight": "layers.{i}.self_attn.dense.weight",
    "layers.{i}.attention.q_proj.bias": "layers.{i}.self_attn.q_proj.bias",
    "layers.{i}.attention.k_proj.bias": "layers.{i}.self_attn.k_proj.bias",
    "layers.{i}.attention.v_proj.bias": "layers.{i}.self_attn.v_proj.bias",
    "layers.{i}.attention.o_proj.bias": "layers.{i}.self_attn.dense.bias",
    "layers.{i}.attention.q_norm.weight": "layers.{i}.self_attn.q_layernorm.weight",
    "layers.{i}.attention.q_norm.bias": "layers.{i}.self_attn.q_layernorm.bias",
    "layers.{i}.attention.k_norm.weight": "layers.{i}.self_attn.k_layernorm.weight",
    "layers.{i}.attention.k_norm.bias": "layers.{i}.self_attn.k_layernorm.bias",
    "layers.{i}.mlp.up_proj.weight": "layers.{i}.mlp.fc1.weight",
    "layers.{i}.mlp.up_proj.bias": "layers.{i}.mlp.fc1.bias",
    "layers.{i}.mlp.down_proj.weight": "layers.{i}.mlp.fc2.weight",
    "layers.{i}.mlp.down_proj.bias": "layers.{i}.mlp.fc2.bias",
}


def read(hf: HFConfig) -> ModelConfig:
    """Shape from `config.json`."""
    dim, n_heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    head_dim = hf.integer("head_dim", dim // n_heads)
    context = hf.integer("max_position_embeddings", 2048)
    return ModelConfig(
        vocab_size=hf.integer("vocab_size"),
        n_layers=hf.integer("num_hidden_layers"),
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=hf.integer("num_key_value_heads", n_heads),
        head_dim=head_dim,
        ffn_dim=hf.integer("intermediate_size"),
        context=context,
        qkv_bias=True,
        attention_out_bias=True,
        ffn_bias=True,
        qk_norm="head" if hf.flag("qk_layernorm") else None,
        rope=hf.rope(head_dim, context, default_share=0.5),
        activation=hf.activation("hidden_act", "gelu_new"),
        gated=False,
        norm="layer",
        norm_eps=hf.number("layer_norm_eps", 1e-5),
        arrangement="parallel",
        tie_embeddings=hf.flag("tie_word_embeddings"),
        head_bias=True,
    )


FAMILY = Family(
    model_type="phi",
    architectures={
        "PhiForCausalLM": "causal_lm",
        "PhiForSequenceClassification": "sequence_classification",
        "PhiForTokenClassification": "token_classification",
        "PhiModel": "embedding",
    },
    read=read,
    names=NAMES,
    prefix="model.",
    heads={**llama.FAMILY.heads, "causal_lm": {"head.weight": "lm_head.weight", "head.bias": "lm_head.bias"}},
)
