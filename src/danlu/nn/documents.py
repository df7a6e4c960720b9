"""Attention within the documents of packed rows, one document after the other.

A mask over whole rows computes what it hides: of rows of 512 tokens with chats of 147, six pairs of seven. That was
37 % of a step of SmolLM2-135M in bf16. The flash attention of torch for CPUs does the work, in fp32: on documents its
bf16 is no faster forward and half as fast backward, also where the CPU multiplies bf16 (docs/log.md). It is called by
its own name because it is also asked for the backward pass, and an operator of our own is what the compiler leaves
alone: where documents begin is known only as a step runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Documents(NamedTuple):
    """What each token of packed rows may see, in place of a mask: the tokens of its document up to itself.

    Attributes:
        segments_bt: number of each token's document, which lies in one piece; below 0: padding.
        prefixes_bt: the document that its own goes on from, and sees all of; default: its own.
    """

    segments_bt: Tensor
    prefixes_bt: Tensor | None = None


def attend_documents(q_bhtd: Tensor, k_bgtd: Tensor, v_bgtd: Tensor, documents: Documents, *, scale: float) -> Tensor:
    """Causal attention within documents, (b, heads, t, d); 0 at padding. Each key head serves h / g query heads."""
    out: Tensor = _attend(q_bhtd, k_bgtd, v_bgtd, documents.segments_bt, documents.prefixes_bt, scale)[0]
    return out


class _Piece(NamedTuple):
    """A document: its row and places, and the places of the one that it goes on from, if any."""

    row: int
    own: slice
    prefix: slice | None

    def of(self, x: Tensor) -> Tensor:
        """(1, heads, tokens, d) of the document itself."""
        return x[self.row : self.row + 1, :, self.own]

    def seen(self, x_bgtd: Tensor, n_heads: int) -> Tensor:
        """(1, n_heads, keys, d) of all that it sees."""
        own = self.of(x_bgtd)
        if self.prefix is not None:
            own = torch.cat((x_bgtd[self.row : self.row + 1, :, self.prefix], own), dim=2)
        return own if own.shape[1] == n_heads else own.repeat_interleave(n_heads // own.shape[1], dim=1)

    def add(self, grad_bgtd: Tensor, grad: Tensor) -> None:
        """The gradient of what :meth:`seen` returned, added where it belongs."""
        groups = grad_bgtd.shape[1]
        grad = torch.unflatten(grad, 1, (groups, -1)).sum(2)
        if self.prefix is not None:
            n = self.prefix.stop - self.prefix.start
            grad_bgtd[self.row, :, self.prefix] += grad[0, :, :n]
            grad = grad[:, :, n:]
        grad_bgtd[self.row, :, self.own] += grad[0]

    def mask(self) -> Tensor | None:
        """What the causal flag cannot say: all of the prefix is seen, and of the document what came before."""
        if self.prefix is None:
            return None
        n, n_prefix = self.own.stop - self.own.start, self.prefix.stop - self.prefix.start
        return torch.full((n, n_prefix + n), float("-inf")).triu(n_prefix + 1)


def _pieces(segments_bt: Tensor, prefixes_bt: Tensor | None) -> Iterator[_Piece]:
    prefixes = (segments_bt if prefixes_bt is None else prefixes_bt).tolist()
    for row, segments in enumerate(segments_bt.tolist()):
        begins = [t for t in range(len(segments)) if t == 0 or segments[t] != segments[t - 1]]
        places = {
            segments[begin]: slice(begin, end) for begin, end in zip(begins, [*begins[1:], len(segments)], strict=True)
        }
        if len(places) < len(begins):
            raise ValueError(f"row {row}: a document of a packed row lies in one piece; numbers come twice here")
        for segment, own in places.items():
            if segment >= 0:
                before = prefixes[row][own.start]
                yield _Piece(row, own, None if before == segment else places[before])


@torch.library.custom_op("danlu::attend_documents", mutates_args=(), device_types="cpu")
def _attend(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, prefixes: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The outputs, and the logarithm of each softmax's sum, (b, t, heads)."""
    b, h, t, d = q.shape
    out, sums = q.new_zeros(b, t, h, d).transpose(1, 2), q.new_zeros(b, t, h, dtype=torch.float32)
    q, k, v = q.float(), k.float(), v.float()
    for piece in _pieces(segments, prefixes):
        mask = piece.mask()
        inputs = (piece.of(q), piece.seen(k, h), piece.seen(v, h))
        found, log_sums = _forward(*inputs, 0.0, mask is None, attn_mask=mask, scale=scale)
        out[piece.row, :, piece.own] = found[0]
        sums[piece.row, piece.own] = log_sums[0].T
    return out, sums


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, prefixes: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    b, h, t, d = q.shape
    return q.new_empty(b, t, h, d).transpose(1, 2), q.new_empty(b, t, h, dtype=torch.float32)


@torch.library.custom_op("danlu::attend_documents_backward", mutates_args=(), device_types="cpu")
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, segments: Tensor,
    prefixes: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    h, dtype = q.shape[1], q.dtype
    grad, q, k, v, out = (x.float() for x in (grad, q, k, v, out))
    grads = [x.new_zeros(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v)]
    for piece in _pieces(segments, prefixes):
        mask = piece.mask()
        inputs = (piece.of(grad), piece.of(q), piece.seen(k, h), piece.seen(v, h), piece.of(out))
        found = _backward(*inputs, sums[piece.row, piece.own].T[None], 0.0, mask is None, attn_mask=mask, scale=scale)
        grads[0][piece.row, :, piece.own] = found[0][0]
        piece.add(grads[1], found[1])
        piece.add(grads[2], found[2])
    return grads[0].to(dtype), grads[1].to(dtype), grads[2].to(dtype)


@_attend_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, segments: Tensor,
    prefixes: Tensor | None, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, segments, prefixes, scale = inputs
    ctx.save_for_backward(q, k, v, *output, segments, prefixes)
    ctx.scale = scale


def _gradients(ctx, grad, _):  # type: ignore[no-untyped-def]
    q, k, v, out, sums, segments, prefixes = ctx.saved_tensors
    return *_attend_backward(grad, q, k, v, out, sums, segments, prefixes, ctx.scale), None, None, None


_attend.register_autograd(_gradients, setup_context=_setup_context)
