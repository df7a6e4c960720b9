"""ROUGE-L against its definition."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.evaluation.rouge import common_subsequence, rouge_l, tokens

WORDS = st.lists(st.sampled_from("abcd"), max_size=12)


def by_definition(left: Sequence[str], right: Sequence[str]) -> int:
    @functools.cache
    def longest(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return 0
        if left[i - 1] == right[j - 1]:
            return longest(i - 1, j - 1) + 1
        return max(longest(i - 1, j), longest(i, j - 1))

    return longest(len(left), len(right))


@settings(max_examples=200, deadline=None)
@given(WORDS, WORDS)
def test_common_subsequence_is_that_of_the_definition(left: list[str], right: list[str]) -> None:
    assert common_subsequence(left, right) == by_definition(left, right) == common_subsequence(right, left)


def test_rouge_l_of_known_texts() -> None:
    # Lin 2004, section 3: "police killed the gunman" against two candidates; LCS of 3 and of 2 words.
    wanted = tokens("police killed the gunman")
    assert rouge_l(wanted, tokens("police kill the gunman")) == pytest.approx(0.75)
    assert rouge_l(wanted, tokens("the gunman kill police")) == pytest.approx(0.5)
    assert rouge_l(wanted, tokens("Police killed the GUNMAN!")) == pytest.approx(8 / 9)
    assert rouge_l([], []) == 0
    assert rouge_l(tokens("天空为什么是蓝色的"), tokens("天空为什么是红色的")) == pytest.approx(8 / 9)
    assert tokens("def get_name2(x):") == ["def", "get", "_", "name", "2", "(", "x", ")", ":"]
