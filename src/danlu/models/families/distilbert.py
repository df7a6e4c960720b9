"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108): BERT with half of its layers, without token types and pooler."""

from __future__ import annotations

from danlu.models.families import bert
from danlu.models.family import ClassifierShape, Family
from danlu.models.hf_config import HFConfig
from danlu.models.names import Names
from danlu.nn.config import ModelConfig

NAMES: Names = {
    "embed.weight": "embeddings.word_embeddings.weight",
    "embed_positions.weight": "embeddings.position_embeddings.weight",
    "embed_norm.weight": "embeddings.LayerNorm.weight",
    "embed_norm.bias": "embeddings.LayerNorm.bias",
    "layers.{i}.attention.q_proj.weight": "transformer.layer.{i}.attention.q_lin.weight",
    "layers.{i}.attention.q_proj.bias": "transformer.layer.{i}.attention.q_lin.bias",
    "layers.{i}.attention.k_proj.weight": "transformer.layer.{i}.attention.k_lin.weight",
    "layers.{i}.attention.k_proj.bias": "transformer.layer.{i}.attention.k_lin.bias",
    "layers.{i}.attention.v_proj.weight": "transformer.layer.{i}.attention.v_lin.weight",
    "layers.{i}.attention.v_proj.bias": "transformer.layer.{i}.attention.v_lin.bias",
    "layers.{i}.attention.o_proj.weight": "transformer.layer.{i}.attention.out_lin.weight",
    "layers.{i}.attention.o_proj.bias": "transformer.layer.{i}.attention.out_lin.bias",
    "layers.{i}.post_attention_norm.weight": "transformer.layer.{i}.sa_layer_norm.weight",
    "layers.{i}.post_attention_norm.bias": "transformer.layer.{i}.sa_layer_norm.bias",
    "layers.{i}.mlp.up_proj.weight": "transformer.layer.{i}.ffn.lin1.weight",
    "layers.{i}.mlp.up_proj.bias": "transformer.layer.{i}.ffn.lin1.bias",
    "layers.{i}.mlp.down_proj.weight": "transformer.layer.{i}.ffn.lin2.weight",
    "layers.{i}.mlp.down_proj.bias": "transformer.layer.{i}.ffn.lin2.bias",
    "layers.{i}.post_mlp_norm.weight": "transformer.layer.{i}.output_layer_norm.weight",
    "layers.{i}.post_mlp_norm.bias": "transformer.layer.{i}.output_layer_norm.bias",
}
MASKED_LM: Names = {
    "transform.weight": "vocab_transform.weight",
    "transform.bias": "vocab_transform.bias",
    "transform_norm.weight": "vocab_layer_norm.weight",
    "transform_norm.bias": "vocab_layer_norm.bias",
    "head.weight": "vocab_projector.weight",
    "head.bias": "vocab_projector.bias",
}
POOLED_CLASSIFIER: Names = {
    "pooler.weight": "pre_classifier.weight",
    "pooler.bias": "pre_classifier.bias",
    **bert.CLASSIFIER,
}


def read(hf: HFConfig) -> ModelConfig:
    """Shape from `config.json`."""
    hf.only("pruned_heads", {})
    hf.only("tie_weights_", True)  # the first name of the field below
    dim = hf.integer(hf.spelling("dim", "hidden_size"))
    n_heads = hf.integer(hf.spelling("n_heads", "num_attention_heads"))
    return ModelConfig(
        vocab_size=hf.integer("vocab_size"),
        n_layers=hf.integer(hf.spelling("n_layers", "num_hidden_layers")),
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=dim // n_heads,
        ffn_dim=hf.integer("hidden_dim"),
        context=hf.integer("max_position_embeddings", 512),
        causal=False,
        qkv_bias=True,
        attention_out_bias=True,
        ffn_bias=True,
        learned_positions=True,
        count_padding=True,
        activation=hf.activation("activation", "gelu"),
        gated=False,
        norm="layer",
        norm_eps=1e-12,
        arrangement="post",
        embed_norm=True,
        final_norm=False,
        tie_embeddings=hf.flag("tie_word_embeddings", True),
    )


FAMILY = Family(
    model_type="distilbert",
    architectures={
        "DistilBertForMaskedLM": "masked_lm",
        "DistilBertForSequenceClassification": "sequence_classification",
        "DistilBertForTokenClassification": "token_classification",
        "DistilBertForQuestionAnswering": "question_answering",
        "DistilBertModel": "embedding",
    },
    read=read,
    names=NAMES,
    prefix="distilbert.",
    heads={
        "masked_lm": MASKED_LM,
        "sequence_classification": POOLED_CLASSIFIER,
        "token_classification": bert.CLASSIFIER,
        "question_answering": bert.SPANS,
    },
    classifier=ClassifierShape(pool="first", pooler="relu", bias=True),
    ignored=("*embeddings.position_ids",),
)
