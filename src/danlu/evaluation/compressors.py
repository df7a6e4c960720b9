"""What classical compressors make of the same held-out text, in bits per byte: the yardstick a model has to beat.

A compressor that has read the training text first ("primed") knows what the model knows: the fair comparison.
It is measured as the compressed size of training and held-out text together less that of the training text alone.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from danlu.errors import DanluError

PRIME_BYTES = 64 << 20
"""At most this much training text primes xz: the dictionary of `xz -9`. Encoding takes 12 times the dictionary."""


def compressor_bits_per_byte(train: Iterable[str], heldout: Iterable[str]) -> dict[str, float]:
    """Bits per byte of the held-out documents, put one after the other, under gzip and xz.

    Args:
        train: training documents; the first ``PRIME_BYTES`` of them are used.
        heldout: held-out documents.

    Returns:
        ``gzip`` (-9), ``xz`` (-9e) and ``xz_primed`` (-9e, with a dictionary that holds all of it).

    Raises:
        DanluError: there is no held-out text.
    """
    text = b"".join(document.encode() for document in heldout)
    if not text:
        raise DanluError("there is no held-out text to compress; build the data folder with a held-out share")
    prime = bytearray()
    for document in train:
        prime += document.encode()
        if len(prime) >= PRIME_BYTES:
            del prime[PRIME_BYTES:]
            break
    dictionary = min(len(prime) + len(text), 2 * PRIME_BYTES)
    with ThreadPoolExecutor(2) as pool:  # lzma lets other threads run; each pass over 12 MB takes about ten seconds
        both = pool.submit(xz_size, prime, text, dictionary=dictionary)
        alone = pool.submit(xz_size, prime, dictionary=dictionary)
        sizes = {
            "gzip": len(gzip.compress(text, 9, mtime=0)),
            "xz": xz_size(text, dictionary=PRIME_BYTES),
            "xz_primed": both.result() - alone.result(),
        }
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def xz_size(*parts: bytes | bytearray, dictionary: int) -> int:
    """Bytes of the .xz file that `xz -9e` with this dictionary (bytes) makes of the parts, one after the other."""
    lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(dictionary, 4096)}
    compressor = lzma.LZMACompressor(format=lzma.FORMAT_XZ, filters=[lzma2])
    return sum(len(compressor.compress(part)) for part in parts) + len(compressor.flush())
