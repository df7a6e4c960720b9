"""Phi-3, Phi-3.5, Phi-4 (arXiv:2404.14219, arXiv:2412.08905): the Llama block with its matrices fused; LongRoPE
(arXiv:2402.13753) for the long contexts, a sliding window for the short one."""

from __future__ import annotations

from danlu.models.families import llama
from danlu.models.family import Family
from danlu.models.hf_config import HFConfig
from danlu.models.names import GATE_UP_WEIGHT, QKV_WEIGHT, Fused, Names
from danlu.nn.config import ModelConfig

NAMES: Names = {
    "embed.weight": "embed_tokens.weight",
    "norm.weight": "norm.weight",
    "layers.{i}.attention_norm.weight": "layers.{i}.input_layernorm.weight",
    QKV_WEIGHT: Fused("layers.{i}.self_attn.qkv_proj.weight"),
    "layers.{i}.attention.o_proj.weight": "layers.{i}.self_attn.o_proj.weight",
    "layers.{i}.mlp_norm.weight": "layers.{i}.post_attention_layernorm.weight",
    GATE_UP_WEIGHT: Fused("layers.{i}.mlp.gate_up_proj.weight"),
    "layers.{i}.mlp.down_proj.weight": "layers.{i}.mlp.down_proj.weight",
}


def read(hf: HFConfig) -> ModelConfig:
    """Shape from `config.json`."""
    dim, n_heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    head_dim = hf.integer("head_dim", dim // n_heads)
    context = hf.integer("max_position_embeddings", 4096)
    rope = hf.rope(head_dim, context, default_share=1.0)
    if rope.scaling is not None:
        if rope.scaling.kind != "longrope":
            raise hf.error(f"rope_type is {rope.scaling.kind!r}; this family has 'default' and 'longrope'")
        hf.integer("original_max_position_embeddings")  # required beside the factors: it decides which of them count
    for switch in ("full_attn_mod", "interpolate_factor"):  # Phi-4-mini's, for other models of its makers
        hf.only(switch, 1)
    return ModelConfig(
        vocab_size=hf.integer("vocab_size"),
        n_layers=hf.integer("num_hidden_layers"),
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=hf.integer("num_key_value_heads", n_heads),
        head_dim=head_dim,
        ffn_dim=hf.integer("intermediate_size"),
        context=context,
        window=hf.integer("sliding_window", None),
        rope=rope,
        activation=hf.activation("hidden_act", "silu"),
        norm_eps=hf.number("rms_norm_eps", 1e-5),
        tie_embeddings=hf.flag("tie_word_embeddings"),
    )


FAMILY = Family(
    model_type="phi3",
    architectures={
        "Phi3ForCausalLM": "causal_lm",
        "Phi3ForSequenceClassification": "sequence_classification",
        "Phi3ForTokenClassification": "token_classification",
        "Phi3Model": "embedding",
    },
    read=read,
    names=NAMES,
    prefix="model.",
    heads=llama.FAMILY.heads,
    ignored=llama.FAMILY.ignored,
)
