"""A model on which every mistake of the engine shows: each position keeps a hash of all that it sees, read back through
the block tables, and the next logits are made of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from danlu.engine.batch import FREED, Batch, kv_groups
from danlu.nn.config import ModelConfig

BOS, STOP = 256, 257
VOCAB = 258
PRIME = 2**31 - 1
UNWRITTEN = -1
FACTORS = np.arange(1, 5000, dtype=np.int64) * 48271 % 65521 + 1


class ByteTokenizer:
    """What the engine needs of a tokenizer, at one byte a token."""

    bos_id, stop_ids, vocab_size, add_bos, where = BOS, (STOP,), VOCAB, True, "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return bytes(i for i in ids if i < 256)

    def is_special(self, token_id: int) -> bool:
        return token_id >= 256


def toy_config(window: int | None = None, *, full: bool = True, context: int = 128) -> ModelConfig:
    """Two layers; with a window the second has it, or, without ``full``, both."""
    layers = (0,) if window is not None and full else ()
    return ModelConfig(VOCAB, 2, 8, 1, 1, 8, 8, context=context, window=window, full_layers=layers)


def mix(token_id: int, position: int, seen: Sequence[np.ndarray]) -> int:
    """The hash of a position: of its token, its place and the hashes it sees, in order and group by group."""
    found = (token_id + 1) * 7919 + position * 104729
    for values in seen:
        found = (found * 16807 + int((values * FACTORS[: len(values)] % PRIME).sum())) % PRIME
    return found


def logits_of(value: int) -> np.ndarray:
    """Pseudorandom and spread wide enough that an answer is not all ties; bytes of letters are likelier."""
    ids = np.arange(1, VOCAB + 1, dtype=np.int64)
    mixed = (value * ids % PRIME * 48271 + ids * 7919) % PRIME
    return (mixed / PRIME * 6).astype(np.float32)


def reference_values(config: ModelConfig, ids: Sequence[int]) -> list[int]:
    """The hash of each position, without any blocks."""
    values: list[int] = []
    for position, token_id in enumerate(ids):
        seen = [
            np.array(values[max(0, position - (group.window or 10**9) + 1) : position], dtype=np.int64)
            for group in kv_groups(config)
        ]
        values.append(mix(token_id, position, seen))
    return values


def greedy(config: ModelConfig, ids: Sequence[int], n: int) -> list[int]:
    """Continue with the likeliest tokens, without engine."""
    answer: list[int] = []
    for _ in range(n):
        answer.append(int(logits_of(reference_values(config, [*ids, *answer])[-1]).argmax()))
    return answer


class ToyRunner:
    """A :class:`danlu.engine.batch.Runner`."""

    def __init__(self, config: ModelConfig | None = None, block_size: int = 4) -> None:
        self.config = config or toy_config()
        self.groups, self.block_size = kv_groups(self.config), block_size
        self.device = torch.device("cpu")
        self.tokens_run: list[int] = []
        self.broken: set[int] = set()
        """Tokens whose logits are not numbers."""

    def block_bytes(self, group: int) -> int:
        return 1 << 10

    def allocate(self, n_blocks: Sequence[int], *, reserve: bool = False) -> None:
        self.memory = [np.full((n, self.block_size), UNWRITTEN, dtype=np.int64) for n in n_blocks]

    def copy_blocks(self, group: int, pairs: Sequence[tuple[int, int]]) -> None:
        sources, targets = zip(*pairs, strict=True)
        assert len(set(targets)) == len(targets)
        self.memory[group][list(targets)] = self.memory[group][list(sources)]  # all are read before any is written

    def _values(self, batch: Batch) -> list[int]:
        self.tokens_run.append(len(batch.ids_t))
        written: set[tuple[int, int, int]] = set()
        values: list[int] = []
        size = self.block_size
        for s in range(batch.n_sequences):
            for t in range(batch.starts_s[s], batch.starts_s[s + 1]):
                position = int(batch.positions_t[t])
                seen = []
                for g, group in enumerate(self.groups):
                    row = batch.tables[g][s]
                    first = max(0, position - (group.window or 10**9) + 1)
                    places = np.arange(first, position)
                    blocks = row[places // size]
                    assert (blocks != FREED).all(), "a block that is still seen was given back"
                    found = self.memory[g][blocks, places % size]
                    assert (found != UNWRITTEN).all(), "a slot is read that was never written"
                    seen.append(found)
                value = mix(int(batch.ids_t[t]), position, seen)
                for g in range(len(self.groups)):
                    block = int(batch.tables[g][s][position // size])
                    assert block != FREED
                    assert (g, block, position % size) not in written, "two sequences write to one slot"
                    written.add((g, block, position % size))
                    self.memory[g][block, position % size] = value
                values.append(value)
        return values

    def run(self, batch: Batch) -> Tensor:
        values = self._values(batch)
        rows = [logits_of(values[t]) for t in batch.logits_at]
        for row, t in zip(rows, batch.logits_at, strict=True):
            if int(batch.ids_t[t]) in self.broken:
                row[:] = np.nan
        return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, VOCAB)

    def hidden(self, batch: Batch) -> Tensor:
        values = self._values(batch)
        return torch.tensor([[values[t] / PRIME] * self.config.dim for t in batch.logits_at])
