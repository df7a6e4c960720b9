"""Qwen3-MoE (arXiv:2505.09388): the Qwen3 block with many small experts in most layers; some keep an ordinary
feed-forward network."""

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
    "layers.{i}.mlp.router.weight": "layers.{i}.mlp.gate.weight",
    "layers.{i}.mlp.gate_up_proj": StackedExperts(
        ("layers.{i}.mlp.experts.{e}.gate_proj.weight", "layers.{i}.mlp.experts.{e}.up_proj.weight")
    ),
    "layers.{i}.mlp.down_proj": StackedExperts(("layers.{i}.mlp.experts.{e}.down_proj.weight",)),
}


def read(hf: HFConfig) -> ModelConfig:
    """Shape from `config.json`."""
    dim, n_heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    n_layers = hf.integer("num_hidden_layers")
    head_dim = hf.integer("head_dim", None) or dim // n_heads
    context = hf.integer("max_position_embeddings", 32768)
    bias = hf.flag("attention_bias")
    return ModelConfig(
        vocab_size=hf.integer("vocab_size"),
        n_layers=n_layers,
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=hf.integer("num_key_value_heads", 4),
        head_dim=head_dim,
        ffn_dim=hf.integer("intermediate_size", 6144),
        context=context,
        qkv_bias=bias,
        attention_out_bias=bias,
        qk_norm="head",
        window=_window(hf),
        rope=hf.rope(head_dim, context),
        activation=hf.activation("hidden_act", "silu"),
        experts=_experts(hf, n_layers),
        norm_eps=hf.number("rms_norm_eps", 1e-6),
        tie_embeddings=hf.flag("tie_word_embeddings"),
    )


def _window(hf: HFConfig) -> int | None:
    """The window, the same for all layers."""
    used, size = hf.flag("use_sliding_window"), window_size(hf, 4096)
    if not used:
        hf.get("max_window_layers")  # published configs carry it over from Qwen2
        return None
    hf.only("max_window_layers", 0)  # transformers 4 and 5 disagree on whether it counts here
    return size


def _experts(hf: HFConfig, n_layers: int) -> Experts | None:
    """The experts, and the layers without: those that ``mlp_only_layers`` lists, and all but every
    ``decoder_sparse_step``-th."""
    # The second name is the one that transformers 5 writes.
    number = hf.integer(hf.spelling("num_experts", "num_local_experts"), 128, least=0)
    top_k, ffn_dim = hf.integer("num_experts_per_tok", 8), hf.integer("moe_intermediate_size", 768)
    normalize, step = hf.flag("norm_topk_prob"), hf.integer("decoder_sparse_step", 1)
    listed = hf.get("mlp_only_layers", [])
    if not isinstance(listed, list) or any(type(layer) is not int for layer in listed):
        raise hf.error(f"mlp_only_layers is {listed!r}; expected a list of layer numbers")
    if not number:
        return None
    dense = tuple(layer for layer in range(n_layers) if layer in listed or (layer + 1) % step)
    return Experts(number, top_k, ffn_dim, normalize_top_k=normalize, dense_layers=dense)


FAMILY = Family(
    model_type="qwen3_moe",
    architectures={
        "Qwen3MoeForCausalLM": "causal_lm",
        "Qwen3MoeForSequenceClassification": "sequence_classification",
        "Qwen3MoeForTokenClassification": "token_classification",
        "Qwen3MoeModel": "embedding",
    },
    read=read,
    names=NAMES,
    prefix="model.",
    heads=llama.FAMILY.heads,
    ignored=llama.FAMILY.ignored,
)
