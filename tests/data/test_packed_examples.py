"""Packed examples: nothing is lost, nothing meets, and what was computed comes back to its place."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.data.packed_examples import SHARED_FROM, Example, PackedExamples, pack_examples
from danlu.data.packing import IGNORE

PAIRS = st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=12)


@st.composite
def answers(draw: st.DrawFn) -> list[Example]:
    """Some prompts, each with some answers, which may begin alike or not differ at all."""
    found: list[Example] = []
    for prompt in draw(st.lists(PAIRS, min_size=1, max_size=4)):
        for answer in draw(st.lists(PAIRS, min_size=1, max_size=4)):
            pairs = [*prompt, *answer] or [(1, False)]
            found.append(([token for token, _ in pairs], [learned for _, learned in pairs]))
    return found


@given(answers(), st.integers(0, 20), st.integers(1, 20))
def test_targets_come_back_in_order(examples: list[Example], row_len: int, shared_from: int) -> None:
    packed = pack_examples(examples, row_len=row_len, shared_from=shared_from)
    laid_out = packed.by_example(packed.targets.flatten()[packed.slots_n])
    for i, (ids, mask) in enumerate(examples):
        wanted = [token for token, learned in zip(ids[1:], mask[1:], strict=True) if learned]
        assert laid_out[i][packed.mask_bt[i]].tolist() == wanted
        assert packed.lengths_b[i] == len(wanted)
    assert int((packed.targets != IGNORE).sum()) == len(packed.slots_n.unique())
    assert packed.n_tokens >= row_len * len(packed.ids)
    # What predicts a target sees the example up to there, each token at its place, and nothing else.
    rows, slots = packed.slots_n // packed.ids.shape[1], packed.slots_n % packed.ids.shape[1]
    for owner, target, r, slot in zip(packed.owners_n, laid_out[packed.mask_bt], rows, slots, strict=True):
        own, prefix = packed.segments[r, slot], packed.prefixes[r, slot]
        seen = ((packed.segments[r] == own) | (packed.segments[r] == prefix)) & (
            torch.arange(len(packed.ids[r])) <= slot
        )
        ids = packed.ids[r][seen].tolist()
        assert packed.positions[r][seen].tolist() == list(range(len(ids)))
        assert [*ids, target] == examples[owner][0][: len(ids) + 1]


def test_a_prompt_is_laid_down_once_behind_which_its_answers_stand() -> None:
    def packed(n_prompts: int, n_answers: int) -> PackedExamples:
        """Answers of 30 tokens to prompts of 40."""
        asked = [[n + 1] * 40 + [90 + k] * 30 for n in range(n_prompts) for k in range(n_answers)]
        return pack_examples([(ids, [False] * 40 + [True] * 30) for ids in asked])

    # All of a prompt but its last token, which predicts another one for each answer.
    assert packed(1, 4).ids.shape == (1, 39 + 4 * 30)
    assert packed(3, 4).ids.shape == (3, 39 + 4 * 30)
    assert packed(3, 1).ids.shape == (3, 69)
    # As many as a row holds, and all rows alike.
    assert packed(1, 16).ids.shape == (2, 39 + 8 * 30)


def test_what_few_tokens_would_save_is_not_shared() -> None:
    start = [1] * SHARED_FROM
    examples = [([*start, *[2 + k] * 9], [False] * len(start) + [True] * 9) for k in range(2)]
    assert pack_examples(examples).ids.shape == (2, len(start) + 8)
    assert pack_examples(examples, shared_from=SHARED_FROM - 1).ids.shape == (1, len(start) - 1 + 2 * 9)
    # Two prompts have 20 tokens in common, their answers 40 with each: what saves more is done.
    prompts = [[1] * 20 + [2 + n] * 20 for n in range(2)]
    pairs = [[*prompt, *[9 + k] * 10] for prompt in prompts for k in range(2)]
    assert pack_examples([(ids, [True] * 50) for ids in pairs]).ids.shape == (2, 39 + 2 * 10)


def test_gradients_pass() -> None:
    packed = pack_examples([([1, 2, 3], [False, True, True]), ([4, 5], [False, True])])
    values = torch.ones(3, requires_grad=True)
    packed.by_example(values * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1, 2, 3]
