"""Which positions a query may look at, and by how much its scores are shifted: causality, windows, documents, padding,
and the positions that live in the scores (ALiBi, T5's relative bias)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from danlu.nn.config import ModelConfig
from danlu.nn.embedding import Embedding


def visible(
    n_queries: int, n_keys: int, *, causal: bool, window: int | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """(queries, keys) bool: True where a query may look. The queries are the last ``n_queries`` of the keys' places.

    A window of w is the query's own place and the w - 1 before it.
    """
    key = torch.arange(n_keys, device=device)
    query = key[n_keys - n_queries :, None]
    seen = key <= query if causal else torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    return seen & (key > query - window) if window is not None else seen


def same_segment(segments_bt: Tensor, prefixes_bt: Tensor | None = None) -> Tensor:
    """(batch, 1, seq, seq) bool: True within one document of a packed row, and from it to the one it goes on from."""
    same = segments_bt[:, :, None] == segments_bt[:, None, :]
    if prefixes_bt is not None:
        same |= prefixes_bt[:, :, None] == segments_bt[:, None, :]
    return same[:, None]


def within(window: int, positions_bt: Tensor) -> Tensor:
    """(batch, 1, seq, seq) bool: True where a key's position is in the query's window, wherever in the row it lies."""
    return (positions_bt[:, None, :] > positions_bt[:, :, None] - window)[:, None]


def only_real(real_bs: Tensor, n_queries: int) -> Tensor:
    """(batch, 1, queries, keys) bool: True for keys that are not padding. A padding query sees itself: a row that sees
    nothing would be all NaN."""
    n_keys = real_bs.shape[1]
    own = torch.eye(n_keys, dtype=torch.bool, device=real_bs.device)[n_keys - n_queries :]
    return (real_bs[:, None, :] | own)[:, None]


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed, -inf elsewhere. Made once for all layers: SDPA would turn a boolean mask into this each time."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


def alibi_slopes(n_heads: int) -> Tensor:
    """ALiBi's slope of each head (Press et al. 2021, arXiv:2108.12409): a geometric series; for a number of heads that
    is no power of two, every other slope of the next power fills up."""
    closest = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * (i + 1) / closest) for i in range(closest)]
    slopes += [2 ** (-4 * (2 * i + 1) / closest) for i in range(n_heads - closest)]
    return torch.tensor(slopes)


def alibi_bias(config: ModelConfig, query_positions_bt: Tensor, key_positions_bs: Tensor) -> Tensor:
    """(batch, heads, queries, keys): slope times distance, 0 at the query's own place.

    Falcon rounds slope times position to bfloat16, as it was trained, and scales it like the scores.
    """
    slopes = alibi_slopes(config.n_heads).to(key_positions_bs.device)[None, :, None, None]
    if config.alibi == "falcon":
        bias = slopes.bfloat16() * key_positions_bs[:, None, None, :]
        scale = config.attention_scale or config.head_dim**-0.5
        return bias.float().expand(-1, -1, query_positions_bt.shape[1], -1) * scale
    return slopes * (key_positions_bs[:, None, None, :] - query_positions_bt[:, None, :, None])


class RelativeBias(nn.Module):
    """T5's learned bias for each head and bucket of distances (Raffel et al. 2019, arXiv:1910.10683): near distances
    have buckets of their own, far ones share logarithmic ones."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.table = Embedding(config.relative_buckets, config.n_heads)
        self.both_ways = not config.causal
        self.max_distance = config.relative_max_distance

    def forward(self, n_queries: int, n_keys: int) -> Tensor:
        """(1, heads, queries, keys); the queries are the last of the keys' places."""
        key = torch.arange(n_keys, device=self.table.weight.device)[None]
        return self.between(key[:, n_keys - n_queries :], key)

    def between(self, query_positions_bt: Tensor, key_positions_bs: Tensor) -> Tensor:
        """(batch, heads, queries, keys)."""
        distance = key_positions_bs[:, None, :] - query_positions_bt[:, :, None]
        return self.table(self._bucket(distance)).permute(0, 3, 1, 2).float()  # type: ignore[no-any-return]

    def _bucket(self, distance: Tensor) -> Tensor:
        n = self.table.num_embeddings
        bucket = torch.zeros_like(distance)
        if self.both_ways:
            n //= 2
            bucket = bucket + (distance > 0) * n
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = n // 2
        far = torch.log(distance.float().clamp(min=1) / exact) / math.log(self.max_distance / exact) * (n - exact)
        far = (exact + far.long()).clamp(max=n - 1)
        return bucket + torch.where(distance < exact, distance, far)
