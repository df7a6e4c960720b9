"""Keys and values in blocks of a fixed number of tokens, of which a sequence holds any, in any order (PagedAttention,
Kwon et al. 2023, arXiv:2309.06180), and attention through them.

The new tokens of all sequences stand in one row. Sequences with as many new tokens and about as many to look at,
decodes above all, are attended to in one call; a longer piece of a prompt has one to itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from danlu.nn import masks
from danlu.nn.config import ModelConfig
from danlu.nn.sdpa import attend

Ints = npt.NDArray[np.int32]

SCALE_DTYPE = torch.bfloat16
"""Of the scales of int8 keys and values: it has the range of fp32, and what is quantized is divided by the scale as it
was rounded, so that its coarseness costs nothing."""

TOGETHER = 16
"""Sequences with at most so many new tokens may share a call; longer pieces fill one by themselves."""


class PagedKV:
    """The memory of a paged cache.

    Layers come in groups that share block tables; a block of a group holds the keys and values of ``block_size`` tokens
    in all its layers.

    Args:
        groups: the layers of each group; those of one group have the same window.
        dtype: of keys and values. ``torch.int8``: whole numbers, with a scale for each token and head.
    """

    def __init__(
        self,
        config: ModelConfig,
        groups: Sequence[Sequence[int]],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.groups, self.block_size, self.dtype, self.device = config, groups, block_size, dtype, device
        self.quantized = dtype == torch.int8
        self.group_of = {layer: group for group, layers in enumerate(groups) for layer in layers}
        self.allocate([0] * len(groups))

    def block_bytes(self, group: int) -> int:
        """Memory of one block of a group, all its layers, keys and values."""
        scale = SCALE_DTYPE.itemsize if self.quantized else 0
        vectors = 2 * self.config.n_kv_heads * self.block_size * len(self.groups[group])
        return vectors * (self.config.head_dim * self.dtype.itemsize + scale)

    def allocate(self, n_blocks: Sequence[int], *, reserve: bool = False) -> None:
        """Make room for so many blocks in each group; what was stored is lost. Each group gets one block more: the
        last, which stays zero and is read where a shorter sequence has nothing.

        Args:
            reserve: take the memory from the system now, not when it is written to first.
        """
        config = self.config
        self._blocks: list[Tensor] = []  # (layers, blocks, block_size, 2, kv_heads, head_dim) of each group
        self._scales: list[Tensor] = []  # the same with head_dim 1, of int8
        for layers, n in zip(self.groups, n_blocks, strict=True):
            shape = (len(layers), n + 1, self.block_size, 2, config.n_kv_heads)
            self._blocks.append(torch.empty(*shape, config.head_dim, dtype=self.dtype, device=self.device))
            if self.quantized:
                self._scales.append(torch.empty(*shape, 1, dtype=SCALE_DTYPE, device=self.device))
        for memory in self._blocks + self._scales:
            (memory if reserve else memory[:, -1]).zero_()
        self._slots = self._by_layer(self._blocks)
        self._slot_scales = self._by_layer(self._scales)

    def _by_layer(self, of_groups: list[Tensor]) -> dict[int, Tensor]:
        """What lies in each slot of a layer, (slots, 2, kv_heads, ...): a block is ``block_size`` slots in a row."""
        pairs = zip(self.groups, of_groups, strict=False)
        return {layer: blocks[i].flatten(0, 1) for layers, blocks in pairs for i, layer in enumerate(layers)}

    def nothing(self, group: int) -> int:
        """The block of a group that stays zero."""
        return self._blocks[group].shape[1] - 1

    def copy_blocks(self, group: int, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy each (source, target) block of a group."""
        sources, targets = torch.tensor(pairs, dtype=torch.long, device=self.device).view(-1, 2).unbind(1)
        for memory in (self._blocks, self._scales) if self.quantized else (self._blocks,):
            memory[group].index_copy_(1, targets, memory[group].index_select(1, sources))

    def write(self, layer: int, slots_t: Tensor, k_thd: Tensor, v_thd: Tensor) -> None:
        """Store the keys and values of tokens."""
        kv = torch.stack((k_thd, v_thd), dim=1)
        if self.quantized:
            kv = kv.float()
            tiny = torch.finfo(SCALE_DTYPE).tiny
            scales = (kv.abs().amax(dim=-1, keepdim=True) / 127).to(SCALE_DTYPE).clamp_(min=tiny)
            kv = (kv / scales).round_().clamp_(-127, 127)
            self._slot_scales[layer].index_copy_(0, slots_t, scales)
        self._slots[layer].index_copy_(0, slots_t, kv.to(self.dtype))

    def read(self, layer: int, slots_bs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of slots, (batch, kv_heads, seq, head_dim) each."""
        slots = slots_bs.flatten()
        kv = self._slots[layer].index_select(0, slots).to(dtype)
        if self.quantized:
            kv *= self._slot_scales[layer].index_select(0, slots)
        k, v = kv.view(*slots_bs.shape, *kv.shape[1:]).permute(2, 0, 3, 1, 4)
        return k, v


@dataclass(frozen=True)
class Rows:
    """Sequences with equally many new tokens.

    Attributes:
        tokens: where their new tokens stand in the row.
        shape: sequences, new tokens of each.
    """

    tokens: slice | Tensor
    shape: tuple[int, int]

    def take(self, x_thd: Tensor) -> Tensor:
        """What belongs to them, (sequences, heads, new tokens, head_dim)."""
        return x_thd[self.tokens].view(*self.shape, *x_thd.shape[1:]).transpose(1, 2)

    def put(self, x_thd: Tensor, part_bhtd: Tensor) -> None:
        """The way back."""
        x_thd[self.tokens] = part_bhtd.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Together:
    """Sequences of a step that are attended to in one call.

    Attributes:
        slots_bs: what they look at; None: their new tokens alone.
        mask: additive, (sequences, 1 or heads, new tokens, keys); None: all of it may be seen, or ``causal`` says what.
    """

    rows: Rows
    slots_bs: Tensor | None
    mask: Tensor | None
    causal: bool


class PagedStep:
    """What one run through a model stores in a paged cache and looks at: made once, used by every layer.

    Args:
        kv: the memory.
        starts_s: (sequences + 1,) where the tokens of each sequence begin in the row; the last is their number.
        positions_t: place of each token in its sequence; those of a sequence follow each other.
        tables: for each group the block of positions ``[b * block_size, (b + 1) * block_size)`` of each sequence,
            (sequences, blocks); negative where there is none, and where it fell out of the window.
        max_lens_s: tokens that each sequence may grow to, for rotary scalings that depend on the length.
        dtype: of the activations.
        bias_of: what positions add to the scores, (batch, heads, queries, keys), given those of queries, (batch,
            queries), and keys, (batch, keys); None: nothing.
    """

    def __init__(
        self,
        kv: PagedKV,
        starts_s: Ints,
        positions_t: Ints,
        tables: Sequence[Ints],
        max_lens_s: Ints,
        dtype: torch.dtype,
        bias_of: Callable[[Tensor, Tensor], Tensor | None],
    ) -> None:
        self.kv = kv
        self._dtype, self._bias_of = dtype, bias_of
        self._starts, self._counts = starts_s[:-1], np.diff(starts_s)
        self._firsts = positions_t[self._starts]
        self._ends = self._firsts + self._counts
        self.longest = int(self._ends.max())
        self.positions_bt = self._to_device(positions_t)[None]
        self.max_lens_bt = torch.from_numpy(np.repeat(max_lens_s, self._counts))[None]  # decided upon on the CPU
        sequence_t = np.repeat(np.arange(len(self._counts)), self._counts)
        self._new_slots = [self._slots_of(table, sequence_t, positions_t) for table in tables]
        self._calls = [self._plan(group, table) for group, table in enumerate(tables)]

    def attend(
        self, layer: int, q_bhtd: Tensor, k_bhtd: Tensor, v_bhtd: Tensor, *, scale: float, softcap: float | None
    ) -> Tensor:
        """Store the keys and values of the row, and attend from every query to those of its own sequence,
        (1, heads, tokens, head_dim)."""
        group = self.kv.group_of[layer]
        q_thd, k_thd, v_thd = (x[0].transpose(0, 1) for x in (q_bhtd, k_bhtd, v_bhtd))
        self.kv.write(layer, self._new_slots[group], k_thd, v_thd)
        y_thd = q_thd.new_empty(q_thd.shape)
        for call in self._calls[group]:
            if call.slots_bs is None:
                k, v = call.rows.take(k_thd), call.rows.take(v_thd)
            else:
                k, v = self.kv.read(layer, call.slots_bs, q_thd.dtype)
            q = call.rows.take(q_thd)
            call.rows.put(y_thd, attend(q, k, v, call.mask, causal=call.causal, scale=scale, softcap=softcap))
        return y_thd.transpose(0, 1)[None]

    def by_count(self) -> list[tuple[Rows, list[int]]]:
        """The sequences by their number of new tokens."""
        by_count: defaultdict[int, list[int]] = defaultdict(list)
        for sequence, count in enumerate(self._counts.tolist()):
            by_count[count].append(sequence)
        return [(self._rows(np.array(sequences), count), sequences) for count, sequences in by_count.items()]

    def _rows(self, sequences: npt.NDArray[np.int64], count: int) -> Rows:
        """These sequences, which have so many new tokens each."""
        n, first = len(sequences), int(self._starts[sequences[0]])
        if sequences[-1] - sequences[0] + 1 == n:
            return Rows(slice(first, first + n * count), (n, count))
        return Rows(self._to_device(self._starts[sequences][:, None] + np.arange(count)).flatten(), (n, count))

    def _to_device(self, numbers: npt.NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(numbers.astype(np.int64)).to(self.kv.device)

    def _slots_of(self, table: Ints, sequence_t: npt.NDArray[np.int64], positions_t: Ints) -> Tensor:
        """The slot of each new token."""
        size = self.kv.block_size
        blocks_t = table[sequence_t, positions_t // size]
        assert (blocks_t >= 0).all(), "a new token has no block"
        return self._to_device(blocks_t.astype(np.int64) * size + positions_t % size)

    def _plan(self, group: int, table: Ints) -> list[Together]:
        """The calls of a group's layers."""
        kv = self.kv
        window, size = kv.config.window_of(kv.groups[group][0]), kv.block_size
        seen_from = np.zeros_like(self._firsts) if window is None else (self._firsts - window + 1).clip(min=0)
        block_starts = np.arange(table.shape[1]) * size
        seen = (block_starts < self._ends[:, None]) & (block_starts + size > seen_from[:, None])
        assert (table[seen] >= 0).all(), "a block was given back that is still seen"

        together: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        spans = self._ends - seen_from
        for sequence, (count, span) in enumerate(zip(self._counts.tolist(), spans.tolist(), strict=True)):
            # Keys are padded to the longest of a call: to no more than twice their number, by going with powers of two.
            alike = (count, span.bit_length()) if count <= TOGETHER else (count, -sequence)
            together[alike].append(sequence)
        table_sn = self._to_device(np.where(seen, table, kv.nothing(group)))
        return [
            self._call(group, np.array(sequences), count, seen_from, spans, table_sn, window)
            for (count, _), sequences in together.items()
        ]

    def _call(
        self,
        group: int,
        sequences: npt.NDArray[np.int64],
        count: int,
        seen_from: Ints,
        spans: Ints,
        table_sn: Tensor,
        window: int | None,
    ) -> Together:
        kv, device = self.kv, self.kv.device
        n_keys = int(spans[sequences].max())
        keys_bs = self._to_device(seen_from[sequences])[:, None] + torch.arange(n_keys, device=device)
        queries_bt = self._to_device(self._firsts[sequences])[:, None] + torch.arange(count, device=device)
        alone = n_keys == count and (window is None or count <= window)  # nothing came before, and nothing is cut
        bias = self._bias_of(queries_bt, keys_bs)
        mask = None
        if bias is not None or not (alone or (count == 1 and (spans[sequences] == n_keys).all())):
            visible = keys_bs[:, None, :] <= queries_bt[:, :, None]
            if window is not None:
                visible &= keys_bs[:, None, :] > queries_bt[:, :, None] - window
            mask = masks.additive(visible[:, None], self._dtype)
            mask = mask if bias is None else mask + bias.to(mask.dtype)
        slots_bs = None
        if n_keys > count or kv.dtype != self._dtype:  # else what is stored is what is at hand
            size = kv.block_size
            past_end = keys_bs >= self._to_device(self._ends[sequences])[:, None]
            blocks_bs = table_sn[self._to_device(sequences)].gather(
                1, (keys_bs // size).clamp_(max=table_sn.shape[1] - 1)
            )
            slots_bs = (blocks_bs * size + keys_bs % size).masked_fill_(past_end, kv.nothing(group) * size)
        causal = mask is None and alone and count > 1
        return Together(self._rows(sequences, count), slots_bs, mask, causal)
