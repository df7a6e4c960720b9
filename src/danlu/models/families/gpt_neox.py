"""GPT-NeoX-20B (arXiv:2204.06745) and Pythia (arXiv:2304.01373): attention and feed-forward side by side, each with a
norm of its own; a quarter of each head is rotated; the queries, keys and values of a head lie together."""

from __future__ import annotations

from danlu.models.families.gpt2 import HEADS
from danlu.models.family import Family
from danlu.models.hf_config import HFConfig
from danlu.models.names import QKV_BIAS, QKV_WEIGHT, Fused, Names
from danlu.nn.config import ModelConfig

NAMES: Names = {
    "embed.weight": "embed_in.weight",
    "norm.weight": "final_layer_norm.weight",
    "norm.bias": "final_layer_norm.bias",
    "layers.{i}.attention_norm.weight": "layers.{i}.input_layernorm.weight",
    "layers.{i}.attention_norm.bias": "layers.{i}.input_layernorm.bias",
    QKV_WEIGHT: Fused("layers.{i}.attention.query_key_value.weight", "heads"),
    QKV_BIAS: Fused("layers.{i}.attention.query_key_value.bias", "heads"),
    "layers.{i}.attention.o_proj.weight": "layers.{i}.attention.dense.weight",
    "layers.{i}.attention.o_proj.bias": "layers.{i}.attention.dense.bias",
    "layers.{i}.mlp_norm.weight": "layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp_norm.bias": "layers.{i}.post_attention_layernorm.bias",
    "layers.{i}.mlp.up_proj.weight": "layers.{i}.mlp.dense_h_to_4h.weight",
    "layers.{i}.mlp.up_proj.bias": "layers.{i}.mlp.dense_h_to_4h.bias",
    "layers.{i}.mlp.down_proj.weight": "layers.{i}.mlp.dense_4h_to_h.weight",
    "layers.{i}.mlp.down_proj.bias": "layers.{i}.mlp.dense_4h_to_h.bias",
}


def read(hf: HFConfig) -> ModelConfig:
    """Shape from `config.json`."""
    dim, n_heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    head_dim, context = dim // n_heads, hf.integer("max_position_embeddings", 2048)
    bias = hf.flag("attention_bias", True)
    base, share = hf.number("rotary_emb_base", 10_000.0), hf.number("rotary_pct", 0.25)
    # Some versions of transformers wrote these two again under the names of other families, and read only the above.
    hf.only("rope_theta", base)
    hf.only("partial_rotary_factor", share)
    return ModelConfig(
        vocab_size=hf.integer("vocab_size"),
        n_layers=hf.integer("num_hidden_layers"),
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=head_dim,
        ffn_dim=hf.integer("intermediate_size"),
        context=context,
        qkv_bias=bias,
        attention_out_bias=bias,
        ffn_bias=True,
        rope=hf.rope(head_dim, context, default_base=base, default_share=share),
        activation=hf.activation("hidden_act", "gelu"),
        gated=False,
        norm="layer",
        norm_eps=hf.number("layer_norm_eps", 1e-5),
        arrangement="parallel_two_norms" if hf.flag("use_parallel_residual", True) else "pre",
        tie_embeddings=hf.flag("tie_word_embeddings"),
    )


FAMILY = Family(
    model_type="gpt_neox",
    architectures={
        "GPTNeoXForCausalLM": "causal_lm",
        "GPTNeoXForSequenceClassification": "sequence_classification",
        "GPTNeoXForTokenClassification": "token_classification",
        "GPTNeoXForQuestionAnswering": "question_answering",
        "GPTNeoXModel": "embedding",
    },
    read=read,
    names=NAMES,
    prefix="gpt_neox.",
    heads={**HEADS, "causal_lm": {"head.weight": "embed_out.weight"}},
    ignored=("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq"),
    harmless=("is_decoder",),
)
