"""Gemma 2 (arXiv:2408.00118) and the text model of Gemma 3 (arXiv:2503.19786): norms in front of and behind each
branch, stored as their difference from one; scaled embeddings; GeGLU; layers with a sliding window between layers that
see everything. Gemma 2 caps scores and logits; Gemma 3 normalises queries and keys instead, and turns its windowed
layers by frequencies of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from danlu.models.families import llama
from danlu.models.family import Family
from danlu.models.hf_config import HFConfig
from danlu.models.names import Names
from danlu.models.windows import Windows, layer_windows, window_size
from danlu.nn.config import ModelConfig, Rope

NAMES: Names = {
    **llama.NAMES,
    "layers.{i}.post_attention_norm.weight": "layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp_norm.weight": "layers.{i}.pre_feedforward_layernorm.weight",
    "layers.{i}.post_mlp_norm.weight": "layers.{i}.post_feedforward_layernorm.weight",
}


def read_gemma2(hf: HFConfig) -> ModelConfig:
    """Shape from `config.json` of Gemma 2: every other layer sees everything."""
    config = _read(hf, default_context=8192)
    window, full_layers = _windows(hf, config.n_layers, pattern=2)
    hf.only("sliding_window_size", window)  # published beside sliding_window
    return replace(
        config,
        attention_softcap=_softcap(hf, "attn_logit_softcapping", 50.0),
        logit_softcap=_softcap(hf, "final_logit_softcapping", 30.0),
        window=window,
        full_layers=full_layers,
        rope=hf.rope(config.head_dim, config.context),
    )


def read_gemma3(hf: HFConfig) -> ModelConfig:
    """Shape from `config.json` of Gemma 3's text model: every sixth layer sees everything."""
    config = _read(hf, default_context=131072)
    # The second name is what transformers 4.53 and later write beside layer_types.
    pattern = hf.integer("sliding_window_pattern", hf.integer("_sliding_window_pattern", 6))
    window, full_layers = _windows(hf, config.n_layers, pattern)
    hf.only("attn_logit_softcapping")
    return replace(
        config,
        qk_norm="head",
        logit_softcap=_softcap(hf, "final_logit_softcapping", None),
        window=window,
        full_layers=full_layers,
        rope=_rope(hf, config, "full_attention", "rope_theta", 1e6, scaling=hf.get("rope_scaling", {})),
        local_rope=_rope(hf, config, "sliding_attention", "rope_local_base_freq", 1e4, scaling={}),
    )


def _read(hf: HFConfig, default_context: int) -> ModelConfig:
    """What both have in common."""
    dim = hf.integer("hidden_size")
    bias = hf.flag("attention_bias")
    activation = hf.get("hidden_activation", "gelu_pytorch_tanh")
    hf.only("hidden_act", activation)  # published beside hidden_activation, which counts
    hf.only("use_bidirectional_attention", False)
    return ModelConfig(
        vocab_size=hf.integer("vocab_size"),
        n_layers=hf.integer("num_hidden_layers"),
        dim=dim,
        n_heads=hf.integer("num_attention_heads"),
        n_kv_heads=hf.integer("num_key_value_heads", 4),
        head_dim=hf.integer("head_dim", 256),
        ffn_dim=hf.integer("intermediate_size"),
        context=hf.integer("max_position_embeddings", default_context),
        qkv_bias=bias,
        attention_out_bias=bias,
        attention_scale=hf.integer("query_pre_attn_scalar", 256) ** -0.5,
        activation=hf.activation("hidden_activation", "gelu_pytorch_tanh"),
        norm_eps=hf.number("rms_norm_eps", 1e-6),
        norm_offset=True,
        arrangement="sandwich",
        tie_embeddings=hf.flag("tie_word_embeddings", True),
        embed_scale=dim**0.5,
    )


def _windows(hf: HFConfig, n_layers: int, pattern: int) -> Windows:
    """One layer in ``pattern``, the last of each group, sees everything, unless ``layer_types`` says otherwise."""
    full = tuple(range(pattern - 1, n_layers, pattern))
    return layer_windows(hf, n_layers, window_size(hf, 4096), full)


def _softcap(hf: HFConfig, key: str, default: float | None) -> float | None:
    """A cap. Null means none; only where the field is missing does the default hold."""
    cap: float | None = hf.number(key, None if key in hf.content else default)
    if cap is not None and cap <= 0:
        raise hf.error(f"{key} is {cap}; expected a number above 0, or null for no cap")
    return cap


def _rope(
    hf: HFConfig, config: ModelConfig, layers: str, base_key: str, default_base: float, scaling: Mapping[str, Any]
) -> Rope:
    """Rotary positions of one type of layers: from ``rope_parameters``, which holds a set for each type (transformers
    5), or from the fields that stood for them before."""
    parameters = hf.get("rope_parameters", {})
    types = ("full_attention", "sliding_attention")
    if not isinstance(parameters, dict) or not parameters.keys() <= set(types):
        raise hf.error(f"rope_parameters is {parameters!r}; expected an object for each of {', '.join(types)}")
    mine = parameters.get(layers) or {}
    if not isinstance(mine, dict) or not isinstance(scaling, dict):
        raise hf.error(f"the rotary parameters of {layers} are {mine!r} and {scaling!r}; expected objects")
    flat = {"rope_parameters": {**mine, **scaling}, "rope_theta": hf.get(base_key)}
    return HFConfig(flat, hf.where).rope(config.head_dim, config.context, default_base=default_base)


GEMMA2 = Family(
    model_type="gemma2",
    architectures={
        "Gemma2ForCausalLM": "causal_lm",
        "Gemma2ForSequenceClassification": "sequence_classification",
        "Gemma2ForTokenClassification": "token_classification",
        "Gemma2Model": "embedding",
    },
    read=read_gemma2,
    names=NAMES,
    prefix="model.",
    heads=llama.FAMILY.heads,
)
GEMMA3 = Family(
    model_type="gemma3_text",
    architectures={
        "Gemma3ForCausalLM": "causal_lm",
        "Gemma3TextForSequenceClassification": "sequence_classification",
        "Gemma3TextModel": "embedding",
    },
    read=read_gemma3,
    names=NAMES,
    prefix="model.",
    heads={"causal_lm": llama.LM_HEAD, "sequence_classification": llama.SCORE},
)
