"""Rows of embedding and head that are trained beside a frozen table: for special tokens that the base model has never
seen. PEFT calls them trainable tokens, and stores the rows themselves, not what is added to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.adapters.wrapper import Wrapper
from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.models.load import Model
from danlu.nn.embedding import Embedding
from danlu.nn.linear import Head


class TokenRows(nn.Module):
    """The trained rows.

    Args:
        ids: of the tokens, (n,), each once.
        rows: what they begin with, (n, dim).
        vocab_size: of the whole table.
    """

    ids: Tensor
    slots: Tensor

    def __init__(self, ids: Tensor, rows: Tensor, vocab_size: int) -> None:
        super().__init__()
        self.table = Embedding(len(rows), rows.shape[1], _weight=rows.detach().float().clone())
        slots = torch.full((vocab_size,), -1)
        slots[ids] = torch.arange(len(ids))
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("slots", slots, persistent=False)  # the row of each token, or -1

    @property
    def rows(self) -> Tensor:
        """(n, dim)."""
        weight: Tensor = self.table.weight
        return weight


class _RowWrapper(Wrapper):
    """What embedding and head have in common."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.before: Tensor | None = None  # the rows of the table, while others are merged into it

    def chosen(self) -> TokenRows | None:
        """The rows to compute with."""
        if self.active is None or self.merged:
            return None
        rows = self.adapters[self.active]
        assert isinstance(rows, TokenRows)
        return rows

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        weight, rows = self.weight.detach().clone(), self.chosen()
        return weight if rows is None else weight.index_copy_(0, rows.ids, rows.rows.to(weight.dtype))

    @torch.no_grad()
    def merge(self) -> None:
        rows = self.chosen()
        if rows is None:
            return
        if self.is_tied and not self.shares_weight:
            self.base.weight = nn.Parameter(self.effective_weight(), requires_grad=False)
        elif not self.shares_weight:
            self.before = self.weight[rows.ids].clone()
            self.weight.index_copy_(0, rows.ids, rows.rows.to(self.weight.dtype))
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        if not self.merged:
            return
        self.merged = False
        rows = self.chosen()
        if rows is not None and self.before is not None:
            self.weight.index_copy_(0, rows.ids, self.before)
            self.before = None


class TokenEmbedding(_RowWrapper):
    """An embedding with rows of its own for some tokens."""

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.base(ids)
        rows = self.chosen()
        if rows is None:
            return x
        slots = rows.slots[ids]
        own: Tensor = rows.table(slots.clamp(min=0))
        return torch.where((slots >= 0)[..., None], own.to(x.dtype), x)


class TokenHead(_RowWrapper):
    """A head with rows of its own for some tokens."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.base(x)
        rows, head = self.chosen(), self.base
        if rows is None:
            return logits
        assert isinstance(head, Head)
        bias = None if head.bias is None else head.bias[rows.ids].to(x.dtype)
        own = F.linear(x if head.scale is None else x * head.scale, rows.rows.to(x.dtype), bias).float()
        if head.softcap is not None:
            own = head.softcap * torch.tanh(own / head.softcap)
        return logits.index_copy(-1, rows.ids, own)


def begin(model: Model, ids: Sequence[int], *, name: str) -> None:
    """Give some tokens rows of their own, which begin as the model's: in the embedding and in an untied head.

    Raises:
        DanluError: as :func:`attach`.
    """
    causal, own = _causal(model), list(ids)
    _check_ids(causal, own)
    head = None if causal.config.tie_embeddings else (own, causal.head.weight[own])
    attach(causal, name=name, embed=(own, causal.embed.weight[own]), head=head)


def attach(
    model: Model,
    *,
    name: str,
    embed: tuple[Sequence[int], Tensor] | None,
    head: tuple[Sequence[int], Tensor] | None,
) -> None:
    """Put rows in place: token ids, and (n, dim). A tied head takes the embedding's, unless it is given others.

    Raises:
        DanluError: the model writes no text, a token is beyond its vocabulary, or the head has another adapter.
    """
    causal, shared = _causal(model), None
    if embed is not None:
        embedding = _wrapped(causal, "embed", TokenEmbedding)
        shared = embedding.adapters[name] = _rows(causal, *embed)
    if head is None and not causal.config.tie_embeddings:
        return
    wrapper = _wrapped(causal, "head", TokenHead)
    wrapper.is_tied = causal.config.tie_embeddings
    wrapper.shares_weight = head is None
    if head is not None:
        wrapper.adapters[name] = _rows(causal, *head)
    elif shared is not None:
        wrapper.adapters[name] = shared


def _rows(model: CausalLM, ids: Sequence[int], rows: Tensor) -> TokenRows:
    _check_ids(model, ids)
    return TokenRows(torch.tensor(list(ids)), rows, model.config.vocab_size).to(model.device)


def _check_ids(model: CausalLM, ids: Sequence[int]) -> None:
    vocab_size = model.config.vocab_size
    if beyond := [i for i in ids if not 0 <= i < vocab_size]:
        raise DanluError(f"token {beyond[0]} is beyond the model's vocabulary of {vocab_size}")
    if len(set(ids)) < len(ids):
        raise DanluError("a token that is to be trained is named twice")


def _causal(model: Model) -> CausalLM:
    if not isinstance(model, CausalLM):
        raise DanluError("only a causal language model can have trained rows for tokens")
    return model


def _wrapped(model: CausalLM, place: str, kind: type[_RowWrapper]) -> _RowWrapper:
    layer = model.get_submodule(place)
    if isinstance(layer, kind):
        return layer
    if isinstance(layer, Wrapper):
        raise DanluError("the head cannot have an adapter and new tokens at once; leave it out of the targets")
    wrapper = kind(layer)
    model.set_submodule(place, wrapper)
    return wrapper


def enlarge(model: CausalLM, vocab_size: int) -> None:
    """Make room for new tokens in embedding and head, before anything is attached. They begin as the mean of the rows
    that are there."""
    if vocab_size <= model.config.vocab_size:
        return
    layers: list[nn.Module] = [model.embed, model.head]
    made: dict[int, nn.Parameter] = {}
    for layer in layers:
        for p_name, p in list(layer.named_parameters()):
            if id(p) not in made:
                mean = p.detach().float().mean(dim=0, keepdim=True).to(p.dtype)
                more = mean.expand(vocab_size - len(p), *mean.shape[1:])
                made[id(p)] = nn.Parameter(torch.cat([p.detach(), more]), requires_grad=p.requires_grad)
            setattr(layer, p_name, made[id(p)])
    model.embed.num_embeddings = model.head.out_features = vocab_size
    model.config = dataclasses.replace(model.config, vocab_size=vocab_size)
    if model.hf_config:
        model.hf_config = {**model.hf_config, "vocab_size": vocab_size}
