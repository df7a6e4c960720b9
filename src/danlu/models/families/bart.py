"""BART (arXiv:1910.13461): encoder and decoder of post-norm blocks with LayerNorm and biases throughout, learned
positions and a norm on the embeddings. Positions start at row 2 of their table and count padding."""

from __future__ import annotations

from danlu.models.family import Family
from danlu.models.hf_config import HFConfig
from danlu.models.names import Names, Row, Source
from danlu.nn.config import EncoderDecoderConfig, ModelConfig

MODULES = {
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.out_proj",
    "post_attention_norm": "self_attn_layer_norm",
    "cross_attention.q_proj": "encoder_attn.q_proj",
    "cross_attention.k_proj": "encoder_attn.k_proj",
    "cross_attention.v_proj": "encoder_attn.v_proj",
    "cross_attention.o_proj": "encoder_attn.out_proj",
    "post_cross_norm": "encoder_attn_layer_norm",
    "mlp.up_proj": "fc1",
    "mlp.down_proj": "fc2",
    "post_mlp_norm": "final_layer_norm",
}
"""Modules of a block, each with a weight and a bias."""


def _stack(stack: str) -> dict[str | tuple[str, ...], Source]:
    names: dict[str | tuple[str, ...], Source] = {
        f"{stack}.embed.weight": f"{stack}.embed_tokens.weight",
        f"{stack}.embed_positions.weight": f"{stack}.embed_positions.weight",
    }
    for kind in ("weight", "bias"):
        names[f"{stack}.embed_norm.{kind}"] = f"{stack}.layernorm_embedding.{kind}"
        for ours, theirs in MODULES.items():
            names[f"{stack}.layers.{{i}}.{ours}.{kind}"] = f"{stack}.layers.{{i}}.{theirs}.{kind}"
    return names


NAMES: Names = {"shared.weight": "shared.weight", **_stack("encoder"), **_stack("decoder")}


def read(hf: HFConfig) -> EncoderDecoderConfig:
    """Shape from `config.json`."""
    hf.only("is_encoder_decoder", True)
    hf.only("is_decoder", False)
    # Variants that share BART's code but are other models: mBART, and what BART was before it had its name.
    hf.only("normalize_before", False)
    hf.only("add_final_layer_norm", False)
    hf.only("normalize_embedding", True)
    hf.only("add_bias_logits", False)
    hf.only("static_position_embeddings", False)
    hf.only("extra_pos_embeddings", 2)
    dim = hf.integer("d_model")
    hf.only("hidden_size", dim)
    hf.only("num_attention_heads", hf.integer("encoder_attention_heads"))
    hf.only("num_hidden_layers", hf.integer("encoder_layers"))
    tied = hf.flag("tie_word_embeddings", True)
    # Where nothing is tied, transformers 5 gives each stack an embedding of its own; transformers 4 shared it always.
    separate = not tied and any(name.endswith("encoder.embed_tokens.weight") for name in hf.stored)
    embed_scale = dim**0.5 if hf.flag("scale_embedding") else None

    def stack(which: str) -> ModelConfig:
        is_decoder = which == "decoder"
        n_heads = hf.integer(f"{which}_attention_heads")
        return ModelConfig(
            vocab_size=hf.integer("vocab_size"),
            n_layers=hf.integer(f"{which}_layers"),
            dim=dim,
            n_heads=n_heads,
            n_kv_heads=n_heads,
            head_dim=dim // n_heads,
            ffn_dim=hf.integer(f"{which}_ffn_dim"),
            context=hf.integer("max_position_embeddings"),
            causal=is_decoder,
            qkv_bias=True,
            attention_out_bias=True,
            learned_positions=True,
            position_offset=2,
            count_padding=True,
            activation=hf.activation("activation_function", "gelu"),
            gated=False,
            ffn_bias=True,
            norm="layer",
            norm_eps=1e-5,
            arrangement="post",
            final_norm=False,
            tie_embeddings=is_decoder and tied,
            embed_norm=True,
            embed_scale=embed_scale,
            head_bias=is_decoder and "final_logits_bias" in hf.stored,
            cross_attention=is_decoder,
        )

    return EncoderDecoderConfig(
        encoder=stack("encoder"),
        decoder=stack("decoder"),
        decoder_start_id=hf.integer("decoder_start_token_id", 2, least=0),
        shared_embeddings=not separate,
    )


FAMILY = Family(
    model_type="bart",
    architectures={"BartForConditionalGeneration": "seq2seq"},
    read=read,
    names=NAMES,
    prefix="model.",
    heads={"seq2seq": {"head.weight": "lm_head.weight", "head.bias": Row("final_logits_bias")}},
    ignored=("*shared.weight", "*coder.version"),
    harmless=("_num_labels", "classif_dropout", "force_bos_token_to_be_generated", "output_past", "save_step"),
)
