"""SentencePiece models (Kudo and Richardson 2018, arXiv:1808.06226): ``tokenizer.model`` and ``spiece.model``.

A model is BPE or unigram, with scores instead of merges. BPE merges the two neighbours whose union has the best score,
which is what a list of merges sorted by score does; every way to cut a piece into two pieces is a merge. Where two
different pieces share a score, SentencePiece takes the one further left and the list the one that stands first; trained
models have no such pieces.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from danlu.errors import DanluError, MissingExtra
from danlu.tokenizer.definition import BLANK, Config, added, read_small

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces, in GGUF files too

# A unigram model would take the text <0x41> for the piece of that byte, so such text is cut behind its first character.
BYTES_WRITTEN_OUT = pre_tokenizers.Split(Regex("(?<=<)(?=0x[0-9A-F]{2}>)"), "isolated")


def read_sentencepiece(path: Path) -> tuple[tokenizers.Tokenizer, Config]:
    """A SentencePiece model as a tokenizer without a post-processor, and the special tokens it names.

    Raises:
        DanluError: the file is no SentencePiece model, or uses what cannot be honoured.
        MissingExtra: the package ``sentencepiece`` or ``protobuf`` is not installed.
    """
    model = _parse(path)
    kinds = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
    kind = kinds.get(model.trainer_spec.model_type, "unknown")
    if kind not in ("unigram", "bpe"):
        raise DanluError(f"{path}: is a SentencePiece model of the kind {kind!r}; only bpe and unigram can be read")
    if model.trainer_spec.treat_whitespace_as_suffix:
        raise DanluError(f"{path}: has treat_whitespace_as_suffix, which cannot be honoured")
    if not model.normalizer_spec.escape_whitespaces:
        raise DanluError(f"{path}: is without escape_whitespaces, which cannot be honoured")
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    ids = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    if len(ids) < len(pieces):
        raise DanluError(f"{path}: holds a piece twice; the file is broken")
    unknown = next((piece for piece, _, type_ in pieces if type_ == UNKNOWN), None)
    if unknown is None:
        raise DanluError(f"{path}: has no unknown piece; the file is broken")
    if kind == "bpe" and any(type_ == UNUSED for _, _, type_ in pieces):
        raise DanluError(f"{path}: is a BPE model with unused pieces, which cannot be honoured")

    byte_fallback = any(type_ == BYTE for _, _, type_ in pieces)
    backend = tokenizers.Tokenizer(
        bpe_model({p: s for p, s, _ in pieces}, {p: t for p, _, t in pieces}, unknown, byte_fallback)
        if kind == "bpe"
        else unigram_model(pieces, ids[unknown], byte_fallback)
    )
    own = [piece for piece, _, type_ in pieces if type_ == USER_DEFINED]
    spec = model.normalizer_spec
    backend.normalizer = _normalizer(spec, own)
    if kind == "unigram" and byte_fallback:
        backend.pre_tokenizer = BYTES_WRITTEN_OUT
    backend.decoder = decoder(strip_blank=spec.add_dummy_prefix)
    # Own symbols are found in the normalised text, as SentencePiece does it; control pieces are no part of a text.
    backend.add_tokens([added(piece, special=False, normalized=True) for piece in own])
    backend.add_tokens([added(p, special=True) for p, _, type_ in pieces if type_ in (CONTROL, UNKNOWN)])

    config: Config = {"unk_token": unknown}
    for role in ("bos", "eos", "pad"):
        i = getattr(model.trainer_spec, f"{role}_id")
        if 0 <= i < len(pieces) and pieces[i][2] == CONTROL:
            config[f"{role}_token"] = pieces[i][0]
    return backend, config


def bpe_model(
    scores: Mapping[str, float], types: Mapping[str, int], unknown: str | None, byte_fallback: bool
) -> models.BPE:
    """BPE by scores; ids follow the order of ``scores``. Only normal pieces are merged into and from."""
    mergeable = {piece: score for piece, score in scores.items() if types[piece] in (NORMAL, USER_DEFINED)}
    return models.BPE(
        vocab={piece: i for i, piece in enumerate(scores)},
        merges=merges_of(mergeable, {piece for piece in mergeable if types[piece] == NORMAL}),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=byte_fallback,
    )


def merges_of(scores: Mapping[str, float], results: set[str]) -> list[tuple[str, str]]:
    """Every way to put a piece of ``results`` together from two pieces, best score first."""
    found = [
        (scores[piece], piece[:cut], piece[cut:])
        for piece in scores
        if piece in results
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)  # as transformers sorts them
    return [(left, right) for _, left, right in found]


def unigram_model(pieces: list[tuple[str, float, int]], unknown_id: int, byte_fallback: bool) -> models.Unigram:
    """Unigram (Kudo 2018, arXiv:1804.10959); ids follow the order of ``pieces``."""
    worst = min((score for _, score, type_ in pieces if type_ == NORMAL), default=0.0)
    # Any other way to write the text of an unused piece has a better score. A byte piece's score must not count: that
    # of an unknown character is the worst of all less 10.
    scores = {BYTE: worst, UNUSED: worst * 64 - 100}
    return models.Unigram(
        [(piece, scores.get(type_, score)) for piece, score, type_ in pieces],
        unk_id=unknown_id,
        byte_fallback=byte_fallback,
    )


def decoder(strip_blank: bool) -> decoders.Decoder:
    """Pieces to text; ``strip_blank`` takes away the space that was put in front."""
    steps = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip_blank else steps)


def spaces(charsmap: bytes, remove_extra: bool, prefix: normalizers.Normalizer | None) -> normalizers.Normalizer:
    """SentencePiece's normaliser: its map of characters, then its ways with spaces."""
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if remove_extra:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [prefix] if prefix is not None else []
    steps.append(normalizers.Replace(" ", BLANK))
    if remove_extra:  # at the end even those that were written as U+2581
        steps.append(normalizers.Replace(Regex(rf"{BLANK}+\z"), ""))
    return normalizers.Sequence(steps)


def _normalizer(spec: Any, own: list[str]) -> normalizers.Normalizer:
    prefix: normalizers.Normalizer | None = None
    if spec.add_dummy_prefix and own:
        # Own symbols pass through the normaliser too, one by one, when the tokenizer is built: they get no prefix.
        longest_first = sorted(own, key=len, reverse=True)
        prefix = normalizers.Replace(Regex(rf"\A(?!(?:{'|'.join(map(re.escape, longest_first))})\z)"), BLANK)
    elif spec.add_dummy_prefix:
        prefix = normalizers.Prepend(BLANK)
    try:
        return spaces(spec.precompiled_charsmap, spec.remove_extra_whitespaces, prefix)
    except Exception as error:  # the library raises nothing narrower
        raise DanluError(f"SentencePiece model: its precompiled_charsmap is broken ({error})") from error


def _parse(path: Path) -> Any:
    content = read_small(path)
    try:
        protobuf: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError as error:
        package = "protobuf" if (error.name or "").startswith("google") else "sentencepiece"
        raise MissingExtra(package, "sentencepiece", f"{path}: reading a SentencePiece model") from error
    model = protobuf.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as error:  # protobuf's own DecodeError
        raise DanluError(f"{path}: is not a SentencePiece model ({error})") from error
    if not model.pieces:
        raise DanluError(f"{path}: is not a SentencePiece model (it holds no pieces)")
    return model
