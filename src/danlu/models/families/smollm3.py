"""SmolLM3: the Llama block in which every fourth layer has no rotary positions (NoPE, arXiv:2501.18795)."""

from __future__ import annotations

from danlu.models.families import llama
from danlu.models.family import Family
from danlu.models.hf_config import HFConfig
from danlu.models.windows import Windows, layer_windows, window_size
from danlu.nn.config import ModelConfig


def read(hf: HFConfig) -> ModelConfig:
    """Shape from `config.json`."""
    dim, n_heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    n_layers = hf.integer("num_hidden_layers")
    head_dim = hf.integer("head_dim", None) or dim // n_heads
    context = hf.integer("max_position_embeddings", 32768)
    bias = hf.flag("attention_bias")
    nope_layers = _nope_layers(hf, n_layers)
    window, full_layers = _windows(hf, n_layers, nope_layers)
    return ModelConfig(
        vocab_size=hf.integer("vocab_size"),
        n_layers=n_layers,
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=hf.integer("num_key_value_heads", 4),
        head_dim=head_dim,
        ffn_dim=hf.integer("intermediate_size"),
        context=context,
        qkv_bias=bias,
        attention_out_bias=bias,
        ffn_bias=hf.flag("mlp_bias"),
        window=window,
        full_layers=full_layers,
        rope=hf.rope(head_dim, context, default_base=2e6),
        nope_layers=nope_layers,
        activation=hf.activation("hidden_act", "silu"),
        norm_eps=hf.number("rms_norm_eps", 1e-6),
        tie_embeddings=hf.flag("tie_word_embeddings", True),
    )


def _nope_layers(hf: HFConfig, n_layers: int) -> tuple[int, ...]:
    """The layers without positions: zeros in ``no_rope_layers``, whose name says the opposite of its ones; where it is
    missing, every ``no_rope_layer_interval``-th layer."""
    interval = hf.integer("no_rope_layer_interval", 4)
    listed = hf.layers("no_rope_layers", n_layers, {0: True, 1: False})
    return tuple(range(interval - 1, n_layers, interval)) if listed is None else listed


def _windows(hf: HFConfig, n_layers: int, nope_layers: tuple[int, ...]) -> Windows:
    """Where windows are used and ``layer_types`` is missing, the layers without positions have them."""
    used, window = hf.flag("use_sliding_window"), window_size(hf, None)
    if not used or window is None:
        return layer_windows(hf, n_layers, None, tuple(range(n_layers)))
    return layer_windows(hf, n_layers, window, tuple(i for i in range(n_layers) if i not in nope_layers))


FAMILY = Family(
    model_type="smollm3",
    architectures={
        "SmolLM3ForCausalLM": "causal_lm",
        "SmolLM3ForSequenceClassification": "sequence_classification",
        "SmolLM3ForTokenClassification": "token_classification",
        "SmolLM3Model": "embedding",
    },
    read=read,
    names=llama.NAMES,
    prefix="model.",
    heads=llama.FAMILY.heads,
    ignored=llama.FAMILY.ignored,
    harmless=("max_window_layers",),  # the published config carries it over from Qwen2
)
