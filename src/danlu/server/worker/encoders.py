"""Models that write nothing, in the process that serves them: texts to vectors, and pairs of texts to scores."""

from __future__ import annotations

import base64
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu import files
from danlu.errors import DanluError
from danlu.models.embedder import Embedder
from danlu.models.heads import RewardModel
from danlu.models.load import load_model
from danlu.models.sentence_folder import MODULES, PROMPTS
from danlu.tokenizer.tokenizer import Tokenizer

BATCH_TOKENS: Final = 4096
"""Tokens, padding included, that are read at once: some 100 MB of activations in a model of 384 numbers a token."""

WHOLE: Final = -1
"""As `truncate`: cut to what the model reads."""

Row = tuple[list[int], list[int]]
"""Ids and types of one text or pair."""

ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "torch.nn.modules.activation.Sigmoid": torch.sigmoid,
    "torch.nn.modules.linear.Identity": lambda logits: logits,
}
"""What sentence-transformers makes of a cross-encoder's logit."""


class EncoderModel(ABC):
    """A model that reads whole texts at once.

    Attributes:
        kind: "embed": texts to vectors; "rank": pairs of texts to scores.
        max_length: tokens of a text, special tokens included, that it reads.
    """

    kind: Literal["embed", "rank"]
    tokenizer: Tokenizer
    max_length: int

    @abstractmethod
    def info(self) -> dict[str, int]:
        """What a ModelInfo tells of it: context, vocab_size and dim."""

    def embed(self, inputs: Sequence[str | list[int]], truncate: int | None = None) -> tuple[Tensor, int]:
        """Vectors of length 1 of texts or token ids, (n, dim) fp32 in their order, and how many tokens were read.

        Args:
            truncate: so many tokens of each, special tokens included, are read; -1: as many as the model can. None:
                longer ones are refused.

        Raises:
            DanluError: an input is empty, too long or not of this model's vocabulary; its number is in the message.
        """
        raise DanluError("model: this one compares pairs of texts and has no embeddings; name an embedding model")

    @abstractmethod
    def similarity(self, pairs: Sequence[tuple[str, str]], truncate: int | None = None) -> tuple[list[float], int]:
        """How well the texts of each pair go together, the higher the better, and how many tokens were read.

        Args:
            truncate: as of :meth:`embed`.

        Raises:
            DanluError: a pair is too long; its number is in the message.
        """

    def tokenize(self, text: str, special_tokens: bool) -> list[int]:
        """Ids of a text, with the special tokens of the family round it or without."""
        return self.tokenizer.encode_for_encoder(text)[0] if special_tokens else self.tokenizer.encode(text)

    def _limit(self, truncate: int | None) -> int | None:
        return self.max_length if truncate == WHOLE else truncate and min(truncate, self.max_length)

    def _require_readable(self, rows: Sequence[Row], names: Sequence[str]) -> None:
        """Refuse rows without tokens, and those that are too long."""
        for name, (ids, _) in zip(names, rows, strict=True):
            if not ids:
                raise DanluError(f"{name}: has no tokens; give a text that is not empty")
            if len(ids) > self.max_length:
                raise DanluError(
                    f"{name}: has {len(ids)} tokens and the model reads {self.max_length}; shorten it, or set "
                    "truncate_prompt_tokens to -1, which leaves away the rest"
                )


class EmbeddingModel(EncoderModel):
    """An embedder; pairs are compared by the cosine of their vectors."""

    kind = "embed"

    def __init__(self, embedder: Embedder) -> None:
        self.embedder, self.tokenizer, self.max_length = embedder, embedder.tokenizer, embedder.max_length

    def info(self) -> dict[str, int]:
        vocab_size = self.embedder.stack.config.vocab_size
        return {"context": self.max_length, "vocab_size": vocab_size, "dim": self.embedder.dim}

    def embed(self, inputs: Sequence[str | list[int]], truncate: int | None = None) -> tuple[Tensor, int]:
        return self._vectors(inputs, [f"input.{number}" for number in range(len(inputs))], truncate)

    def tokenize(self, text: str, special_tokens: bool) -> list[int]:
        if special_tokens:
            return self.embedder.tokenize(text, max_length=sys.maxsize)[0]
        return super().tokenize(text, special_tokens)

    def similarity(self, pairs: Sequence[tuple[str, str]], truncate: int | None = None) -> tuple[list[float], int]:
        texts, places, names = texts_of(pairs)
        vectors_nd, n_tokens = self._vectors(texts, names, truncate)
        return cosines(vectors_nd, places), n_tokens

    def _vectors(
        self, inputs: Sequence[str | list[int]], names: Sequence[str], truncate: int | None
    ) -> tuple[Tensor, int]:
        limit = self._limit(truncate)
        rows = [self._row(one, name, limit) for one, name in zip(inputs, names, strict=True)]
        self._require_readable(rows, names)
        vectors_nd = torch.empty(len(rows), self.embedder.dim)
        with torch.inference_mode():
            for chosen in batches([len(ids) for ids, _ in rows]):
                batch = self.embedder.collate([rows[i] for i in chosen])
                vectors_nd[chosen] = self.embedder(*batch).cpu()
        return F.normalize(vectors_nd, dim=-1), sum(len(ids) for ids, _ in rows)

    def _row(self, one: str | list[int], name: str, limit: int | None) -> Row:
        if isinstance(one, str):
            return self.embedder.tokenize(one, max_length=limit or sys.maxsize)
        vocab_size = self.embedder.stack.config.vocab_size
        if any(not 0 <= token_id < vocab_size for token_id in one):
            raise DanluError(f"{name}: has token ids outside the model's vocabulary of {vocab_size}; use its tokenizer")
        ids = one[:limit]
        return ids, [0] * len(ids)


class RankingModel(EncoderModel):
    """A cross-encoder: it reads both texts of a pair at once (Nogueira & Cho 2019, arXiv:1901.04085).

    Args:
        activation: what makes a score of a logit.
    """

    kind = "rank"

    def __init__(self, model: RewardModel, tokenizer: Tokenizer, activation: Callable[[Tensor], Tensor]) -> None:
        self.model, self.tokenizer, self.activation = model, tokenizer, activation
        longest = tokenizer.config.get("model_max_length")
        self.max_length = min(model.config.context, longest if isinstance(longest, int) else model.config.context)

    def info(self) -> dict[str, int]:
        config = self.model.config
        return {"context": self.max_length, "vocab_size": config.vocab_size, "dim": config.dim}

    def similarity(self, pairs: Sequence[tuple[str, str]], truncate: int | None = None) -> tuple[list[float], int]:
        limit = self._limit(truncate)
        rows = [self.tokenizer.encode_for_encoder(first, second, limit) for first, second in pairs]
        self._require_readable(rows, [f"pair.{number}" for number in range(len(rows))])
        scores_n = torch.empty(len(rows))
        with torch.inference_mode():
            for chosen in batches([len(ids) for ids, _ in rows]):
                scores_n[chosen] = self.activation(self.model.score(*self._collate([rows[i] for i in chosen]))).cpu()
        return scores_n.tolist(), sum(len(ids) for ids, _ in rows)

    def _collate(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        width = max(len(ids) for ids, _ in rows)
        ids_bt = torch.tensor([ids + [self.tokenizer.pad_id] * (width - len(ids)) for ids, _ in rows])
        types_bt = torch.tensor([types + [0] * (width - len(types)) for _, types in rows])
        lengths = torch.tensor([len(ids) for ids, _ in rows])
        real_bt = None if int(lengths.min()) == width else torch.arange(width) < lengths[:, None]
        return ids_bt, real_bt, types_bt


def open_encoder(path: Path) -> EncoderModel | None:
    """The embedder or cross-encoder of a folder; None where it holds a model that writes, or none at all.

    Raises:
        DanluError: it is one, and cannot be opened.
    """
    if not (path / "config.json").is_file():
        return EmbeddingModel(Embedder.load(path)) if (path / MODULES).is_file() else None
    content = files.read_json(path / "config.json")
    architectures = content.get("architectures") if isinstance(content, dict) else None
    if any(str(name).endswith("ForSequenceClassification") for name in architectures or ()):
        return RankingModel(load_model(path, RewardModel), Tokenizer.load(path), _activation(path, content))
    return EmbeddingModel(Embedder.load(path)) if (path / MODULES).is_file() else None


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indexes of rows to read together: of like length, the longest first, none with more than `BATCH_TOKENS` tokens
    unless it is a single row."""
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while longest_first:
        n = max(1, BATCH_TOKENS // lengths[longest_first[0]])
        yield longest_first[:n]
        del longest_first[:n]


def texts_of(pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[tuple[int, int]], list[str]]:
    """Pairs as the texts in them, each once; where those of each pair stand; and for messages, the first pair that has
    each text, as pair.0."""
    places: dict[str, int] = {}
    names: list[str] = []
    for number, pair in enumerate(pairs):
        for text in pair:
            if text not in places:
                places[text] = len(places)
                names.append(f"pair.{number}")
    return list(places), [(places[first], places[second]) for first, second in pairs], names


def cosines(vectors_nd: Tensor, places: Sequence[tuple[int, int]]) -> list[float]:
    """Inner products of vectors of length 1."""
    first_p, second_p = torch.tensor(places).T
    found: list[float] = (vectors_nd[first_p] * vectors_nd[second_p]).sum(dim=-1).tolist()
    return found


def pack_vectors(vectors_nd: Tensor, dimensions: int | None) -> list[str]:
    """Vectors in base64, as 32-bit floats with the lowest byte first.

    Args:
        dimensions: keep the first ones, and bring what is left to length 1 (Matryoshka embeddings, arXiv:2205.13147).
    """
    if dimensions is not None:
        vectors_nd = F.normalize(vectors_nd[:, :dimensions], dim=-1)
    return [base64.b64encode(row).decode() for row in vectors_nd.cpu().numpy().astype("<f4")]


def _activation(path: Path, content: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """As sentence-transformers has it: in a file of its own, formerly in config.json; else a sigmoid."""
    own = files.read_json(path / PROMPTS) if (path / PROMPTS).is_file() else {}
    inner = content.get("sentence_transformers")
    if own.get("default_prompt_name") is not None:
        raise DanluError(f"{path / PROMPTS}: puts a prompt in front of pairs, which is not supported")
    name = (
        own.get("activation_fn")
        or (isinstance(inner, dict) and inner.get("activation_fn"))
        or content.get("sbert_ce_default_activation_function")
        or "torch.nn.modules.activation.Sigmoid"
    )
    if name not in ACTIVATIONS:
        raise DanluError(f"{path}: makes scores with {name}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
