"""Falcon (arXiv:2311.16867). Three shapes share the name: Falcon-7B, whose attention and feed-forward see one norm and
whose queries share a single key head; Falcon-40B and later (``new_decoder_architecture``), with grouped queries and one
or two norms; and Falcon-RW, one branch after the other with ALiBi and biases. The first releases carried other names
(``RefinedWeb`` for 40B, ``RefinedWebModel`` for the others)."""

from __future__ import annotations

from dataclasses import replace

from danlu.models.families.gpt2 import HEADS
from danlu.models.family import Family
from danlu.models.hf_config import HFConfig
from danlu.models.names import QKV_BIAS, QKV_WEIGHT, ByArrangement, Fused, Names
from danlu.nn.config import Arrangement, ModelConfig


def _norm(of: str, parameter: str) -> ByArrangement:
    """Where the norm in front of a branch is stored; 40B gave its norms names of their own."""
    sequential = "input" if of == "attn" else "post_attention"
    return ByArrangement({
        "pre": f"h.{{i}}.{sequential}_layernorm.{parameter}",
        "parallel": f"h.{{i}}.input_layernorm.{parameter}",
        "parallel_two_norms": f"h.{{i}}.ln_{of}.{parameter}",
    })  # fmt: skip


NAMES: Names = {
    "embed.weight": "word_embeddings.weight",
    "norm.weight": "ln_f.weight",
    "norm.bias": "ln_f.bias",
    "layers.{i}.attention_norm.weight": _norm("attn", "weight"),
    "layers.{i}.attention_norm.bias": _norm("attn", "bias"),
    QKV_WEIGHT: Fused("h.{i}.self_attention.query_key_value.weight", "groups"),
    QKV_BIAS: Fused("h.{i}.self_attention.query_key_value.bias", "groups"),
    "layers.{i}.attention.o_proj.weight": "h.{i}.self_attention.dense.weight",
    "layers.{i}.attention.o_proj.bias": "h.{i}.self_attention.dense.bias",
    "layers.{i}.mlp_norm.weight": _norm("mlp", "weight"),
    "layers.{i}.mlp_norm.bias": _norm("mlp", "bias"),
    "layers.{i}.mlp.up_proj.weight": "h.{i}.mlp.dense_h_to_4h.weight",
    "layers.{i}.mlp.up_proj.bias": "h.{i}.mlp.dense_h_to_4h.bias",
    "layers.{i}.mlp.down_proj.weight": "h.{i}.mlp.dense_4h_to_h.weight",
    "layers.{i}.mlp.down_proj.bias": "h.{i}.mlp.dense_4h_to_h.bias",
}


def read(hf: HFConfig) -> ModelConfig:
    """Shape from `config.json`."""
    return _read(hf, grouped=hf.flag("new_decoder_architecture"))


def _read(hf: HFConfig, grouped: bool) -> ModelConfig:
    """Shape of Falcon-40B (``grouped``) or of one of the others."""
    dim = hf.integer(hf.spelling("hidden_size", "n_embed"))
    n_heads = hf.integer(hf.spelling("num_attention_heads", "n_head"))
    head_dim, context = dim // n_heads, hf.integer("max_position_embeddings", 2048)
    kv_heads_key = hf.spelling("num_kv_heads", "n_head_kv")
    stored_kv_heads = hf.integer(kv_heads_key, n_heads)
    # Null, which their type allows, means false, not the default.
    one_kv_head = hf.flag("multi_query", "multi_query" not in hf.content)
    parallel = hf.flag("parallel_attn", "parallel_attn" not in hf.content)
    arrangement: Arrangement
    if grouped:
        hf.only("parallel_attn", True)
        hf.only("num_ln_in_parallel_attn", 1, 2)
        n_kv_heads = stored_kv_heads
        arrangement = "parallel" if hf.integer("num_ln_in_parallel_attn", 2) == 1 else "parallel_two_norms"
    else:
        n_kv_heads = 1 if one_kv_head else n_heads
        arrangement = "parallel" if parallel else "pre"
        if parallel:
            hf.only("num_ln_in_parallel_attn", 1)
        if not one_kv_head:
            hf.only(kv_heads_key, n_heads)
    ffn_dim = hf.integer("ffn_hidden_size", 4 * dim)
    hf.only("ff_factor", ffn_dim / dim)
    hf.only("head_dim", head_dim)
    hf.only("apply_residual_connection_post_layernorm", False)
    rope, alibi, bias = hf.rope(head_dim, context), hf.flag("alibi"), hf.flag("bias")
    return ModelConfig(
        vocab_size=hf.integer("vocab_size"),
        n_layers=hf.integer(hf.spelling("num_hidden_layers", "n_layer")),
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_dim=ffn_dim,
        context=context,
        qkv_bias=bias,
        attention_out_bias=bias,
        ffn_bias=bias,
        rope=None if alibi else rope,
        alibi="falcon" if alibi else None,
        activation=hf.activation("activation", "gelu"),
        gated=False,
        norm="layer",
        norm_eps=hf.number("layer_norm_epsilon", 1e-5),
        arrangement=arrangement,
        tie_embeddings=hf.flag("tie_word_embeddings", True),
    )


def read_refined_web(hf: HFConfig) -> ModelConfig:
    """Shape of Falcon-40B as first published."""
    return _read(hf, grouped=True)


def read_refined_web_model(hf: HFConfig) -> ModelConfig:
    """Shape of Falcon-7B and Falcon-RW as first published."""
    return _read(hf, grouped=False)


FAMILY = Family(
    model_type="falcon",
    architectures={
        "FalconForCausalLM": "causal_lm",
        "FalconForSequenceClassification": "sequence_classification",
        "FalconForTokenClassification": "token_classification",
        "FalconForQuestionAnswering": "question_answering",
        "FalconModel": "embedding",
    },
    read=read,
    names=NAMES,
    prefix="transformer.",
    heads=HEADS,
)
REFINED_WEB = replace(
    FAMILY,
    model_type="RefinedWeb",
    architectures={"RWForCausalLM": "causal_lm", "RWModel": "embedding"},
    read=read_refined_web,
    heads={"causal_lm": HEADS["causal_lm"]},
)
REFINED_WEB_MODEL = replace(REFINED_WEB, model_type="RefinedWebModel", read=read_refined_web_model)
