"""What the tokens of a vocabulary stand for, in bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, Literal

from danlu.tokenizer.definition import BLANK

Kind = Literal["byte-level", "sentencepiece", "wordpiece"]


def kind_of(definition: Mapping[str, Any]) -> Kind:
    """How a vocabulary writes text: GPT-2's alphabet of bytes, SentencePiece's pieces, or BERT's ##pieces."""
    if '"ByteLevel"' in json.dumps(definition.get("decoder")):
        return "byte-level"
    return "wordpiece" if (definition.get("model") or {}).get("type") == "WordPiece" else "sentencepiece"


def bytes_of_ids(definition: Mapping[str, Any], vocab: Mapping[str, int], markers: Mapping[str, int]) -> list[bytes]:
    """What each id stands for, wherever it stands; ids that the vocabulary leaves out stand for nothing.

    Pieces that begin a word stand for its leading space too. So a text's first piece has one byte more than the text
    where the tokenizer puts a space in front (SentencePiece's dummy prefix), and so has WordPiece's, which keeps no
    other spaces.

    Args:
        vocab: token -> id, added tokens included.
        markers: those of the vocabulary that mark structure; they stand for their own text.
    """
    kind = kind_of(definition)
    table = [b""] * (max(vocab.values()) + 1)
    added = {token["content"] for token in definition.get("added_tokens") or []}
    continuing = (definition.get("model") or {}).get("continuing_subword_prefix") or "##"
    for token, i in vocab.items():
        if token in markers or (kind != "sentencepiece" and token in added):
            table[i] = token.encode()
        elif kind == "byte-level" and CHAR_TO_BYTE.keys() >= set(token):
            table[i] = bytes(CHAR_TO_BYTE[c] for c in token)
        elif kind == "wordpiece":
            table[i] = (token.removeprefix(continuing) if token.startswith(continuing) else f" {token}").encode()
        elif found := re.fullmatch("<0x([0-9A-F]{2})>", token):  # SentencePiece's way to write a byte
            table[i] = bytes.fromhex(found[1])
        else:
            table[i] = token.replace(BLANK, " ").encode()
    return table


def _byte_alphabet() -> dict[int, str]:
    """The character that stands for each byte in GPT-2's alphabet: printable Latin-1 itself, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


BYTE_TO_CHAR: Final = _byte_alphabet()
CHAR_TO_BYTE: Final = {char: byte for byte, char in BYTE_TO_CHAR.items()}
