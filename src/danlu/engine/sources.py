"""The encoder's side of the sequences that an encoder-decoder writes: made at a sequence's first step, kept while its
source is."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from danlu.engine.batch import Source
from danlu.models.encoder_decoder import EncoderDecoder
from danlu.models.transformer import Memory
from danlu.nn import masks
from danlu.nn.paged import PagedStep
from danlu.nn.paged_memory import PagedMemory, Sources


class SourceMemories:
    """Keys and values of sources for the cross-attention of each layer, in the dtype of the activations.

    Each source is encoded by itself, so that what is written about it does not hang on its neighbours.
    """

    def __init__(self, model: EncoderDecoder) -> None:
        self.model = model
        self._memories: WeakKeyDictionary[Source, Memory] = WeakKeyDictionary()
        # Decodes go on with the same sequences step after step: what was put together for the last one is kept.
        self._together: dict[tuple[Source, ...], tuple[list[tuple[Tensor, Tensor]], Tensor | None]] = {}

    def of(self, step: PagedStep, sources: Sequence[Source]) -> PagedMemory:
        """What a step's sequences look at, given the source of each."""
        together, parts = {}, []
        for rows, sequences in step.by_count():
            key = tuple(sources[sequence] for sequence in sequences)
            together[key] = self._together.get(key) or self._pad([self._memory(source) for source in key])
            parts.append(Sources(rows, *together[key]))
        self._together = together
        return PagedMemory(parts)

    def _memory(self, source: Source) -> Memory:
        if source not in self._memories:
            self._memories[source] = self.model.encode(torch.from_numpy(source.ids_s).to(self.model.device)[None])
        return self._memories[source]

    def _pad(self, memories: Sequence[Memory]) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        """Keys and values of each layer in one tensor, and the mask of what is padding."""
        lengths_b = torch.tensor([memory.keys_values[0][0].shape[2] for memory in memories])
        longest = int(lengths_b.max())

        def pad(layer: int, which: int) -> Tensor:
            first = memories[0].keys_values[layer][which]
            padded = first.new_zeros(len(memories), first.shape[1], longest, first.shape[3])
            for row, memory in zip(padded, memories, strict=True):
                row[:, : memory.keys_values[layer][which].shape[2]] = memory.keys_values[layer][which][0]
            return padded

        keys_values = [(pad(layer, 0), pad(layer, 1)) for layer in range(len(memories[0].keys_values))]
        if bool((lengths_b == longest).all()):
            return keys_values, None
        real_bs = (torch.arange(longest) < lengths_b[:, None]).to(self.model.device)
        return keys_values, masks.additive(real_bs[:, None, None, :], self.model.dtype)
