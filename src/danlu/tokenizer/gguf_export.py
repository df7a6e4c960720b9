"""Tokenizers as GGUF metadata, for llama.cpp: the way back of :mod:`danlu.tokenizer.gguf`.

llama.cpp knows ways to cut text by name and ways to merge by formula. What it would cut or merge otherwise than the
tokenizer does is refused by name, since a model that reads other tokens than it was trained on fails silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from danlu.errors import DanluError
from danlu.tokenizer.definition import BLANK, text_of
from danlu.tokenizer.gguf import ID_KEYS, PREFIX, TEMPLATE
from danlu.tokenizer.pre_tokens import EQUIVALENT, GPT2, PRE_TOKENS
from danlu.tokenizer.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, merges_of
from danlu.tokenizer.special import IM_END
from danlu.tokenizer.tokenizer import Tokenizer

UNREACHED = -1e6  # score of what no merge makes


def tokenizer_to_gguf(tokenizer: Tokenizer) -> dict[str, Any]:
    """The metadata, key -> value, of byte-level BPE and of BPE in the manner of SentencePiece (Llama 2, Gemma).

    Raises:
        DanluError: llama.cpp has no tokenizer that gives the same ids.
    """
    definition, config = tokenizer.definition, tokenizer.config
    model = definition["model"]
    if model.get("type") != "BPE":
        raise _refused(tokenizer, f"its model is {model.get('type')}")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise _refused(tokenizer, f"it has {option}")
    merges = [tuple(merge if isinstance(merge, list) else merge.split(" ")) for merge in model["merges"]]
    tokens, types = _tokens_and_types(tokenizer)
    metadata: dict[str, Any] = (
        _byte_level(tokenizer, merges)
        if tokenizer.kind == "byte-level"
        else _sentencepiece(tokenizer, merges, tokens, types)
    )
    metadata |= {PREFIX + "tokens": tokens, PREFIX + "token_type": types}
    ends_of_turn = (text_of(config.get("eot_token")), IM_END, "<|eot_id|>", "<end_of_turn>", "<|end|>")
    vocab = {token: i for i, token in enumerate(tokens)}
    roles = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "eot_token": next((vocab[token] for token in ends_of_turn if token in vocab), None),
        "unk_token": tokenizer.unk_id,
        "pad_token": tokenizer.pad_id,
        "sep_token": tokenizer.sep_id,
        "cls_token": tokenizer.cls_id,
        "mask_token": tokenizer.mask_id,
    }
    metadata |= {PREFIX + ID_KEYS[role]: i for role, i in roles.items() if i is not None}
    metadata |= {PREFIX + "add_bos_token": tokenizer.add_bos, PREFIX + "add_eos_token": tokenizer.add_eos}
    if (template := config.get("chat_template")) is not None:
        metadata[TEMPLATE] = template
    return metadata


def _refused(tokenizer: Tokenizer, why: str) -> DanluError:
    return DanluError(
        f"{tokenizer.where}: cannot be exported to GGUF with the same ids: {why}, which llama.cpp does not know"
    )


def _tokens_and_types(tokenizer: Tokenizer) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{i}]" for i in range(tokenizer.vocab_size)]  # ids that the vocabulary leaves out
    types = [UNUSED] * tokenizer.vocab_size
    byte_fallback = tokenizer.definition["model"].get("byte_fallback")
    for token, i in tokenizer.definition["model"]["vocab"].items():
        is_byte = byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[i], types[i] = token, BYTE if is_byte else NORMAL
    for token in tokenizer.definition.get("added_tokens") or []:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise _refused(tokenizer, f"its token {token['content']!r} takes the spaces around it or whole words only")
        tokens[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    if tokenizer.unk_id is not None and tokenizer.kind == "sentencepiece":
        types[tokenizer.unk_id] = UNKNOWN
    return tokens, types


def _byte_level(tokenizer: Tokenizer, merges: list[tuple[str, ...]]) -> dict[str, Any]:
    definition = tokenizer.definition
    normalizer = definition.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":  # Qwen's; llama.cpp expects NFC text
        raise _refused(tokenizer, f"its normaliser is {normalizer.get('type')}")
    patterns = _patterns(definition.get("pre_tokenizer"))
    if patterns is None:
        raise _refused(tokenizer, "its way to cut text is of another kind")
    wanted = (
        tuple(EQUIVALENT.get(pattern, pattern) for pattern in patterns),
        bool(definition["model"].get("ignore_merges")),
    )
    name = next((name for name, pre in PRE_TOKENS.items() if (pre.patterns, pre.ignore_merges) == wanted), None)
    if name is None:
        raise _refused(tokenizer, f"it cuts text by the pattern {' , '.join(patterns)!r:.200}")
    return {
        PREFIX + "model": "gpt2",
        PREFIX + "pre": name,
        PREFIX + "merges": [" ".join(merge) for merge in merges],
    }


def _patterns(pre_tokenizer: Mapping[str, Any] | None) -> list[str] | None:
    """Patterns of a sequence of cuts that ends in the alphabet of bytes; ``None`` for any other."""
    steps = [pre_tokenizer or {}]
    if steps[0].get("type") == "Sequence":
        steps = list(steps[0]["pretokenizers"])
    patterns: list[str] = []
    for number, step in enumerate(steps, 1):
        is_last = number == len(steps)
        if step.get("type") == "ByteLevel" and is_last and not step.get("add_prefix_space"):
            return [*patterns, GPT2] if step.get("use_regex", True) else patterns
        if step.get("type") == "Digits" and step.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append(step["pattern"].get("Regex", ""))
        else:
            return None
    return None


def _sentencepiece(
    tokenizer: Tokenizer, merges: list[tuple[str, ...]], tokens: list[str], types: list[int]
) -> dict[str, Any]:
    definition = tokenizer.definition
    if not definition["model"].get("byte_fallback"):
        raise _refused(tokenizer, "it writes unknown characters as one token")
    if definition["model"].get("ignore_merges"):
        raise _refused(tokenizer, "it ignores merges")
    prefix = _space_prefix(definition.get("normalizer"), definition.get("pre_tokenizer"))
    if prefix is None:
        raise _refused(tokenizer, "its way with spaces is of another kind")
    rank = _ranks(merges)
    scores = {token: -float(rank[token]) if token in rank else UNREACHED for token in tokens}
    kinds = dict(zip(tokens, types, strict=True))
    halves = {token: scores[token] for token in tokens if kinds[token] in (NORMAL, USER_DEFINED)}
    results = {token for token in tokens if kinds[token] == NORMAL}
    reached = {merge for merge in merges if "".join(merge) in results}  # other tokens are found before any merge
    if set(merges_of(halves, results)) != reached:  # llama.cpp takes every pair whose union is a piece
        raise _refused(tokenizer, "it does not merge every pair of pieces whose union is a piece")
    return {
        PREFIX + "model": "llama",
        PREFIX + "pre": "default",
        PREFIX + "scores": [scores[token] for token in tokens],
        PREFIX + "add_space_prefix": prefix,
    }


def _ranks(merges: Sequence[tuple[str, ...]]) -> dict[str, int]:
    """Rank of each piece that is merged: that of its merges, which stand together. Pieces between whose merges those of
    others stand share a rank, as pieces of one score do: Llama 2 has 15 such, its runs of spaces."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for i, merge in enumerate(merges):
        piece = "".join(merge)
        first.setdefault(piece, i)
        last[piece] = i
    ranks: dict[str, int] = {}
    rank, end = -1, -1
    for piece, begin in first.items():
        if begin > end:
            rank += 1
        ranks[piece], end = rank, max(end, last[piece])
    return ranks


def _space_prefix(normalizer: Mapping[str, Any] | None, pre_tokenizer: Mapping[str, Any] | None) -> bool | None:
    """Whether a space is put in front of the text; ``None``: spaces are handled in some other way."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    steps = list((normalizer or {}).get("normalizers", [normalizer] if normalizer else []))
    whole = pre_tokenizer is None or (
        pre_tokenizer.get("type") == "Split" and pre_tokenizer.get("pattern") == {"String": " "}
    )  # no space is left to cut at
    if steps == [replace] and whole:
        return False
    if steps == [{"type": "Prepend", "prepend": BLANK}, replace] and whole:
        return True
    metaspace = {"type": "Metaspace", "replacement": BLANK, "split": False}
    if not steps and pre_tokenizer is not None and pre_tokenizer.items() >= metaspace.items():
        return pre_tokenizer.get("prepend_scheme") != "never"
    return None
