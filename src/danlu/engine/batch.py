"""What one step of the engine runs, and what runs it: the line between scheduling and computing.

A step has no padding: the new tokens of all its sequences stand end to end, prompts being read beside answers being
written, and each token finds the keys and values of its sequence through a table of cache blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from danlu.nn.config import ModelConfig

Ints = npt.NDArray[np.int32]

FREED = -1
"""Stands in a block table where a block fell out of the window and was given back; it is never read."""


@dataclass(frozen=True)
class KVGroup:
    """Layers that look equally far back. They share block tables, so that the blocks which fell out of a window can be
    given back although other layers still need theirs.

    Attributes:
        layers: their places in the model.
        window: tokens a position sees, itself included; None: everything.
    """

    layers: tuple[int, ...]
    window: int | None


def kv_groups(config: ModelConfig) -> list[KVGroup]:
    """The layers of a model by window: those that see everything first, if there are any."""
    windows = [config.window_of(layer) for layer in range(config.n_layers)]
    order = sorted(set(windows), key=lambda window: (window is not None, window or 0))
    return [KVGroup(tuple(i for i, w in enumerate(windows) if w == window), window) for window in order]


@dataclass(frozen=True, eq=False)
class Source:
    """The token ids that the encoder of an encoder-decoder reads for a sequence, int32.

    Sequences that answer the same request carry the same object: it is read once, and what a runner makes of it is
    kept as long as the object is.
    """

    ids_s: Ints


@dataclass(frozen=True)
class Batch:
    """The new tokens of several sequences, all int32.

    Attributes:
        ids_t: token ids, those of one sequence in a row.
        positions_t: place of each token in its sequence.
        starts_s: (sequences + 1,) where each sequence's tokens begin; the last is the number of tokens.
        tables: one (sequences, blocks) table a :class:`KVGroup`: the cache block that holds positions
            ``[b * block_size, (b + 1) * block_size)`` of a sequence is ``table[s, b]``. Rows are filled up with
            :data:`FREED`.
        logits_at: places in ``ids_t`` whose logits are wanted.
        rope_lengths_s: tokens each sequence may grow to, for rotary scalings that depend on the length.
        prompt_from: tokens before this place continue answers, the others read prompts. A runner may compute the two
            in different ways, but each token always in the same way, whatever else is in the batch.
        adapters: the adapter of each sequence, None: the model as it is; empty: None for all.
        sources: what the encoder reads for each sequence; of encoder-decoders only.
    """

    ids_t: Ints
    positions_t: Ints
    starts_s: Ints
    tables: tuple[Ints, ...]
    logits_at: Ints
    rope_lengths_s: Ints
    prompt_from: int = 0
    adapters: tuple[str | None, ...] = field(default=())
    sources: tuple[Source, ...] = field(default=())

    @property
    def n_sequences(self) -> int:
        return len(self.starts_s) - 1


class Runner(Protocol):
    """Runs batches and owns the memory of the cache. One that applies adapters is an :class:`AdapterRunner`.

    Attributes:
        groups: the model's KV groups, in the order of ``Batch.tables``.
        block_size: tokens a block.
    """

    config: ModelConfig
    groups: list[KVGroup]
    block_size: int
    device: torch.device

    def block_bytes(self, group: int) -> int:
        """Memory of one block of a group, all its layers, keys and values."""

    def allocate(self, n_blocks: Sequence[int], *, reserve: bool = False) -> None:
        """Make room for so many blocks in each group; what was cached is lost.

        Args:
            reserve: take the memory from the system now, not when it is written to first.
        """

    def run(self, batch: Batch) -> Tensor:
        """Store the keys and values of the batch's tokens; logits at ``logits_at``, (rows, vocab) fp32, which the next
        run may overwrite."""

    def hidden(self, batch: Batch) -> Tensor:
        """The same run, but the final hidden states at ``logits_at``, (rows, dim) fp32."""

    def copy_blocks(self, group: int, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy each (source, target) block of a group."""


@runtime_checkable
class AdapterRunner(Runner, Protocol):
    """A runner whose batches may name adapters.

    Attributes:
        adapters: those that are loaded, by name.
    """

    @property
    def adapters(self) -> Mapping[str, object]: ...

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Read an adapter in PEFT's layout; batches may name it from then on. Another thread may be in :meth:`run`.

        Raises:
            DanluError: it does not fit the model, or is of a kind that this runner does not apply.
        """

    def unload_adapter(self, name: str) -> None:
        """Forget it."""
