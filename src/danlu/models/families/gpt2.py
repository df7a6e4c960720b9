"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners") and what has its shape, such as
Cerebras-GPT (arXiv:2304.03208): learned positions, LayerNorm with biases, a plain feed-forward network. Matrices are
stored as (in, out), queries, keys and values in one. The first checkpoints have no ``transformer.`` in their names and
hold causal masks among their tensors."""

from __future__ import annotations

from collections.abc import Mapping

from danlu.models.family import Family, Task
from danlu.models.hf_config import HFConfig
from danlu.models.names import QKV_BIAS, QKV_WEIGHT, Fused, Names, Transposed
from danlu.nn.config import ModelConfig

NAMES: Names = {
    "embed.weight": "wte.weight",
    "embed_positions.weight": "wpe.weight",
    "norm.weight": "ln_f.weight",
    "norm.bias": "ln_f.bias",
    "layers.{i}.attention_norm.weight": "h.{i}.ln_1.weight",
    "layers.{i}.attention_norm.bias": "h.{i}.ln_1.bias",
    QKV_WEIGHT: Fused("h.{i}.attn.c_attn.weight", transposed=True),
    QKV_BIAS: Fused("h.{i}.attn.c_attn.bias"),
    "layers.{i}.attention.o_proj.weight": Transposed("h.{i}.attn.c_proj.weight"),
    "layers.{i}.attention.o_proj.bias": "h.{i}.attn.c_proj.bias",
    "layers.{i}.mlp_norm.weight": "h.{i}.ln_2.weight",
    "layers.{i}.mlp_norm.bias": "h.{i}.ln_2.bias",
    "layers.{i}.mlp.up_proj.weight": Transposed("h.{i}.mlp.c_fc.weight"),
    "layers.{i}.mlp.up_proj.bias": "h.{i}.mlp.c_fc.bias",
    "layers.{i}.mlp.down_proj.weight": Transposed("h.{i}.mlp.c_proj.weight"),
    "layers.{i}.mlp.down_proj.bias": "h.{i}.mlp.c_proj.bias",
}
HEADS: Mapping[Task, Names] = {
    "causal_lm": {"head.weight": "lm_head.weight"},
    "sequence_classification": {"head.weight": "score.weight"},
    "token_classification": {"head.weight": "classifier.weight", "head.bias": "classifier.bias"},
    "question_answering": {"head.weight": "qa_outputs.weight", "head.bias": "qa_outputs.bias"},
}
"""The heads of the families that call their stack ``transformer``."""


def read(hf: HFConfig) -> ModelConfig:
    """Shape from `config.json`."""
    dim = hf.integer(hf.spelling("n_embd", "hidden_size"))
    n_heads = hf.integer(hf.spelling("n_head", "num_attention_heads"))
    hf.only("add_cross_attention", False)
    return ModelConfig(
        vocab_size=hf.integer("vocab_size"),
        n_layers=hf.integer(hf.spelling("n_layer", "num_hidden_layers")),
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=dim // n_heads,
        ffn_dim=hf.integer("n_inner", 4 * dim),
        context=hf.integer(hf.spelling("n_positions", "max_position_embeddings"), 1024),
        qkv_bias=True,
        attention_out_bias=True,
        ffn_bias=True,
        attention_scale=None if hf.flag("scale_attn_weights", True) else 1.0,
        attention_scale_by_layer=hf.flag("scale_attn_by_inverse_layer_idx"),
        learned_positions=True,
        activation=hf.activation("activation_function", "gelu_new"),
        gated=False,
        norm="layer",
        norm_eps=hf.number("layer_norm_epsilon", 1e-5),
        tie_embeddings=hf.flag("tie_word_embeddings", True),
    )


FAMILY = Family(
    model_type="gpt2",
    architectures={
        "GPT2LMHeadModel": "causal_lm",
        "GPT2ForSequenceClassification": "sequence_classification",
        "GPT2ForTokenClassification": "token_classification",
        "GPT2ForQuestionAnswering": "question_answering",
        "GPT2Model": "embedding",
    },
    read=read,
    names=NAMES,
    prefix="transformer.",
    heads=HEADS,
    ignored=("*.attn.bias", "*.attn.masked_bias"),
    # The summary belongs to GPT2DoubleHeadsModel, whose tensors are refused. Attention is computed in at least the
    # precision that reorder_and_upcast_attn asks for. n_ctx is n_positions once more.
    harmless=(
        "n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
        "reorder_and_upcast_attn", "predict_special_tokens", "_num_labels", "output_past",
    ),
)  # fmt: skip
