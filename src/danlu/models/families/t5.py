"""T5 (arXiv:1910.10683), T5 v1.1 and Flan-T5 (arXiv:2210.11416): encoder and decoder of pre-norm blocks with RMSNorm
and no biases. Positions are a learned bias on the scores, one table for all layers of a stack; the scores are not
scaled. The first T5 has a ReLU network and its embedding as head; v1.1 a gated GELU and a head of its own."""

from __future__ import annotations

from danlu.models.family import Family
from danlu.models.hf_config import HFConfig
from danlu.models.names import ByGating, Names, Source
from danlu.nn.config import EncoderDecoderConfig, ModelConfig


def _stack(stack: str, feed_forward: int) -> dict[str | tuple[str, ...], Source]:
    """Names of one stack, whose blocks hold the feed-forward network as the layer of this number."""
    ours, theirs = f"{stack}.layers.{{i}}", f"{stack}.block.{{i}}.layer"
    mlp = f"{theirs}.{feed_forward}"
    return {
        f"{stack}.embed.weight": f"{stack}.embed_tokens.weight",
        f"{stack}.norm.weight": f"{stack}.final_layer_norm.weight",
        f"{stack}.relative_bias.table.weight": (
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ),
        f"{ours}.attention_norm.weight": f"{theirs}.0.layer_norm.weight",
        **{f"{ours}.attention.{p}_proj.weight": f"{theirs}.0.SelfAttention.{p}.weight" for p in "qkvo"},
        f"{ours}.cross_norm.weight": f"{theirs}.1.layer_norm.weight",
        **{f"{ours}.cross_attention.{p}_proj.weight": f"{theirs}.1.EncDecAttention.{p}.weight" for p in "qkvo"},
        f"{ours}.mlp_norm.weight": f"{mlp}.layer_norm.weight",
        f"{ours}.mlp.gate_proj.weight": f"{mlp}.DenseReluDense.wi_0.weight",
        f"{ours}.mlp.up_proj.weight": ByGating(f"{mlp}.DenseReluDense.wi_1.weight", f"{mlp}.DenseReluDense.wi.weight"),
        f"{ours}.mlp.down_proj.weight": f"{mlp}.DenseReluDense.wo.weight",
    }


NAMES: Names = {"shared.weight": "shared.weight", **_stack("encoder", 1), **_stack("decoder", 2)}


def read(hf: HFConfig) -> EncoderDecoderConfig:
    """Shape from `config.json`."""
    hf.only("is_encoder_decoder", True)
    hf.only("is_decoder", False)
    dim, n_heads, head_dim = hf.integer("d_model"), hf.integer("num_heads"), hf.integer("d_kv")
    n_layers = hf.integer("num_layers")
    for alias, value in {
        "hidden_size": dim, "num_attention_heads": n_heads, "head_dim": head_dim, "num_hidden_layers": n_layers,
    }.items():  # fmt: skip
        hf.only(alias, value)
    gating, _, name = str(hf.get("feed_forward_proj", "relu")).rpartition("-")
    if gating not in ("", "gated"):
        hf.only("feed_forward_proj", "relu", "gated-gelu")
    # "gated-gelu" was published before its tanh approximation had a name; where dense_act_fn is given, it decides.
    activation = hf.activation("dense_act_fn", "gelu_new" if gating and name == "gelu" else name)

    # The first T5 ties its head and scales what goes into it. v1.1 is written with tie_word_embeddings false by
    # transformers 4, with scale_decoder_outputs false by 5, and then only the file tells whether the head is tied.
    scaled = hf.flag("scale_decoder_outputs", hf.flag("tie_word_embeddings", True))
    tied = scaled or "lm_head.weight" not in hf.stored

    def stack(n_layers: int, is_decoder: bool) -> ModelConfig:
        return ModelConfig(
            vocab_size=hf.integer("vocab_size"),
            n_layers=n_layers,
            dim=dim,
            n_heads=n_heads,
            n_kv_heads=n_heads,
            head_dim=head_dim,
            ffn_dim=hf.integer("d_ff"),
            context=hf.integer("n_positions", 512),  # as trained; the buckets go further
            causal=is_decoder,
            attention_scale=1.0,
            relative_buckets=hf.integer("relative_attention_num_buckets", 32),
            relative_max_distance=hf.integer("relative_attention_max_distance", 128),
            activation=activation,
            gated=hf.flag("is_gated_act", gating == "gated"),
            norm_eps=hf.number("layer_norm_epsilon", 1e-6),
            tie_embeddings=is_decoder and tied,
            head_scale=dim**-0.5 if is_decoder and scaled else None,
            cross_attention=is_decoder,
        )

    pad = hf.integer("pad_token_id", 0, least=0)  # T5 starts with padding
    return EncoderDecoderConfig(
        encoder=stack(n_layers, is_decoder=False),
        decoder=stack(hf.integer("num_decoder_layers", n_layers), is_decoder=True),
        decoder_start_id=hf.integer("decoder_start_token_id", pad, least=0),
    )


FAMILY = Family(
    model_type="t5",
    architectures={"T5ForConditionalGeneration": "seq2seq"},
    read=read,
    names=NAMES,
    heads={"seq2seq": {"head.weight": "lm_head.weight"}},
    ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),  # of no effect, in old files
    harmless=("output_past",),
)
