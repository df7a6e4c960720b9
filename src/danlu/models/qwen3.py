"""The Qwen3 checkpoint layout: how its config and tensor names map to ours. It opens in transformers, vLLM and
llama.cpp."""

from __future__ import annotations

from typing import Any

from danlu.errors import DanluError
from danlu.models.config import ModelConfig

MODEL_TYPE = "qwen3"
ARCHITECTURE = "Qwen3ForCausalLM"

# ours -> theirs; {i} is the layer
TENSOR_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "layers.{i}.attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "layers.{i}.attention.q_proj.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "layers.{i}.attention.k_proj.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "layers.{i}.attention.v_proj.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "layers.{i}.attention.o_proj.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "layers.{i}.attention.q_norm.weight": "model.layers.{i}.self_attn.q_norm.weight",
    "layers.{i}.attention.k_norm.weight": "model.layers.{i}.self_attn.k_norm.weight",
    "layers.{i}.mlp_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp.gate_proj.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "layers.{i}.mlp.up_proj.weight": "model.layers.{i}.mlp.up_proj.weight",
    "layers.{i}.mlp.down_proj.weight": "model.layers.{i}.mlp.down_proj.weight",
}


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """Our tensor name -> checkpoint name for every tensor that is stored; a tied head is stored once, as the
    embedding."""
    names = {}
    for ours, theirs in TENSOR_NAMES.items():
        if ours == "head.weight" and config.tie_embeddings:
            continue
        for i in range(config.n_layers) if "{i}" in ours else (0,):
            names[ours.format(i=i)] = theirs.format(i=i)
    return names


def config_to_hf(config: ModelConfig, *, bos_id: int | None, eos_id: int | None, pad_id: int | None) -> dict[str, Any]:
    """`config.json` of a model folder."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "dtype": "float32",
        "torch_dtype": "float32",  # the name before transformers 5; older tools read it
    }


def config_from_hf(content: dict[str, Any], where: str) -> ModelConfig:
    """Read `config.json`; what this model cannot honour is refused by name.

    Raises:
        DanluError: another family, a missing or impossible field, or a feature that is not supported.
    """
    model_type = content.get("model_type")
    if model_type != MODEL_TYPE:
        raise DanluError(f"{where}: models of type {model_type!r} cannot be opened yet; known: {MODEL_TYPE}")
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    unsupported = {
        "attention_bias": bool(content.get("attention_bias")),
        "use_sliding_window": bool(content.get("use_sliding_window")),
        "rope scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
        "hidden_act": content.get("hidden_act", "silu") != "silu",
        "quantization_config": content.get("quantization_config") is not None,
    }
    if refused := [name for name, present in unsupported.items() if present]:
        raise DanluError(f"{where}: asks for {', '.join(refused)}, which is not supported yet")

    def integer(key: str, default: int | None = None) -> int:
        value = content.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise DanluError(f"{where}: {key} is {value!r}; expected a positive whole number")
        return value

    n_heads = integer("num_attention_heads")
    config = ModelConfig(
        vocab_size=integer("vocab_size"),
        n_layers=integer("num_hidden_layers"),
        dim=integer("hidden_size"),
        n_heads=n_heads,
        n_kv_heads=integer("num_key_value_heads", n_heads),
        head_dim=integer("head_dim", 128),
        ffn_dim=integer("intermediate_size"),
        context=integer("max_position_embeddings", 32768),
        rope_base=float(content.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
        norm_eps=float(content.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(content.get("tie_word_embeddings", False)),
    )
    if problems := config.problems():
        raise DanluError(f"{where}: {'; '.join(problems)}")
    return config
