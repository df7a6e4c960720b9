"""Runs the batches of the engine with torch: every model that writes, on every device, through a paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from danlu.engine.batch import Batch, kv_groups
from danlu.engine.sources import SourceMemories
from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.models.encoder_decoder import EncoderDecoder
from danlu.nn.paged import PagedKV, PagedStep

KV_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


class TorchRunner:
    """A :class:`danlu.engine.batch.Runner` for a model in memory. Its weights are read at each run: who trains them
    between two runs has to do nothing. (A source is encoded once: its memory is of the weights of that moment.)

    Of an encoder-decoder, ``config`` and the cache are the decoder's; each sequence of a batch has a source.

    Args:
        block_size: tokens a block.
        kv_dtype: of the cached keys and values; "int8" has a scale for each token and head. Default: as the activations
            are.

    Raises:
        DanluError: no such dtype, or no such block size.
    """

    def __init__(
        self,
        model: CausalLM | EncoderDecoder,
        *,
        block_size: int = 16,
        kv_dtype: torch.dtype | Literal["int8"] | None = None,
    ) -> None:
        dtype = torch.int8 if kv_dtype == "int8" else kv_dtype or model.dtype
        if dtype not in KV_DTYPES:
            raise DanluError(
                f"keys and values cannot be kept as {str(dtype).removeprefix('torch.')}; "
                "float32, float16, bfloat16 and int8 are possible"
            )
        if block_size < 1:
            raise DanluError(f"block_size is {block_size}; a block holds at least one token")
        self.device = model.device
        self.take(model)
        self.config = self._stack.config
        self.groups, self.block_size = kv_groups(self.config), block_size
        self._kv = PagedKV(self.config, [group.layers for group in self.groups], block_size, dtype, self.device)

    def take(self, model: CausalLM | EncoderDecoder) -> None:
        """Run this model, of the same shape, from now on."""
        self.model = model
        self._stack = model.decoder if isinstance(model, EncoderDecoder) else model
        self._sources = SourceMemories(model) if isinstance(model, EncoderDecoder) else None

    def block_bytes(self, group: int) -> int:
        """Memory of one block of a group, all its layers, keys and values."""
        return self._kv.block_bytes(group)

    @torch.inference_mode()
    def allocate(self, n_blocks: Sequence[int], *, reserve: bool = False) -> None:
        """Make room for so many blocks in each group, and one more for the runner itself; what was cached is lost."""
        self._kv.allocate(n_blocks, reserve=reserve)

    @torch.inference_mode()
    def copy_blocks(self, group: int, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy each (source, target) block of a group."""
        self._kv.copy_blocks(group, pairs)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Store the keys and values of the batch's tokens; logits at ``logits_at``, (rows, vocab) fp32."""
        return self.model.head(self._rows(batch))  # type: ignore[no-any-return]

    @torch.inference_mode()
    def hidden(self, batch: Batch) -> Tensor:
        """The same run, but the final hidden states at ``logits_at``, (rows, dim) fp32."""
        return self._rows(batch).float()

    def _rows(self, batch: Batch) -> Tensor:
        """Final hidden states at ``logits_at``, in the dtype of the activations."""
        if any(batch.adapters):
            raise DanluError(
                f"the adapter {next(filter(None, batch.adapters))!r} is asked for, and this runner applies none"
            )
        stack = self._stack
        step = PagedStep(
            self._kv, batch.starts_s, batch.positions_t, batch.tables, batch.rope_lengths_s, stack.dtype,
            stack.position_bias,
        )  # fmt: skip
        memory = None if self._sources is None else self._sources.of(step, batch.sources)
        ids_bt = torch.from_numpy(batch.ids_t).to(self.device)[None]
        x_btd = stack.hidden_states(ids_bt, cache=step, memory=memory)
        return x_btd[0].index_select(0, torch.from_numpy(batch.logits_at).to(self.device))
