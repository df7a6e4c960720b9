"""Labels of texts and tags of words, with their probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from danlu.data.padded import Example, batches_by_length
from danlu.errors import DanluError
from danlu.models.heads import SequenceClassifier, TokenClassifier

if TYPE_CHECKING:
    from danlu.tokenizer.tokenizer import Tokenizer

Progress = Callable[[int], None]
Tagged = list[tuple[str, float]]
"""The tag of each word, and its probability."""


def encode_text(
    tokenizer: Tokenizer, text: str, pair: str | None, max_length: int
) -> tuple[list[int], list[int], bool]:
    """Ids and types of a text or a pair, with the family's special tokens, and whether it had to be cut.

    Raises:
        DanluError: it has no tokens at all.
    """
    ids, types = tokenizer.encode_for_encoder(text, pair)
    is_cut = len(ids) > max_length
    if is_cut:
        ids, types = tokenizer.encode_for_encoder(text, pair, max_length)
    if not ids:
        raise DanluError("the text has no tokens")
    return ids, types, is_cut


def encode_pieces(
    tokenizer: Tokenizer, words: Sequence[str], max_length: int
) -> Iterator[tuple[list[int], list[int | None]]]:
    """Words in pieces of at most ``max_length`` tokens: ids, and at the first token of each word its index (None at
    all others). Words are not cut, but for one that does not fit alone; one without any token is in no piece.

    Raises:
        DanluError: ``max_length`` has no room for a word.
    """
    start = 0
    while start < len(words):
        ids, owners = tokenizer.encode_words(words[start:], max_length)
        seen = [owner for owner in owners if owner is not None]
        if not seen:
            if tokenizer.encode_words(words[start:])[0] != ids:
                raise DanluError(f"there is no room for a word in {max_length} tokens")
            return
        end = start + seen[-1] + 1
        if end < len(words) and seen[-1] != seen[0]:  # the last word may be cut: leave it to the next piece
            end -= 1
            ids, owners = tokenizer.encode_words(words[start:end], max_length)
        firsts: list[int | None] = []
        before: int | None = None
        for owner in owners:
            firsts.append(start + owner if owner is not None and owner != before else None)
            before = owner if owner is not None else before
        yield ids, firsts
        start = end


@torch.inference_mode()
def predict(
    model: SequenceClassifier, examples: Sequence[Example], pad_id: int, *, batch_size: int = 32,
    progress: Progress | None = None,
) -> npt.NDArray[np.float32]:  # fmt: skip
    """(rows, labels) probabilities of encoded texts; of a regression, its numbers."""
    found = np.empty((len(examples), len(model.labels)), dtype=np.float32)
    for places, batch in batches_by_length(examples, batch_size, pad_id):
        here = batch.to(model.device)
        found[places] = model.probabilities(model(here.ids, _real(here.real), here.types)).cpu().numpy()
        if progress is not None:
            progress(len(places))
    return found


def classify_texts(
    model: SequenceClassifier,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    pairs: Sequence[str | None] | None = None,
    *,
    max_length: int | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> npt.NDArray[np.float32]:
    """Probabilities of each label of ``model.labels``, (texts, labels); of a regression, its numbers, (texts, 1).

    Args:
        pairs: second texts, for models of pairs.
        max_length: texts are cut to so many tokens; default: the model's context.

    Raises:
        DanluError: a text has no tokens.
    """
    longest = min(max_length or model.config.context, model.config.context)
    examples = []
    for text, pair in zip(texts, pairs or [None] * len(texts), strict=True):
        ids, types, _ = encode_text(tokenizer, text, pair, longest)
        examples.append(Example(ids, 0, types))
    return predict(model, examples, tokenizer.pad_id, batch_size=batch_size, progress=progress)


@torch.inference_mode()
def tag_words(
    model: TokenClassifier,
    tokenizer: Tokenizer,
    sentences: Sequence[Sequence[str]],
    *,
    max_length: int | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[Tagged]:
    """The likeliest tag of each word of each sentence, by the word's first token.

    A sentence that is too long for the model is read in pieces. A word without tokens has the tag ``O``, or the first
    of the model's where there is no ``O``, with probability 0.
    """
    longest = min(max_length or model.config.context, model.config.context)
    nothing = "O" if "O" in model.labels else model.labels[0]
    found: list[Tagged] = [[(nothing, 0.0)] * len(words) for words in sentences]
    pieces = [
        (sentence, Example(ids, [0] * len(ids)), firsts)
        for sentence, words in enumerate(sentences)
        for ids, firsts in encode_pieces(tokenizer, words, longest)
    ]
    for places, batch in batches_by_length([example for _, example, _ in pieces], batch_size, tokenizer.pad_id):
        here = batch.to(model.device)
        best = model(here.ids, _real(here.real)).softmax(dim=-1).max(dim=-1)
        for row, place in enumerate(places):
            sentence, _, firsts = pieces[place]
            tags, probabilities = best.indices[row].tolist(), best.values[row].tolist()
            for at, word in enumerate(firsts):
                if word is not None:
                    found[sentence][word] = (model.labels[tags[at]], probabilities[at])
        if progress is not None:
            progress(len(places))
    return found


def _real(real_bt: Tensor) -> Tensor | None:
    """None where no row is padded: plain attention is faster."""
    return None if bool(real_bt.all()) else real_bt
