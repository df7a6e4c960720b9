"""How GGUF names what Hugging Face's checkpoints name otherwise, as data: one :class:`Architecture` for each of
llama.cpp's, read in both directions.

Where llama.cpp's graph fixes something that a `config.json` tells (the activation, which layers slide), the table says
it in ``fixed``. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Turned:
    """Rows of the query or key projection, reordered within each head: llama.cpp's older architectures turn neighbours
    (x[2i], x[2i+1]) where Hugging Face turns halves (x[i], x[i + n/2])."""

    theirs: str
    heads: Literal["num_attention_heads", "num_key_value_heads"]


@dataclass(frozen=True)
class Shifted:
    """A norm's weight, to which llama.cpp's files have added the one that Gemma adds while computing."""

    theirs: str


@dataclass(frozen=True)
class Stacked:
    """The experts' matrices in one tensor of three dimensions; ``{e}`` is the expert."""

    theirs: str


Source = str | Turned | Shifted | Stacked


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures.

    Attributes:
        model_type: of `config.json`; ``hf_class`` is the class of its language model.
        tensors: name in the file -> name in a Hugging Face checkpoint; ``{i}`` is the layer.
        keys: metadata key without the architecture in front -> field of `config.json`, beyond :data:`KEYS`.
        fixed: fields of `config.json` that this architecture always has.
        head_dim: whether `config.json` gives it; "odd": where it is not hidden size / heads.
        window_period: every n-th layer sees everything where there is a window; 0 for architectures without windows.
        tied: whether the output matrix is the embedding; None: either.
    """

    model_type: str
    hf_class: str
    tensors: Mapping[str, Source]
    keys: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    head_dim: Literal["always", "odd", "never"] = "odd"
    window_period: int = 0
    tied: bool | None = None


KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""Metadata key without the architecture in front -> field of `config.json`."""

EXPERT_KEYS = {"expert_used_count": "num_experts_per_tok"}

OPTIONAL_KEYS = {"attention.head_count_kv"}
"""Keys that a file may lack: as many key heads as query heads."""

_LAYER = "model.layers.{i}."
_PARTS = ("weight", "bias")
_OUTER: dict[str, Source] = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ATTENTION: dict[str, Source] = {
    f"blk.{{i}}.{name}.weight": f"{_LAYER}self_attn.{theirs}.weight"
    for name, theirs in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj"), ("attn_output", "o_proj"))
}
_QKV_BIAS: dict[str, Source] = {f"blk.{{i}}.attn_{x}.bias": f"{_LAYER}self_attn.{x}_proj.bias" for x in "qkv"}
_QK_NORM: dict[str, Source] = {f"blk.{{i}}.attn_{x}_norm.weight": f"{_LAYER}self_attn.{x}_norm.weight" for x in "qk"}
_PRE_NORMS: dict[str, Source] = {
    "blk.{i}.attn_norm.weight": _LAYER + "input_layernorm.weight",
    "blk.{i}.ffn_norm.weight": _LAYER + "post_attention_layernorm.weight",
}
_MLP: dict[str, Source] = {f"blk.{{i}}.ffn_{x}.weight": f"{_LAYER}mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
_FUSED_MLP: dict[str, Source] = {
    "blk.{i}.ffn_up.weight": _LAYER + "mlp.gate_up_proj.weight",
    "blk.{i}.ffn_down.weight": _LAYER + "mlp.down_proj.weight",
}
_BLOCK = {**_OUTER, **_PRE_NORMS, **_ATTENTION, **_MLP}

_TURNED: dict[str, Source] = {
    **{f"blk.{{i}}.attn_q.{x}": Turned(f"{_LAYER}self_attn.q_proj.{x}", "num_attention_heads") for x in _PARTS},
    **{f"blk.{{i}}.attn_k.{x}": Turned(f"{_LAYER}self_attn.k_proj.{x}", "num_key_value_heads") for x in _PARTS},
}
_LLAMA: dict[str, Source] = {
    **_BLOCK,
    **_QKV_BIAS,
    **_TURNED,
    "blk.{i}.attn_output.bias": _LAYER + "self_attn.o_proj.bias",
    **{f"blk.{{i}}.ffn_{x}.bias": f"{_LAYER}mlp.{x}_proj.bias" for x in ("gate", "up", "down")},
}
_GEMMA: dict[str, Source] = {
    **_OUTER,
    **_ATTENTION,
    **_MLP,
    "output_norm.weight": Shifted("model.norm.weight"),
    "blk.{i}.attn_norm.weight": Shifted(_LAYER + "input_layernorm.weight"),
    "blk.{i}.post_attention_norm.weight": Shifted(_LAYER + "post_attention_layernorm.weight"),
    "blk.{i}.ffn_norm.weight": Shifted(_LAYER + "pre_feedforward_layernorm.weight"),
    "blk.{i}.post_ffw_norm.weight": Shifted(_LAYER + "post_feedforward_layernorm.weight"),
}
_GEMMA_FIXED = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}

_MIXTRAL = Architecture(
    model_type="mixtral",
    hf_class="MixtralForCausalLM",
    tensors={
        **{name: source for name, source in _LLAMA.items() if ".ffn_" not in name and not name.endswith(".bias")},
        "blk.{i}.ffn_norm.weight": _LAYER + "post_attention_layernorm.weight",
        "blk.{i}.ffn_gate_inp.weight": _LAYER + "block_sparse_moe.gate.weight",
        "blk.{i}.ffn_gate_exps.weight": Stacked(_LAYER + "block_sparse_moe.experts.{e}.w1.weight"),
        "blk.{i}.ffn_down_exps.weight": Stacked(_LAYER + "block_sparse_moe.experts.{e}.w2.weight"),
        "blk.{i}.ffn_up_exps.weight": Stacked(_LAYER + "block_sparse_moe.experts.{e}.w3.weight"),
    },
    keys={"expert_count": "num_local_experts", **EXPERT_KEYS},
    fixed={"hidden_act": "silu", "sliding_window": None},
)

ARCHITECTURES = {
    "llama": Architecture(
        model_type="llama", hf_class="LlamaForCausalLM", tensors=_LLAMA, fixed={"hidden_act": "silu"}
    ),
    "qwen2": Architecture(
        model_type="qwen2",
        hf_class="Qwen2ForCausalLM",
        tensors={**_BLOCK, **_QKV_BIAS},
        fixed={"hidden_act": "silu", "use_sliding_window": False},
    ),
    "qwen3": Architecture(
        model_type="qwen3",
        hf_class="Qwen3ForCausalLM",
        tensors={**_BLOCK, **_QK_NORM},
        fixed={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
        head_dim="always",
    ),
    "qwen3moe": Architecture(
        model_type="qwen3_moe",
        hf_class="Qwen3MoeForCausalLM",
        tensors={
            **_OUTER,
            **_PRE_NORMS,
            **_ATTENTION,
            **_QK_NORM,
            "blk.{i}.ffn_gate_inp.weight": _LAYER + "mlp.gate.weight",
            **{
                f"blk.{{i}}.ffn_{x}_exps.weight": Stacked(f"{_LAYER}mlp.experts.{{e}}.{x}_proj.weight")
                for x in ("gate", "up", "down")
            },
        },
        keys={
            "expert_count": "num_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
            **EXPERT_KEYS,
        },
        fixed={
            "hidden_act": "silu",
            "attention_bias": False,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": False,
        },
        head_dim="always",
    ),
    "gemma2": Architecture(
        model_type="gemma2",
        hf_class="Gemma2ForCausalLM",
        tensors={name: source for name, source in _GEMMA.items() if name != "output.weight"},
        fixed=_GEMMA_FIXED,
        head_dim="always",
        window_period=2,
        tied=True,
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        hf_class="Gemma3ForCausalLM",
        tensors={
            **_GEMMA,
            **{f"blk.{{i}}.attn_{x}_norm.weight": Shifted(f"{_LAYER}self_attn.{x}_norm.weight") for x in "qk"},
        },
        fixed=_GEMMA_FIXED,
        head_dim="always",
        window_period=6,
    ),
    "phi3": Architecture(
        model_type="phi3",
        hf_class="Phi3ForCausalLM",
        tensors={
            **_OUTER,
            **_PRE_NORMS,
            "blk.{i}.attn_qkv.weight": _LAYER + "self_attn.qkv_proj.weight",
            "blk.{i}.attn_output.weight": _LAYER + "self_attn.o_proj.weight",
            **_FUSED_MLP,
        },
        fixed={"hidden_act": "silu"},
        head_dim="never",
        window_period=1,
    ),
    "olmo2": Architecture(
        model_type="olmo2",
        hf_class="Olmo2ForCausalLM",
        tensors={
            **_OUTER,
            **_ATTENTION,
            **_QK_NORM,
            **_MLP,
            "blk.{i}.post_attention_norm.weight": _LAYER + "post_attention_layernorm.weight",
            "blk.{i}.post_ffw_norm.weight": _LAYER + "post_feedforward_layernorm.weight",
        },
        fixed={"hidden_act": "silu", "attention_bias": False},
        head_dim="never",
        tied=False,
    ),
    "smollm3": Architecture(
        model_type="smollm3",
        hf_class="SmolLM3ForCausalLM",
        tensors={**_BLOCK, **{name: source for name, source in _TURNED.items() if name.endswith(".weight")}},
        fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "no_rope_layer_interval": 4,
               "use_sliding_window": False},
        head_dim="never",
    ),
    "glm4": Architecture(
        model_type="glm4",
        hf_class="Glm4ForCausalLM",
        tensors={
            **_OUTER,
            **_PRE_NORMS,
            **_ATTENTION,
            **_QKV_BIAS,
            **_FUSED_MLP,
            "blk.{i}.post_attention_norm.weight": _LAYER + "post_self_attn_layernorm.weight",
            "blk.{i}.post_ffw_norm.weight": _LAYER + "post_mlp_layernorm.weight",
        },
        fixed={"hidden_act": "silu"},
        head_dim="always",
    ),
}  # fmt: skip
"""llama.cpp's name -> what it is."""


def architecture_of(name: str, n_experts: int) -> Architecture | None:
    """The architecture of a file; files of ``llama`` with experts are Mixtral's."""
    return _MIXTRAL if name == "llama" and n_experts else ARCHITECTURES.get(name)


def architecture_for(model_type: str) -> tuple[str, Architecture] | None:
    """llama.cpp's name and the architecture for a `model_type`; Mistral's block is Llama's."""
    if model_type == "mistral":
        return "llama", ARCHITECTURES["llama"]
    if model_type == "mixtral":
        return "llama", _MIXTRAL
    return next(((name, a) for name, a in ARCHITECTURES.items() if a.model_type == model_type), None)


MODEL_TYPES = (*dict.fromkeys(a.model_type for a in ARCHITECTURES.values()), "mistral", "mixtral")
"""What can be written as GGUF."""
