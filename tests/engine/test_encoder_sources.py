"""Encoder-decoders through the paged runner, against the same model without a cache."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from encoder_decoders import FAMILIES, encoder_decoder
from paged_sequences import VOCAB, Sequences

from danlu.engine.batch import Source
from danlu.engine.torch_runner import TorchRunner

LENGTHS = [20, 3, 1, 28, 17, 20]


def random_sources(*lengths: int) -> list[Source]:
    generator = np.random.default_rng(0)
    return [Source(generator.integers(0, VOCAB, n).astype(np.int32)) for n in lengths]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("same", [True, False])
def test_each_sequence_looks_at_its_own_source(family: str, same: bool) -> None:
    """Sources of one length, which need no mask, or of several; the first two sequences have one source."""
    sources = random_sources(*(9 if same else n for n in (9, 30, 1, 12, 5)))
    runner = TorchRunner(encoder_decoder(FAMILIES[family]), block_size=4)
    sequences = Sequences(runner, LENGTHS, sources=[sources[0], *sources])
    assert sequences.errors(sequences.play()).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_written_token_by_token(family: str) -> None:
    sources = random_sources(8, 3, 20)
    sequences = Sequences(TorchRunner(encoder_decoder(FAMILIES[family])), [12] * 3, sources=sources)
    parts = zip(*(sequences.advance([(i, 1) for i in range(3)]) for _ in range(12)), strict=True)
    assert sequences.errors([torch.cat(part) for part in parts]).abs().max() < 1e-4


def test_a_source_is_encoded_once_and_forgotten_with_its_request() -> None:
    model = encoder_decoder(FAMILIES["t5"])
    encoded = []
    model.encoder.layers[0].register_forward_hook(lambda *_: encoded.append(1))
    runner = TorchRunner(model)
    sequences = Sequences(runner, [3, 3, 3], sources=random_sources(5, 6, 7))
    for _ in range(2):
        sequences.advance([(0, 1), (1, 1)])
    assert len(encoded) == 2
    sequences.sources = [sequences.sources[1]] * 3
    sequences.advance([(1, 1)])
    gc.collect()
    assert len(encoded) == 2
    assert len(runner._sources._memories) == 1
