"""The one dial that derives the shape of a new model."""

from __future__ import annotations

from danlu.nn.config import ModelConfig, Rope


def model_config_for(
    depth: int, vocab_size: int, context: int = 1024, **overrides: int | float | bool | None
) -> ModelConfig:
    """The model of a given depth in the Qwen3 layout: width 64 x depth, heads of 64, half as many key/value heads,
    SwiGLU of 8/3 the width.

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
        qk_norm="head",
        rope=Rope(base=float(given.get("rope_base", 10_000.0))),
        tie_embeddings=bool(given.get("tie_embeddings", False)),
    )
