"""The shape of a transformer, as data: every family is a set of these choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

Arrangement = Literal["pre", "post", "sandwich", "branch", "parallel", "parallel_two_norms"]
"""Where the norms of a block stand, and whether attention and feed-forward see the same input (`nn/block.py`)."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was trained at (`nn/rope.py`).

    ``short_factors`` and ``long_factors`` are LongRoPE's, one for each pair of dimensions.
    """

    kind: Literal["linear", "dynamic", "yarn", "llama3", "longrope"]
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Rope:
    """Rotary positions: the first ``dim`` dimensions of each head are turned (None: all)."""

    base: float = 10_000.0
    dim: int | None = None
    interleaved: bool = False
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the feed-forward network."""

    number: int
    top_k: int
    ffn_dim: int
    normalize_top_k: bool = True
    dense_layers: tuple[int, ...] = ()
    """Layers that keep an ordinary feed-forward network."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of one stack of transformer blocks with its embedding and, for language models, its head.

    The defaults are the Llama block without positions. ``context`` is the longest sequence it is made for, in tokens.
    """

    vocab_size: int
    n_layers: int
    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    context: int = 1024

    # attention
    causal: bool = True
    qkv_bias: bool = False
    attention_out_bias: bool = False
    qk_norm: Literal["head", "full"] | None = None
    attention_scale: float | None = None  # None: 1 / sqrt(head_dim)
    attention_scale_by_layer: bool = False  # scores are also divided by the number of the layer, from 1
    attention_softcap: float | None = None
    window: int | None = None  # tokens a position sees, itself included
    full_layers: tuple[int, ...] = ()  # layers that see everything although there is a window

    # positions
    rope: Rope | None = None
    local_rope: Rope | None = None  # of the windowed layers, where it differs
    nope_layers: tuple[int, ...] = ()  # layers without any position
    alibi: Literal["bloom", "falcon"] | None = None
    learned_positions: bool = False
    position_offset: int = 0  # rows of the position table before the one of position 0
    count_padding: bool = False  # whether learned positions count the padding on the left
    relative_buckets: int = 0  # T5: learned bias for each bucket of distances
    relative_max_distance: int = 128

    # feed-forward
    activation: Activation = "silu"
    gated: bool = True
    ffn_bias: bool = False
    experts: Experts | None = None

    # norms
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_bias: bool = True  # of "layer" norms
    norm_offset: bool = False  # weights are stored as the difference from one
    arrangement: Arrangement = "pre"
    final_norm: bool = True

    # embedding and head
    tie_embeddings: bool = False
    embed_norm: bool = False
    embed_scale: float | None = None
    token_types: int = 0
    head_bias: bool = False
    transform_activation: Activation | None = None  # of a masked LM's head; None: that of the feed-forward
    head_scale: float | None = None
    logit_softcap: float | None = None

    # encoder-decoder models
    cross_attention: bool = False

    def problems(self) -> list[str]:
        """What is impossible about this shape."""
        found = []
        if self.head_dim < 1:
            found.append(f"there are more heads ({self.n_heads}) than features ({self.dim})")
        if self.n_heads % self.n_kv_heads:
            found.append(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        for rope in (self.rope, self.local_rope):
            if rope is not None and (rope.dim or self.head_dim) % 2:
                found.append(f"the rotated part of a head ({rope.dim or self.head_dim}) must be even")
        if self.rope is not None and self.rope.dim is not None and self.rope.dim > self.head_dim:
            found.append(f"more dimensions are rotated ({self.rope.dim}) than a head has ({self.head_dim})")
        if self.experts is not None and self.experts.top_k > self.experts.number:
            found.append(f"top_k ({self.experts.top_k}) is more than there are experts ({self.experts.number})")
        if self.relative_buckets:
            exact = self.relative_buckets // (2 if self.causal else 4)  # half of a direction's; the rest is logarithmic
            if not 1 <= exact < self.relative_max_distance:
                found.append(
                    f"{self.relative_buckets} buckets of distances do not fit a longest distance of "
                    f"{self.relative_max_distance}"
                )
        return found

    def window_of(self, layer: int) -> int | None:
        """How far back a layer sees, in tokens; None: everything."""
        return None if layer in self.full_layers else self.window

    def rope_of(self, layer: int) -> Rope | None:
        """The rotary positions of a layer, if any."""
        if layer in self.nope_layers:
            return None
        return self.local_rope if self.local_rope is not None and self.window_of(layer) is not None else self.rope

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's feed-forward is a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """Shape of an encoder and a decoder that looks at it. The head belongs to the decoder's shape.

    Attributes:
        decoder_start_id: the token that every decoder sequence begins with.
        shared_embeddings: encoder and decoder have one embedding of tokens.
    """

    encoder: ModelConfig
    decoder: ModelConfig
    decoder_start_id: int
    shared_embeddings: bool = True

    def problems(self) -> list[str]:
        """What is impossible about this shape."""
        found = [f"encoder: {problem}" for problem in self.encoder.problems()]
        found += [f"decoder: {problem}" for problem in self.decoder.problems()]
        if not 0 <= self.decoder_start_id < self.decoder.vocab_size:
            found.append(
                f"decoder_start_token_id ({self.decoder_start_id}) is outside the vocabulary of "
                f"{self.decoder.vocab_size}"
            )
        return found
