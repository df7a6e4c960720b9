"""BLOOM (arXiv:2211.05100): ALiBi instead of positions, a norm behind the embedding, biases everywhere; the queries,
keys and values of a head lie together. The published checkpoints have no ``transformer.`` in their names."""

from __future__ import annotations

from danlu.models.families.gpt2 import HEADS
from danlu.models.family import Family
from danlu.models.hf_config import HFConfig
from danlu.models.names import QKV_BIAS, QKV_WEIGHT, Fused, Names
from danlu.nn.config import ModelConfig

NAMES: Names = {
    "embed.weight": "word_embeddings.weight",
    "embed_norm.weight": "word_embeddings_layernorm.weight",
    "embed_norm.bias": "word_embeddings_layernorm.bias",
    "norm.weight": "ln_f.weight",
    "norm.bias": "ln_f.bias",
    "layers.{i}.attention_norm.weight": "h.{i}.input_layernorm.weight",
    "layers.{i}.attention_norm.bias": "h.{i}.input_layernorm.bias",
    QKV_WEIGHT: Fused("h.{i}.self_attention.query_key_value.weight", "heads"),
    QKV_BIAS: Fused("h.{i}.self_attention.query_key_value.bias", "heads"),
    "layers.{i}.attention.o_proj.weight": "h.{i}.self_attention.dense.weight",
    "layers.{i}.attention.o_proj.bias": "h.{i}.self_attention.dense.bias",
    "layers.{i}.mlp_norm.weight": "h.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp_norm.bias": "h.{i}.post_attention_layernorm.bias",
    "layers.{i}.mlp.up_proj.weight": "h.{i}.mlp.dense_h_to_4h.weight",
    "layers.{i}.mlp.up_proj.bias": "h.{i}.mlp.dense_h_to_4h.bias",
    "layers.{i}.mlp.down_proj.weight": "h.{i}.mlp.dense_4h_to_h.weight",
    "layers.{i}.mlp.down_proj.bias": "h.{i}.mlp.dense_4h_to_h.bias",
}


def read(hf: HFConfig) -> ModelConfig:
    """Shape from `config.json`."""
    dim = hf.integer(hf.spelling("hidden_size", "n_embed"))
    n_heads = hf.integer(hf.spelling("n_head", "num_attention_heads"))
    hf.only("apply_residual_connection_post_layernorm", False)
    hf.only("n_inner", 4 * dim)
    if hf.integer("pretraining_tp", 1) > 1:  # sums the output projections in slices, and forgets their biases there
        hf.only("slow_but_exact", False)
    return ModelConfig(
        vocab_size=hf.integer("vocab_size"),
        n_layers=hf.integer(hf.spelling("n_layer", "num_hidden_layers")),
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=dim // n_heads,
        ffn_dim=4 * dim,
        context=hf.integer("seq_length", 2048),
        qkv_bias=True,
        attention_out_bias=True,
        ffn_bias=True,
        alibi="bloom",
        activation="gelu_tanh",
        gated=False,
        norm="layer",
        norm_eps=hf.number("layer_norm_epsilon", 1e-5),
        embed_norm=True,
        tie_embeddings=hf.flag("tie_word_embeddings", True),
    )


FAMILY = Family(
    model_type="bloom",
    architectures={
        "BloomForCausalLM": "causal_lm",
        "BloomForSequenceClassification": "sequence_classification",
        "BloomForTokenClassification": "token_classification",
        "BloomForQuestionAnswering": "question_answering",
        "BloomModel": "embedding",
    },
    read=read,
    names=NAMES,
    prefix="transformer.",
    heads=HEADS,
    # How Megatron fused its kernels and in which precision it computed; ALiBi knows no offset in what follows.
    harmless=(
        "attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "skip_bias_add",
        "skip_bias_add_qkv", "offset_alibi",
    ),
)  # fmt: skip
