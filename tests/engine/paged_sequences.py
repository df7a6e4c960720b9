"""Sequences of a runner whose blocks are dealt at random, with poison wherever nothing may be read."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from danlu.engine.batch import FREED, Batch, Source
from danlu.engine.torch_runner import TorchRunner

Model = TypeVar("Model", bound=torch.nn.Module)
VOCAB = 61
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "n_layers": 3, "dim": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "ffn_dim": 48,
    "context": 64,
}  # fmt: skip


def random_model(make: Callable[[], Model], seed: int = 0) -> Model:
    """Every weight random: biases of zero and norms of one would hide mistakes."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(0.25 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    return model.eval()


class Sequences:
    """Sequences of a runner, whose blocks are dealt at random, and poison in every block that nobody owns.

    Args:
        lengths: of the sequences.
        max_lens: what each may grow to; default: its length.
        sources: what the encoder reads for each, of encoder-decoders.
    """

    def __init__(
        self,
        runner: TorchRunner,
        lengths: Sequence[int],
        max_lens: Sequence[int] = (),
        sources: Sequence[Source] = (),
        seed: int = 0,
    ) -> None:
        self.runner, self.random = runner, random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.ids = [torch.randint(0, VOCAB, (n,), generator=generator) for n in lengths]
        self.max_lens, self.sources = max_lens or lengths, sources
        self.done = [0] * len(lengths)
        self.width = -(-max(lengths) // runner.block_size) + 1
        n_blocks = sum(-(-n // runner.block_size) for n in lengths)
        runner.allocate([n_blocks] * len(runner.groups))
        self.free = [list(range(n_blocks)) for _ in runner.groups]
        self.tables = [np.full((len(lengths), self.width), FREED, dtype=np.int32) for _ in runner.groups]
        for group, free in enumerate(self.free):
            self.poison(group, free)
            self.random.shuffle(free)

    @torch.inference_mode()
    def poison(self, group: int, blocks: list[int]) -> None:
        kv = self.runner._kv
        (kv._scales if kv.quantized else kv._blocks)[group][:, blocks] = torch.nan

    def batch(self, pieces: Sequence[tuple[int, int]], logits_at: Sequence[int] | None = None) -> Batch:
        """The next so many tokens of these sequences."""
        ids, positions, starts = [], [], [0]
        for sequence, n in pieces:
            begin = self.done[sequence]
            ids += self.ids[sequence][begin : begin + n].tolist()
            positions += range(begin, begin + n)
            starts.append(len(ids))
            for free, table in zip(self.free, self.tables, strict=True):
                for place in range(-(-(begin + n) // self.runner.block_size)):
                    if table[sequence, place] == FREED and place >= begin // self.runner.block_size:
                        table[sequence, place] = free.pop()
        rows = [sequence for sequence, _ in pieces]
        return Batch(
            *(np.array(numbers, dtype=np.int32) for numbers in (ids, positions, starts)),
            tables=tuple(table[rows] for table in self.tables),
            logits_at=np.array(range(len(ids)) if logits_at is None else logits_at, dtype=np.int32),
            rope_lengths_s=np.array([self.max_lens[row] for row in rows], dtype=np.int32),
            sources=tuple(self.sources[row] for row in rows) if self.sources else (),
        )

    def advance(self, pieces: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Logits of all tokens of each piece; blocks that fell out of a window are poisoned and dealt again."""
        size = self.runner.block_size
        logits = self.runner.run(self.batch(pieces)).split([n for _, n in pieces])
        for sequence, n in pieces:
            self.done[sequence] += n
            for group, (table, free) in enumerate(zip(self.tables, self.free, strict=True)):
                window = self.runner.groups[group].window
                unseen = 0 if window is None else max(0, self.done[sequence] - window + 1) // size
                freed = [int(block) for block in table[sequence, :unseen] if block != FREED]
                table[sequence, :unseen] = FREED
                self.poison(group, freed)
                free += freed
                self.random.shuffle(free)
        return list(logits)

    def play(self) -> list[Tensor]:
        """Run all sequences to their end, in random pieces and any order; the logits of each."""
        parts: list[list[Tensor]] = [[] for _ in self.ids]
        while active := [i for i, ids in enumerate(self.ids) if self.done[i] < len(ids)]:
            chosen = self.random.sample(active, self.random.randint(1, len(active)))
            pieces = []
            for i in chosen:
                n = self.random.choice([1, 1, 1, 2, 3, 9, 21])
                pieces.append((i, min(n, len(self.ids[i]) - self.done[i])))
            for i, logits in zip(chosen, self.advance(pieces), strict=True):
                parts[i].append(logits.clone())
        return [torch.cat(part) for part in parts]

    def errors(self, found: list[Tensor]) -> Tensor:
        """Against the logits of each sequence alone, without a cache."""
        with torch.inference_mode():
            sources = [(torch.from_numpy(source.ids_s)[None],) for source in self.sources] or [()] * len(self.ids)
            pairs = zip(sources, self.ids, strict=True)
            expected = torch.cat([self.runner.model(*source, ids[None])[0] for source, ids in pairs])
        assert expected.std() > 0.1, "the model is too quiet to show a difference"
        return torch.cat(found) - expected
