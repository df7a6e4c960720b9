"""Texts to vectors whose nearness is nearness of meaning (Sentence-BERT, Reimers & Gurevych 2019, arXiv:1908.10084)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.errors import DanluError
from danlu.models.load import load_model, save_model
from danlu.models.sentence_folder import (
    ACTIVATIONS,
    DenseSettings,
    SentenceSettings,
    dense_weights,
    read_settings,
    write_settings,
)
from danlu.models.transformer import Transformer
from danlu.nn.linear import Linear
from danlu.nn.pooling import Pool, pool
from danlu.tokenizer.tokenizer import Tokenizer


class Embedder(nn.Module):
    """A stack, an encoder or a decoder, whose hidden states are pooled into one vector for each text.

    What happens to a text: its prompt is put in front, it is cut to ``max_length`` tokens, special tokens included, the
    stack reads it, its states are pooled, and the vector goes through ``steps``.

    Args:
        stack: the model.
        tokenizer: the one it was trained with.
        settings: pooling, length, prompts and steps; the folder of an embedder has them.

    Raises:
        DanluError: the tokenizer has tokens that the model does not know.

    Attributes:
        dim: length of the vectors.
    """

    def __init__(self, stack: Transformer, tokenizer: Tokenizer, settings: SentenceSettings) -> None:
        super().__init__()
        if tokenizer.vocab_size > stack.config.vocab_size:
            raise DanluError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model knows {stack.config.vocab_size}; "
                "they do not belong together"
            )
        self.stack, self.tokenizer, self.settings = stack, tokenizer, settings
        self.max_length = min(settings.max_length or stack.config.context, stack.config.context)
        self.steps = nn.ModuleList(Normalize() if step is None else Dense(step) for step in settings.steps)
        widths = [step.n_out for step in settings.steps if step is not None]
        self.dim = widths[-1] if widths else stack.config.dim

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        pooling: Pool | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = torch.float32,
    ) -> Embedder:
        """Open a folder in the layout of sentence-transformers, or any model folder as a new embedder.

        Args:
            pooling: for a model that is no embedder yet; its vectors are normalised.
            dtype: of the weights; None keeps the stored one.

        Raises:
            DanluError: not an embedder, or one with a part that is not known; errors of :func:`load_model`.
        """
        path = Path(path)
        if not (path / "modules.json").is_file():
            if pooling is None:
                raise DanluError(f"{path}: is no embedder (no modules.json); to make one of it, choose how to pool")
            settings, folder = SentenceSettings(pooling, steps=(None,)), path
        elif pooling is not None:
            raise DanluError(f"{path}: is an embedder already, with a pooling of its own; leave out the one given")
        else:
            settings, folder = read_settings(path)
        stack = load_model(folder, Transformer, device=device, dtype=dtype)
        if settings.dim not in (None, stack.config.dim):
            raise DanluError(f"{path}: pools vectors of {settings.dim} numbers; the model's have {stack.config.dim}")
        embedder = cls(stack, Tokenizer.load(folder), settings)
        for step, source in zip(embedder.steps, settings.steps, strict=True):
            if isinstance(step, Dense) and source is not None:
                step.load(dense_weights(path, source), dtype)
        return embedder.to(device).eval()

    def save(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write a folder that sentence-transformers opens; the model's weights come last."""
        weights = [step.tensors(dtype) if isinstance(step, Dense) else None for step in self.steps]
        write_settings(self.settings, Path(folder), self.stack.config.dim, self.max_length, weights)
        save_model(self.stack, folder, self.tokenizer, dtype=dtype)

    def forward(self, ids_bt: Tensor, real_bt: Tensor | None = None, types_bt: Tensor | None = None) -> Tensor:
        """Vectors of tokenised texts, (batch, dim), fp32.

        Args:
            real_bt: False for padding; put it on the right, which no family minds.
            types_bt: sentence numbers, for stacks that have them.
        """
        x = self.stack.hidden_states(ids_bt, real_bt=real_bt, types_bt=types_bt)
        x = pool(x, real_bt, self.settings.pooling).float()
        for step in self.steps:
            x = step(x)
        return x

    def encode(
        self, texts: Sequence[str], batch_size: int = 32, *, prompt_name: str | None = None
    ) -> npt.NDArray[np.float32]:
        """Vectors of texts, (n, dim) fp32, in their order.

        Texts of like length are read together, so that little padding is read.

        Args:
            batch_size: texts read at once.
            prompt_name: which of the model's prompts is put in front of each text; None: its default, if it has one.

        Raises:
            DanluError: there is no such prompt, or a text has no tokens at all (a tokenizer without special tokens
                gives none for an empty text).
        """
        if isinstance(texts, str):
            raise DanluError("encode: got one text; give a list of texts")
        if batch_size < 1:
            raise DanluError(f"encode: batch_size is {batch_size}; at least 1")
        rows = [self.tokenize(text, prompt_name) for text in texts]
        if empty := [i for i, (ids, _) in enumerate(rows) if not ids]:
            raise DanluError(f"encode: text {empty[0] + 1} of {len(rows)} has no tokens, so it has no vector")
        vectors = np.empty((len(rows), self.dim), dtype=np.float32)
        longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        with torch.inference_mode():
            for start in range(0, len(rows), batch_size):
                chosen = longest_first[start : start + batch_size]
                vectors[chosen] = self(*self.collate([rows[i] for i in chosen])).cpu().numpy()
        return vectors

    def tokenize(
        self, text: str, prompt_name: str | None = None, max_length: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids and types of a text with its prompt, cut to ``max_length`` (None: the embedder's). A special token's name
        in it is text like any other, where sentence-transformers would take it for the token."""
        text = self.settings.prompt(prompt_name) + text
        if self.settings.lower_case:
            # Letter by letter, as the tokenizers library does: Python minds the end of a word (Greek sigma).
            text = "".join(letter.lower() for letter in text)
        return self.tokenizer.encode_for_encoder(text, max_length=max_length or self.max_length)

    def collate(self, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Rows of ids and types -> (ids_bt, real_bt, types_bt) on the model's device, padded on the right; real_bt is
        None where all rows are equally long."""
        lengths = torch.tensor([len(ids) for ids, _ in rows])
        width = int(lengths.max())
        ids = [ids + [self.tokenizer.pad_id] * (width - len(ids)) for ids, _ in rows]
        types = [types + [0] * (width - len(types)) for _, types in rows]
        device = self.stack.device
        real = None if int(lengths.min()) == width else (torch.arange(width) < lengths[:, None]).to(device)
        return torch.tensor(ids, device=device), real, torch.tensor(types, device=device)


class Normalize(nn.Module):
    """To length 1, so that the inner product is the cosine."""

    def forward(self, x_bd: Tensor) -> Tensor:
        return F.normalize(x_bd, dim=-1)


class Dense(nn.Module):
    """A projection with an activation, ``act(W x + b)``."""

    def __init__(self, settings: DenseSettings) -> None:
        super().__init__()
        self.linear = Linear(settings.n_in, settings.n_out, bias=settings.bias)
        self.activation = ACTIVATIONS[settings.activation]

    def load(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
        """Take over tensors by name."""
        for name, p in self.named_parameters():
            p.data = tensors[name].clone().to(dtype or tensors[name].dtype)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors by name."""
        return {name: p.detach().to("cpu", dtype) for name, p in self.named_parameters()}

    def forward(self, x_bd: Tensor) -> Tensor:
        return self.activation(self.linear(x_bd))
