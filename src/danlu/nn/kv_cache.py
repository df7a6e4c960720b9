"""Keys and values of the tokens seen so far, so that each new token costs one position and not the whole prefix."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class CacheShape(Protocol):
    """What a cache has to know of a model's config."""

    @property
    def n_layers(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class KVCache:
    """A contiguous cache of fixed size for a batch that advances in step.

    Rows of unequal length are padded on the left: ``left_pad_b[i]`` slots of row ``i`` hold padding; they are masked
    out of attention and positions count from the first real token.

    Args:
        config: shape of the model.
        batch: number of rows.
        max_len: slots per row; writing past them raises ValueError.
        left_pad_b: (batch,) number of padding slots at the start of each row; default none.
    """

    def __init__(
        self,
        config: CacheShape,
        batch: int,
        max_len: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        left_pad_b: Tensor | None = None,
    ) -> None:
        shape = (batch, config.n_kv_heads, max_len, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.left_pad_b = torch.zeros(batch, dtype=torch.long) if left_pad_b is None else left_pad_b.long()
        self.left_pad_b = self.left_pad_b.to(device)
        self.max_len = max_len
        self.length = 0

    def update(self, layer: int, k_bhtd: Tensor, v_bhtd: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values at ``length`` and return all of them so far."""
        end = self.length + k_bhtd.shape[2]
        if end > self.max_len:
            raise ValueError(f"KV cache of {self.max_len} slots cannot take token {end}")
        self.keys[layer][:, :, self.length : end] = k_bhtd
        self.values[layer][:, :, self.length : end] = v_bhtd
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def positions(self, n_new: int) -> Tensor:
        """Positions of the next ``n_new`` tokens, (batch, n_new); padding gets 0."""
        return self._positions(self.length, self.length + n_new)

    def key_positions(self, n_new: int) -> Tensor:
        """Positions of all tokens, the next ``n_new`` included, (batch, length + n_new); padding gets 0."""
        return self._positions(0, self.length + n_new)

    def _positions(self, start: int, end: int) -> Tensor:
        slots = torch.arange(start, end, device=self.left_pad_b.device)
        return (slots - self.left_pad_b[:, None]).clamp(min=0)

    def real(self, n_new: int) -> Tensor | None:
        """True for slots that hold no padding, (batch, length + n_new); None when no row has any."""
        if not bool(self.left_pad_b.any()):
            return None
        return torch.arange(self.length + n_new, device=self.left_pad_b.device) >= self.left_pad_b[:, None]
