"""Bits per byte: how well a model predicts text, whatever its tokenizer.

    bits per byte = sum over all tokens of -log2 p(token | earlier tokens of its document) / UTF-8 bytes of them all

Every document stands alone. It begins with the separator that begins every training document: given, and never
predicted itself. Each token of the text is predicted exactly once, so that each byte counts once; the end of the
document is not predicted. A document longer than the context is read through a window that moves on by ``stride``: the
first window scores all its tokens, each later one only those that no window has scored yet, and these see at least
``context - stride`` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM

if TYPE_CHECKING:
    from danlu.tokenizer.tokenizer import Tokenizer

BATCH_TOKENS = 65536  # tokens in one forward pass
BATCH_TOKENS_CPU = 2048  # a fifth faster than 8192: activations stay in the cache
LOGITS = 1 << 25  # logits held at once: 128 MB in fp32
POOL = 512  # windows that are sorted by length before they are cut into batches, so that little is padded


@dataclass(frozen=True)
class Score:
    """``nats``: summed negative log-likelihood of ``tokens`` tokens, which spell ``bytes`` bytes in ``documents``."""

    nats: float
    tokens: int
    bytes: int
    documents: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


def bits_per_byte(
    model: CausalLM,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    context: int | None = None,
    stride: int | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> Score:
    """Score texts. Computes in the model's ``compute_dtype``; probabilities and sums are fp32 and fp64.

    Args:
        documents: read in a stream; empty ones are passed over.
        context: tokens in a window, default the model's context.
        stride: tokens between windows, default half the context.
        progress: called with the number of tokens that have just been scored.

    Raises:
        DanluError: there is no text, the window does not fit the model, or the tokenizer is another model's.
    """
    context = context or model.config.context
    stride = stride or max(1, context // 2)
    if context > model.config.context:
        raise DanluError(
            f"context={context}: the model's context is {model.config.context} tokens; choose a smaller one"
        )
    if stride > context:
        raise DanluError(f"stride={stride}: is larger than the context of {context} tokens; tokens would be left out")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise DanluError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    n_documents = n_bytes = n_tokens = 0

    def windows() -> Iterator[Window]:
        nonlocal n_documents, n_bytes
        for text in documents:
            if text:
                n_documents += 1
                n_bytes += len(text.encode())
                yield from windows_of(torch.tensor([tokenizer.bos_id, *tokenizer.encode(text)]), context, stride)

    nats = 0.0
    for batch in _batches(windows(), BATCH_TOKENS_CPU if model.device.type == "cpu" else BATCH_TOKENS):
        nats += _nats(model, batch)
        scored = sum(window.n_scored for window in batch)
        n_tokens += scored
        if progress is not None:
            progress(scored)
    if n_bytes == 0:
        raise DanluError("there is no held-out text to score; build the data folder with a held-out share")
    return Score(nats, n_tokens, n_bytes, n_documents)


@dataclass(frozen=True)
class Window:
    """``inputs`` (seq,) predict ``targets`` (seq,), of which the last ``n_scored`` count."""

    inputs: Tensor
    targets: Tensor
    n_scored: int


def windows_of(ids: Tensor, context: int, stride: int) -> Iterator[Window]:
    """The windows of one document of which ``ids[0]`` is given and each later token is scored once."""
    scored, n = 0, len(ids) - 1
    while scored < n:
        end = min(n, scored + stride if scored else context)
        start = max(0, end - context)
        yield Window(ids[start:end], ids[start + 1 : end + 1], end - scored)
        scored = end


def _batches(windows: Iterator[Window], batch_tokens: int) -> Iterator[list[Window]]:
    while pool := sorted(islice(windows, POOL), key=lambda window: len(window.inputs), reverse=True):
        while pool:
            rows = max(1, batch_tokens // len(pool[0].inputs))
            yield pool[:rows]
            pool = pool[rows:]


@torch.inference_mode()
def _nats(model: CausalLM, windows: list[Window]) -> float:
    """Summed negative log-likelihood of what the windows score. Causal attention never sees padding on the right."""
    ids_bt = torch.nn.utils.rnn.pad_sequence([window.inputs for window in windows], batch_first=True)
    hidden_btd = model.hidden_states(ids_bt.to(model.device))
    hidden_nd = torch.cat([hidden_btd[i, len(w.inputs) - w.n_scored : len(w.inputs)] for i, w in enumerate(windows)])
    targets_n = torch.cat([w.targets[-w.n_scored :] for w in windows]).to(model.device)
    rows = max(1, LOGITS // model.config.vocab_size)
    nats = torch.zeros((), dtype=torch.float64, device=model.device)
    for hidden, targets in zip(torch.split(hidden_nd, rows), torch.split(targets_n, rows), strict=True):
        nats += F.cross_entropy(model.head(hidden).float(), targets, reduction="none").double().sum()
    return nats.item()
