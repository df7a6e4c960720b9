"""The two backends of a tokenizer: one that recognises special tokens, one for text that is only text."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from typing import Any

import tokenizers

from danlu.errors import DanluError
from danlu.tokenizer.definition import TOKENIZER


def build(definition: Mapping[str, Any], where: object) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps({**definition, "truncation": None, "padding": None}))
    except Exception as error:  # the library raises nothing narrower
        raise DanluError(f"{where}: {TOKENIZER} cannot be read as a tokenizer ({error})") from error
    return backend


def without_markers(definition: Mapping[str, Any], markers: Mapping[str, int]) -> dict[str, Any]:
    """The definition for text that is only text: markers count as special tokens, which are not recognised then.

    Added tokens that are ordinary text (runs of spaces, in some families) stay: models know them. A unigram model
    finds a marker that is one of its pieces by itself, so there it gets a name that no text can have.
    """
    added = [{**token, "special": is_marker(token)} for token in definition.get("added_tokens") or []]
    model = definition.get("model") or {}
    if model.get("type") == "Unigram":
        hidden = secrets.token_hex(16)
        pieces = [[f"{piece}\0{hidden}" if piece in markers else piece, score] for piece, score in model["vocab"]]
        model = {**model, "vocab": pieces}
        added = [token for token in added if token["content"] not in markers or token["id"] >= len(pieces)]
    return {**definition, "added_tokens": added, "model": model}


def is_marker(added: Mapping[str, Any]) -> bool:
    """Whether an added token marks structure. ``<think>`` does, although it is not flagged as special."""
    return bool(added.get("special")) or re.fullmatch(r"<[^\s<>]+>|\[[A-Z_]+\]", added["content"]) is not None


def require_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DanluError(
            f"text: character {error.start} is a lone surrogate (U+{code:04X}), which is not Unicode text; "
            "repair the text, or pass bytes to encode_bytes"
        ) from None
