"""BERT (Devlin et al. 2018, arXiv:1810.04805): the encoder of the original Transformer, whose norms stand behind each
branch, with learned positions and an embedding that tells the two texts of a pair apart. Padding on the left moves
positions, as in transformers: pad on the right.

A whole sequence is classified by its first token, [CLS], through a pooler that is trained along with the stack and
stored as a part of it."""

from __future__ import annotations

from danlu.models.family import ClassifierShape, Family
from danlu.models.hf_config import HFConfig
from danlu.models.names import ByTying, Names
from danlu.nn.config import ModelConfig

NAMES: Names = {
    "embed.weight": "embeddings.word_embeddings.weight",
    "embed_positions.weight": "embeddings.position_embeddings.weight",
    "embed_types.weight": "embeddings.token_type_embeddings.weight",
    "embed_norm.weight": "embeddings.LayerNorm.weight",
    "embed_norm.bias": "embeddings.LayerNorm.bias",
    "layers.{i}.attention.q_proj.weight": "encoder.layer.{i}.attention.self.query.weight",
    "layers.{i}.attention.q_proj.bias": "encoder.layer.{i}.attention.self.query.bias",
    "layers.{i}.attention.k_proj.weight": "encoder.layer.{i}.attention.self.key.weight",
    "layers.{i}.attention.k_proj.bias": "encoder.layer.{i}.attention.self.key.bias",
    "layers.{i}.attention.v_proj.weight": "encoder.layer.{i}.attention.self.value.weight",
    "layers.{i}.attention.v_proj.bias": "encoder.layer.{i}.attention.self.value.bias",
    "layers.{i}.attention.o_proj.weight": "encoder.layer.{i}.attention.output.dense.weight",
    "layers.{i}.attention.o_proj.bias": "encoder.layer.{i}.attention.output.dense.bias",
    "layers.{i}.post_attention_norm.weight": "encoder.layer.{i}.attention.output.LayerNorm.weight",
    "layers.{i}.post_attention_norm.bias": "encoder.layer.{i}.attention.output.LayerNorm.bias",
    "layers.{i}.mlp.up_proj.weight": "encoder.layer.{i}.intermediate.dense.weight",
    "layers.{i}.mlp.up_proj.bias": "encoder.layer.{i}.intermediate.dense.bias",
    "layers.{i}.mlp.down_proj.weight": "encoder.layer.{i}.output.dense.weight",
    "layers.{i}.mlp.down_proj.bias": "encoder.layer.{i}.output.dense.bias",
    "layers.{i}.post_mlp_norm.weight": "encoder.layer.{i}.output.LayerNorm.weight",
    "layers.{i}.post_mlp_norm.bias": "encoder.layer.{i}.output.LayerNorm.bias",
}
POOLER: Names = {"pooler.weight": "pooler.dense.weight", "pooler.bias": "pooler.dense.bias"}
CLASSIFIER: Names = {"head.weight": "classifier.weight", "head.bias": "classifier.bias"}
SPANS: Names = {"head.weight": "qa_outputs.weight", "head.bias": "qa_outputs.bias"}
MASKED_LM: Names = {
    "transform.weight": "cls.predictions.transform.dense.weight",
    "transform.bias": "cls.predictions.transform.dense.bias",
    "transform_norm.weight": "cls.predictions.transform.LayerNorm.weight",
    "transform_norm.bias": "cls.predictions.transform.LayerNorm.bias",
    "head.weight": "cls.predictions.decoder.weight",
    "head.bias": ByTying("cls.predictions.bias", "cls.predictions.decoder.bias"),
}


def read(hf: HFConfig) -> ModelConfig:
    """Shape from `config.json`."""
    hf.only("is_decoder", False)
    hf.only("add_cross_attention", False)
    hf.only("position_embedding_type", "absolute")
    hf.only("pruned_heads", {})
    hf.only("pooler_type", "first_token_transform")  # of the first Chinese and multilingual models, as the next
    hf.only("directionality", "bidi")
    dim, n_heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    return ModelConfig(
        vocab_size=hf.integer("vocab_size"),
        n_layers=hf.integer("num_hidden_layers"),
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=dim // n_heads,
        ffn_dim=hf.integer("intermediate_size"),
        context=hf.integer("max_position_embeddings", 512),
        causal=False,
        qkv_bias=True,
        attention_out_bias=True,
        ffn_bias=True,
        learned_positions=True,
        count_padding=True,
        token_types=hf.integer("type_vocab_size", 2),
        activation=hf.activation("hidden_act", "gelu"),
        gated=False,
        norm="layer",
        norm_eps=hf.number("layer_norm_eps", 1e-12),
        arrangement="post",
        embed_norm=True,
        final_norm=False,
        tie_embeddings=hf.flag("tie_word_embeddings", True),
    )


FAMILY = Family(
    model_type="bert",
    architectures={
        "BertForMaskedLM": "masked_lm",
        "BertForPreTraining": "masked_lm",
        "BertForSequenceClassification": "sequence_classification",
        "BertForTokenClassification": "token_classification",
        "BertForQuestionAnswering": "question_answering",
        "BertModel": "embedding",
    },
    read=read,
    names={**NAMES, **POOLER},
    prefix="bert.",
    heads={
        "masked_lm": MASKED_LM,
        "sequence_classification": CLASSIFIER,
        "token_classification": CLASSIFIER,
        "question_answering": SPANS,
    },
    classifier=ClassifierShape(pool="first", pooler="tanh", bias=True),
    ignored=(
        "*embeddings.position_ids",
        "*pooler.dense.*",  # classifiers alone have it
        "cls.seq_relationship.*",  # the other head of pre-training: is the second text the one that came next?
        "cls.predictions.bias",
        "cls.predictions.decoder.bias",
    ),
    harmless=("pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head"),
)
