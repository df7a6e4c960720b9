"""Mixtral (arXiv:2401.04088): the Mistral block with a mixture of experts in place of every feed-forward network. The
weights of a token's experts sum to one."""

from __future__ import annotations

from danlu.models.families import llama
from danlu.models.family import Family
from danlu.models.hf_config import HFConfig
from danlu.models.names import Experts as StackedExperts
from danlu.models.names import Names
from danlu.models.windows import window_size
from danlu.nn.config import Experts, ModelConfig

NAMES: Names = {
    **llama.NAMES,
    "layers.{i}.mlp.router.weight": "layers.{i}.block_sparse_moe.gate.weight",
    "layers.{i}.mlp.gate_up_proj": StackedExperts(
        (
            "layers.{i}.block_sparse_moe.experts.{e}.w1.weight",
            "layers.{i}.block_sparse_moe.experts.{e}.w3.weight",
        )
    ),
    "layers.{i}.mlp.down_proj": StackedExperts(("layers.{i}.block_sparse_moe.experts.{e}.w2.weight",)),
}


def read(hf: HFConfig) -> ModelConfig:
    """Shape from `config.json`."""
    dim, n_heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    head_dim = hf.integer("head_dim", None) or dim // n_heads
    context = hf.integer("max_position_embeddings", 131072)
    ffn_dim = hf.integer("intermediate_size")
    return ModelConfig(
        vocab_size=hf.integer("vocab_size"),
        n_layers=hf.integer("num_hidden_layers"),
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=hf.integer("num_key_value_heads", n_heads),
        head_dim=head_dim,
        ffn_dim=ffn_dim,
        context=context,
        window=window_size(hf, None),
        rope=hf.rope(head_dim, context, default_base=1e6),
        activation=hf.activation("hidden_act", "silu"),
        experts=Experts(
            number=hf.integer("num_local_experts", 8), top_k=hf.integer("num_experts_per_tok", 2), ffn_dim=ffn_dim
        ),
        norm_eps=hf.number("rms_norm_eps", 1e-5),
        tie_embeddings=hf.flag("tie_word_embeddings"),
    )


FAMILY = Family(
    model_type="mixtral",
    architectures={
        "MixtralForCausalLM": "causal_lm",
        "MixtralForSequenceClassification": "sequence_classification",
        "MixtralForTokenClassification": "token_classification",
        "MixtralModel": "embedding",
    },
    read=read,
    names=NAMES,
    prefix="model.",
    heads=llama.FAMILY.heads,
    ignored=llama.FAMILY.ignored,
)
