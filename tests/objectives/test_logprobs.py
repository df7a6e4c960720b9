"""Log-probs against transformers (padded on either side, one by one, packed), closed forms, and masks that hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.data.packed_examples import pack_examples
from danlu.data.packing import IGNORE
from danlu.models.load import load_model
from danlu.objectives.logprobs import (
    entropy,
    masked,
    masked_mean,
    masked_sum,
    sequence_means,
    token_logprobs,
    vocab_logprobs,
)
from danlu.training.logprobs import target_logprobs

VOCAB, PROMPT = 61, 3
LENGTHS = (9, 5, 14)


@pytest.fixture(scope="module")
def reference() -> Any:
    """A tiny model of transformers whose logits are far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def expected_sums(reference: Any, sequences: list[list[int]]) -> Tensor:
    """What transformers says of each sequence alone: -cross_entropy(sum) behind the prompt."""
    sums = []
    for ids in sequences:
        with torch.no_grad():
            logits = reference(torch.tensor([ids])).logits[0]
        sums.append(-F.cross_entropy(logits[PROMPT - 1 : -1], torch.tensor(ids[PROMPT:]), reduction="sum"))
    return torch.stack(sums)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sums_equal_those_of_transformers_whatever_the_padding(
    reference: Any, sequences: list[list[int]], side: str
) -> None:
    width = max(LENGTHS)
    ids, real = torch.zeros(len(sequences), width, dtype=torch.long), torch.zeros(len(sequences), width).bool()
    targets = torch.full((len(sequences), width), IGNORE)
    for row, sequence in enumerate(sequences):
        start = width - len(sequence) if side == "left" else 0
        here = slice(start, start + len(sequence))
        ids[row, here], real[row, here] = torch.tensor(sequence), True
        targets[row, start + PROMPT - 1 : start + len(sequence) - 1] = torch.tensor(sequence[PROMPT:])
    with torch.no_grad():
        positions = (real.long().cumsum(1) - 1).clamp(min=0)
        logits = reference(ids, attention_mask=real.long(), position_ids=positions).logits
    sums = masked_sum(token_logprobs(logits, targets), targets != IGNORE)
    torch.testing.assert_close(sums, expected_sums(reference, sequences), rtol=1e-5, atol=1e-5)


def test_packed_sums_of_our_model_equal_those_of_transformers(
    reference: Any, sequences: list[list[int]], tmp_path: Path
) -> None:
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    expected = expected_sums(reference, sequences)
    examples = [(ids, [place >= PROMPT for place in range(len(ids))]) for ids in sequences]
    with torch.no_grad():
        for row_len in (0, 40):
            packed = pack_examples(examples, row_len=row_len)
            logps, _ = target_logprobs(model, packed)
            torch.testing.assert_close(masked_sum(logps, packed.mask_bt), expected, rtol=1e-5, atol=1e-5)
        for example, alone in zip(examples, expected, strict=True):
            packed = pack_examples([example])
            torch.testing.assert_close(target_logprobs(model, packed)[0].sum(), alone, rtol=1e-5, atol=1e-5)


def test_temperature_divides_the_logits() -> None:
    logits, targets = torch.randn(4, VOCAB), torch.arange(4)
    expected = F.log_softmax(logits / 0.7, -1)[torch.arange(4), targets]
    torch.testing.assert_close(token_logprobs(logits, targets, 0.7), expected)
    torch.testing.assert_close(vocab_logprobs(logits, 0.7).exp().sum(-1), torch.ones(4))


def test_ignored_targets_are_exactly_0_and_their_nan_stays_where_it_is() -> None:
    values = torch.randn(2, 3, 5)
    values[0, 1] = float("nan")
    values[1, 0] = float("inf")
    logits = values.requires_grad_()
    targets = torch.tensor([[1, IGNORE, 2], [IGNORE, IGNORE, 4]])
    logps = token_logprobs(logits, targets)
    assert (logps[targets == IGNORE] == 0).all()
    logps.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[targets == IGNORE] == 0).all()
    assert (logits.grad[targets != IGNORE] != 0).all()


def test_all_or_none_ignored_and_a_single_position() -> None:
    nothing = torch.full((2, 3), IGNORE)
    assert token_logprobs(torch.full((2, 3, 5), float("nan")), nothing).tolist() == [[0.0] * 3] * 2
    assert token_logprobs(torch.zeros(5), torch.tensor(2)).item() == pytest.approx(-torch.tensor(5.0).log().item())


def test_bfloat16_logits_are_taken_in_fp32() -> None:
    logits, targets = torch.randn(6, VOCAB).bfloat16(), torch.arange(6)
    logps = token_logprobs(logits, targets)
    assert logps.dtype == entropy(logits).dtype == torch.float32
    torch.testing.assert_close(logps, token_logprobs(logits.float(), targets))


def test_entropy_of_even_choices_and_of_tokens_that_cannot_come() -> None:
    logits = torch.zeros(3, 8)
    logits[1, 4:] = float("-inf")
    logits[2, 0] = 1e4
    logits.requires_grad_()
    found = entropy(logits)
    torch.testing.assert_close(found, torch.tensor([8.0, 4.0, 1.0]).log())
    found.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert entropy(torch.zeros(3, 50, 4)).shape == (3, 50)
    assert entropy(torch.zeros(0, 4)).shape == (0,)
    probs = torch.softmax(torch.arange(5.0) / 2, -1)
    torch.testing.assert_close(entropy(torch.arange(5.0), 2.0), -(probs * probs.log()).sum())


def test_masked_slots_reach_neither_sums_nor_means_nor_gradients() -> None:
    values = torch.tensor([[1.0, 2.0, float("nan")], [4.0, float("inf"), float("nan")], [float("nan")] * 3])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    values.requires_grad_()
    assert masked_sum(values, mask).tolist() == [3.0, 4.0, 0.0]
    assert sequence_means(values, mask).tolist() == [1.5, 4.0, 0.0]
    assert masked_mean(values, mask).item() == pytest.approx(7 / 3)
    assert masked_mean(values, torch.zeros_like(mask)) == 0
    masked(values, mask).exp().square().sum().backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()
    assert (values.grad[mask == 0] == 0).all()
