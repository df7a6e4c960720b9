"""GLM-4 (arXiv:2406.12793): the Llama block with half of each head turned, in interleaved pairs, and gate and up
projections in one tensor. The models of 2025 (`glm4`) have norms behind their branches too."""

from __future__ import annotations

from dataclasses import replace

from danlu.models.families import llama
from danlu.models.family import Family
from danlu.models.hf_config import HFConfig
from danlu.models.names import GATE_UP_WEIGHT, Fused, Names
from danlu.nn.config import ModelConfig

GLM_NAMES: Names = {
    **{ours: theirs for ours, theirs in llama.NAMES.items() if ours not in GATE_UP_WEIGHT},
    GATE_UP_WEIGHT: Fused("layers.{i}.mlp.gate_up_proj.weight"),
}
GLM4_NAMES: Names = {
    **GLM_NAMES,
    "layers.{i}.post_attention_norm.weight": "layers.{i}.post_self_attn_layernorm.weight",
    "layers.{i}.post_mlp_norm.weight": "layers.{i}.post_mlp_layernorm.weight",
}


def read_glm(hf: HFConfig) -> ModelConfig:
    """Shape from `config.json`."""
    context = hf.integer("max_position_embeddings", 131072)
    head_dim = hf.integer("head_dim", 128)
    return ModelConfig(
        vocab_size=hf.integer("vocab_size"),
        n_layers=hf.integer("num_hidden_layers"),
        dim=hf.integer("hidden_size"),
        n_heads=hf.integer("num_attention_heads"),
        n_kv_heads=hf.integer("num_key_value_heads", 2),
        head_dim=head_dim,
        ffn_dim=hf.integer("intermediate_size"),
        context=context,
        qkv_bias=hf.flag("attention_bias", True),
        rope=replace(hf.rope(head_dim, context, default_share=0.5), interleaved=True),
        activation=hf.activation("hidden_act", "silu"),
        norm_eps=hf.number("rms_norm_eps", 1.5625e-07),
        tie_embeddings=hf.flag("tie_word_embeddings"),
    )


def read_glm4(hf: HFConfig) -> ModelConfig:
    """Shape from `config.json`."""
    return replace(read_glm(hf), arrangement="sandwich")


GLM = Family(
    model_type="glm",
    architectures={
        "GlmForCausalLM": "causal_lm",
        "GlmForSequenceClassification": "sequence_classification",
        "GlmForTokenClassification": "token_classification",
        "GlmModel": "embedding",
    },
    read=read_glm,
    names=GLM_NAMES,
    prefix="model.",
    heads=llama.FAMILY.heads,
)
GLM4 = Family(
    model_type="glm4",
    architectures={
        "Glm4ForCausalLM": "causal_lm",
        "Glm4ForSequenceClassification": "sequence_classification",
        "Glm4ForTokenClassification": "token_classification",
        "Glm4Model": "embedding",
    },
    read=read_glm4,
    names=GLM4_NAMES,
    prefix="model.",
    heads=llama.FAMILY.heads,
)
