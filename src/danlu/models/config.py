"""The shape of a decoder-only model, and the one dial that derives it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder in the Qwen3 layout. ``context`` is the longest sequence it is made for, in tokens."""

    vocab_size: int
    n_layers: int
    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    context: int = 1024
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False

    def problems(self) -> list[str]:
        """What is impossible about this shape."""
        found = []
        if self.n_heads % self.n_kv_heads:
            found.append(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        if self.head_dim % 2:
            found.append(f"head_dim ({self.head_dim}) must be even: RoPE rotates pairs")
        return found


def model_config_for(
    depth: int, vocab_size: int, context: int = 1024, **overrides: int | float | bool | None
) -> ModelConfig:
    """The model of a given depth: width 64 x depth, heads of 64, half as many key/value heads, SwiGLU of 8/3 the width.

    A fixed aspect ratio keeps one dial (as in nanochat's ladder). Overrides that are None are ignored; a width that is
    overridden carries heads and feed-forward width with it.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    dim = int(given.get("dim", 64 * depth))
    head_dim = int(given.get("head_dim", 64 if dim % 64 == 0 else 32))
    n_heads = int(given.get("n_heads", max(1, dim // head_dim)))
    n_kv_heads = int(given.get("n_kv_heads", n_heads // 2 if n_heads % 2 == 0 else n_heads))
    ffn_dim = int(given.get("ffn_dim", -(-dim * 8 // 3 // 64) * 64))
    return ModelConfig(
        vocab_size=vocab_size,
        n_layers=depth,
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_dim=ffn_dim,
        context=context,
        rope_base=float(given.get("rope_base", 10_000.0)),
        tie_embeddings=bool(given.get("tie_embeddings", False)),
    )
