"""Sizes against the compressors' own files."""

from __future__ import annotations

import gzip
import lzma
import random

import pytest

from danlu.errors import DanluError
from danlu.evaluation import compressors
from danlu.evaluation.compressors import compressor_bits_per_byte


def words(seed: int, n: int) -> str:
    """Text of words that only the given seed knows, each used many times over."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(200)]
    return " ".join(rng.choices(vocabulary, k=n))


def test_alone_it_is_what_the_compressors_write() -> None:
    text = [words(0, 800), "丹炉\n", words(1, 300)]
    data = "".join(text).encode()
    found = compressor_bits_per_byte([], text)
    assert found["xz"] == 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
    assert found["gzip"] == 8 * len(gzip.compress(data, 9)) / len(data)


def test_primed_it_is_the_growth_of_the_archive() -> None:
    train, heldout = words(0, 3000).encode(), words(0, 900).encode()
    growth = len(lzma.compress(train + heldout, preset=9 | 1 << 31)) - len(lzma.compress(train, preset=9 | 1 << 31))
    found = compressor_bits_per_byte([train[:5000].decode(), train[5000:].decode()], [heldout.decode()])
    assert found["xz_primed"] == 8 * growth / len(heldout)


def test_priming_helps_where_the_training_text_is_alike_and_only_there() -> None:
    heldout = [words(0, 500)]
    alike = compressor_bits_per_byte([words(0, 3000)[:-1]], heldout)
    other = compressor_bits_per_byte([words(7, 3000)], heldout)
    assert alike["xz_primed"] < 0.7 * alike["xz"]
    assert other["xz_primed"] > 0.85 * other["xz"]  # words of the same letters help a little


def test_only_so_much_training_text_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressors, "PRIME_BYTES", 1 << 16)
    read = 0

    def train() -> object:
        nonlocal read
        for seed in range(1000):
            read += 1
            yield words(seed, 500)

    compressor_bits_per_byte(train(), ["held out"])
    assert read < 20


def test_no_text_is_refused() -> None:
    with pytest.raises(DanluError, match="no held-out text"):
        compressor_bits_per_byte(["train"], ["", ""])
