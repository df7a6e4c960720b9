"""Bits per byte: a closed form, transformers' loss, and what must not change it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.errors import DanluError
from danlu.evaluation import bits_per_byte as module
from danlu.evaluation.bits_per_byte import bits_per_byte, windows_of
from danlu.models.causal_lm import CausalLM
from random_lm import random_lm

BOS = 256


class PairTokenizer:
    """Two bytes a token where they are equal, else one: tokens and bytes differ in number."""

    bos_id, vocab_size = BOS, 513

    def encode(self, text: str) -> list[int]:
        data, ids, i = text.encode(), [], 0
        while i < len(data):
            pair = data[i : i + 2]
            double = len(pair) == 2 and pair[0] == pair[1]
            ids.append(257 + pair[0] if double else pair[0])
            i += 2 if double else 1
        return ids


TOKENIZER = PairTokenizer()
TEXTS = ["aab", "丹炉 refines", "x" * 41, "", "hello worlds " * 12, "z"]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return random_lm(513, context=32)


def one_token_at_a_time(model: CausalLM, text: str) -> float:
    """Nats of a text that fits the context, each token predicted by a forward pass of its own."""
    ids = [BOS, *TOKENIZER.encode(text)]
    with torch.inference_mode():
        return -sum(
            float(model(torch.tensor([ids[:i]]))[0, -1].double().log_softmax(-1)[ids[i]]) for i in range(1, len(ids))
        )


def test_a_uniform_model_needs_log2_vocab_bits_a_token() -> None:
    score = bits_per_byte(random_lm(513, context=32, std=0.0), TOKENIZER, TEXTS)
    n_tokens = sum(len(TOKENIZER.encode(text)) for text in TEXTS)
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    assert (score.tokens, score.bytes, score.documents) == (n_tokens, n_bytes, 5)
    assert score.bits_per_byte == pytest.approx(math.log2(513) * n_tokens / n_bytes, rel=1e-7)


def test_it_is_the_chain_rule(model: CausalLM) -> None:
    assert bits_per_byte(model, TOKENIZER, ["丹炉 refines"]).nats == pytest.approx(
        one_token_at_a_time(model, "丹炉 refines"), rel=1e-5
    )


def test_one_window_is_the_loss_of_transformers(model: CausalLM, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from danlu.models.load import save_model

    save_model(model, tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([[BOS, *TOKENIZER.encode("hello world")]])
    with torch.inference_mode():
        loss = peer(ids, labels=ids).loss
    score = bits_per_byte(model, TOKENIZER, ["hello world"])
    assert score.nats / score.tokens == pytest.approx(float(loss), rel=1e-5)


def test_windows_condition_on_what_lies_before_them(model: CausalLM) -> None:
    """With stride 1 each token of a long document is predicted from exactly the last ``context`` tokens."""
    ids = [BOS, *TOKENIZER.encode(TEXTS[4])]
    expected = 0.0
    with torch.inference_mode():
        for i in range(1, len(ids)):
            logits = model(torch.tensor([ids[max(0, i - 16) : i]]))[0, -1].double()
            expected -= float(logits.log_softmax(-1)[ids[i]])
    score = bits_per_byte(model, TOKENIZER, [TEXTS[4]], context=16, stride=1)
    assert score.nats == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("context", "stride"), [(32, 32), (32, 16), (32, 1), (7, 3), (1, 1)])
def test_documents_are_independent_and_every_byte_counts_once(model: CausalLM, context: int, stride: int) -> None:
    seen: list[int] = []
    together = bits_per_byte(model, TOKENIZER, TEXTS, context, stride, progress=seen.append)
    alone = [bits_per_byte(model, TOKENIZER, [text], context, stride) for text in TEXTS if text]
    assert together.nats == pytest.approx(sum(score.nats for score in alone), rel=1e-6)
    assert together.bytes == sum(len(text.encode()) for text in TEXTS)
    assert together.tokens == sum(len(TOKENIZER.encode(text)) for text in TEXTS) == sum(seen)


def test_batches_and_logit_chunks_change_nothing(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bits_per_byte(model, TOKENIZER, TEXTS).nats
    monkeypatch.setattr(module, "BATCH_TOKENS_CPU", 40)
    monkeypatch.setattr(module, "LOGITS", 3 * 513)
    monkeypatch.setattr(module, "POOL", 3)
    assert bits_per_byte(model, TOKENIZER, TEXTS).nats == pytest.approx(expected, rel=1e-6)


@settings(deadline=None)
@given(n=st.integers(0, 200), context=st.integers(1, 40), stride=st.integers(1, 40))
def test_windows_score_each_token_once_in_order_with_full_context(n: int, context: int, stride: int) -> None:
    stride = min(stride, context)
    windows = list(windows_of(torch.arange(n + 1), context, stride))
    assert [t for w in windows for t in w.targets[-w.n_scored :].tolist()] == list(range(1, n + 1))
    for number, window in enumerate(windows):
        assert torch.equal(window.inputs + 1, window.targets)
        assert len(window.inputs) == min(n, context)
        assert number == 0 or len(window.inputs) - window.n_scored >= context - stride


def test_what_cannot_be_scored_is_refused(model: CausalLM) -> None:
    with pytest.raises(DanluError, match="no held-out text"):
        bits_per_byte(model, TOKENIZER, ["", ""])
    with pytest.raises(DanluError, match="context=33"):
        bits_per_byte(model, TOKENIZER, TEXTS, context=33)
    with pytest.raises(DanluError, match="stride=9"):
        bits_per_byte(model, TOKENIZER, TEXTS, context=8, stride=9)

    class Larger(PairTokenizer):
        vocab_size = 514

    with pytest.raises(DanluError, match="tokenizer has 514 tokens and the model 513"):
        bits_per_byte(model, Larger(), TEXTS)
