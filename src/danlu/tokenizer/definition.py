"""What the readers of other formats share: they all end in a definition, the content of a ``tokenizer.json``.

A definition holds the vocabulary and the whole path of a text through it (normaliser, pre-tokenizer, model,
post-processor, decoder), so that danlu, transformers and whoever else reads ``tokenizer.json`` give the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from danlu import files
from danlu.errors import DanluError

Definition = dict[str, Any]
Config = dict[str, Any]

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"  # where newer transformers keep the template

BLANK = "\u2581"  # SentencePiece writes a space as this
MAX_BYTES = 256 << 20  # of a vocabulary file; the largest known vocabularies take 35 MB

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
"""Keys of ``tokenizer_config.json`` that name the token of a role."""


def read_small(path: Path) -> bytes:
    """Content of a vocabulary file, which comes from outside and so is not read when it is absurdly large."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise DanluError(f"{path}: has {size} bytes, more than a vocabulary takes; is it another kind of file?")
        return path.read_bytes()
    except OSError as error:
        raise DanluError(f"{path}: cannot be read ({error.strerror})") from error


def read_small_text(path: Path) -> str:
    """Like :func:`read_small`, for UTF-8 text."""
    try:
        return read_small(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DanluError(f"{path}: is not UTF-8 text (byte {error.start})") from error


def text_of(token: Any) -> str | None:
    """A special token's text, as configs write it: plain or as an object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def added(content: str, special: bool, normalized: bool = False) -> AddedToken:
    """A token that is found in the text before the model sees it."""
    return AddedToken(content, special=special, normalized=normalized, single_word=False, lstrip=False, rstrip=False)


def around(
    backend: tokenizers.Tokenizer, before: str | None, after: str | None, between: Iterable[str] = ()
) -> processors.PostProcessor:
    """The post-processor ``before A after``, and of pairs ``before A after between B after``.

    BERT's second text has the type 1 (``between`` is empty there); RoBERTa and the rest have one type.
    """
    between = list(between)
    second = 1 if before is not None and after is not None and not between else 0
    head = [f"{before}:0"] if before is not None else []
    tail = [f"{after}:0"] if after is not None else []
    tail_of_pair = [f"{after}:{second}"] if after is not None else []
    names = {name for name in (before, after, *between) if name is not None}
    return processors.TemplateProcessing(
        single=[*head, "$A:0", *tail],
        pair=[*head, "$A:0", *tail, *(f"{token}:0" for token in between), f"$B:{second}", *tail_of_pair],
        special_tokens=[(name, backend.token_to_id(name)) for name in sorted(names)],
    )


def finished(backend: tokenizers.Tokenizer) -> Definition:
    """The definition of a tokenizer that was put together."""
    content = json.loads(backend.to_str())
    assert isinstance(content, dict)
    return content


def add_later_tokens(backend: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any]) -> int:
    """Add the tokens that were added to a vocabulary later, at the ids their files give them; returns their number.

    Raises:
        DanluError: the files are broken, an id is taken by another token, or would leave a hole.
    """
    later = _later_tokens(folder, config)
    backend.add_tokens([token for _, token in sorted(later.items())])
    for i, token in later.items():
        found = backend.token_to_id(token.content)
        if found != i:
            raise DanluError(
                f"{folder}: the added token {token.content!r} is said to have the id {i}, but would get {found}; "
                "the files belong to different tokenizers"
            )
    return len(later)


def _later_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    later: dict[int, AddedToken] = {}
    if (path := folder / "added_tokens.json").is_file():
        for content, i in files.read_json_object(path).items():
            if not isinstance(i, int):
                raise DanluError(f"{path}: must hold an object of token and id")
            later[i] = added(content, special=True)
    decoder = config.get("added_tokens_decoder")
    for i, token in decoder.items() if isinstance(decoder, Mapping) else ():
        text = text_of(token)
        if text is None or not str(i).isdigit():
            raise DanluError(f"{folder / CONFIG}: added_tokens_decoder must hold an object of id and token")
        later[int(i)] = added(text, special=bool(token.get("special")) if isinstance(token, Mapping) else True)
    return later
