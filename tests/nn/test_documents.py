"""Attention by document equals attention under a mask over whole rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from danlu.models.causal_lm import CausalLM
from danlu.nn import documents, masks
from danlu.nn.config import ModelConfig, Rope
from danlu.nn.documents import Documents, attend_documents
from danlu.nn.sdpa import attend

LENGTHS = ((40, 1, 7, 64), (100,), (33, 33, 33), ())
ROW = 112
HEADS, GROUPS, DIM = 6, 2, 16


def rows(shared: bool) -> Documents:
    """Documents in rows, padding behind; where ``shared``, all but those of the second row go on from the first."""
    segments, prefixes = (torch.full((len(LENGTHS), ROW), -1) for _ in range(2))
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for number, length in enumerate(lengths):
            segments[row, at : at + length] = number
            prefixes[row, at : at + length] = 0 if shared and row != 1 else number
            at += length
    return Documents(segments, prefixes if shared else None)


def heads(dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(len(LENGTHS), ROW, n, DIM, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for n in (HEADS, GROUPS, GROUPS)
    )


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("shared", [False, True])
def test_it_is_attention_under_a_mask(shared: bool, dtype: torch.dtype, error: float) -> None:
    q, k, v = heads(dtype)
    packed = rows(shared)
    allowed = masks.visible(ROW, ROW, causal=True) & masks.same_segment(*packed)
    real_b1t1 = (packed.segments_bt >= 0)[:, None, :, None]
    expected = attend(q, k, v, masks.additive(allowed, dtype), scale=0.3).masked_fill(~real_b1t1, 0)
    found = attend_documents(q, k, v, packed, scale=0.3)
    assert found.dtype == dtype
    assert (found - expected).abs().max() < error
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for ours, theirs in zip(
        torch.autograd.grad(found, (q, k, v), slope), torch.autograd.grad(expected, (q, k, v), slope), strict=True
    ):
        assert (ours - theirs).abs().max() < error * theirs.abs().max()


@pytest.mark.parametrize("shared", [False, True])
def test_the_compiler_is_told_the_truth(shared: bool) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(documents._attend, (*heads(torch.float32), *rows(shared), 0.3), test_utils=checks)


def test_a_document_in_two_pieces_is_refused() -> None:
    q = torch.zeros(1, 1, 5, 16)
    with pytest.raises(ValueError, match="one piece"):
        attend_documents(q, q, q, Documents(torch.tensor([[0, 0, 1, 0, -1]])), scale=1.0)


def test_a_model_reads_packed_rows_by_document_and_with_a_window_by_mask() -> None:
    """What it says of a document is what it says of it alone."""
    shape = {"n_layers": 2, "dim": 32, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "ffn_dim": 64, "context": 128}
    packed = rows(False)
    ids = torch.randint(50, packed.segments_bt.shape, generator=torch.Generator().manual_seed(0))
    at = [torch.arange(ROW) - begin for begin in (0, 40, 41, 48)]
    positions = torch.cat([at[0][:40], at[1][40:41], at[2][41:48], at[3][48:112]])[None]
    for window, by_document in ((None, True), (ROW, True), (9, False)):
        model = CausalLM(ModelConfig(vocab_size=50, rope=Rope(), window=window, **shape))
        model.init_weights(torch.Generator().manual_seed(0))
        for block in model.layers:
            torch.nn.init.normal_(block.attention.o_proj.weight, std=0.3)
        mask = model._masks(positions, packed.segments_bt[:1], None, None, None)[window]
        assert isinstance(mask, Documents) == by_document
        together = model.hidden_states(ids[:1], positions, packed.segments_bt[:1])
        alone = model.hidden_states(ids[:1, 48:112])
        assert (together[:, 48:112] - alone).abs().max() < 1e-5
