"""Tasks out of a teacher's answer, and which of them are new."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.data.corpus import ErrorPolicy
from danlu.errors import DanluError
from danlu.evaluation.rouge import rouge_l
from danlu.posttraining.synth.likeness import most_alike
from danlu.posttraining.synth.self_instruct import parse_tasks, read_seeds, unfit

WORDS = st.lists(st.sampled_from("abcd"), max_size=12)


@settings(max_examples=100, deadline=None)
@given(WORDS, st.lists(WORDS, max_size=5), st.floats(0.1, 1))
def test_most_alike_is_the_first_above_the_limit(words: list[str], others: list[list[str]], limit: float) -> None:
    expected = next(((rouge_l(words, o), i) for i, o in enumerate(others) if rouge_l(words, o) >= limit), None)
    assert most_alike(words, others, limit) == expected


@pytest.mark.parametrize(
    "answer",
    [
        "9. Explain tides.\n10. Name a river.\n11. Sort these: b, a.",
        "Sure! Here are the tasks:\n\n9) Explain tides.\n\n10) Name a river.\n\n11) Sort these: b, a.\n",
        "**Task 1:** Explain tides.\n**Task 2:** Name a river.\n**Task 3:** Sort these: b, a.",
        "### 1. **Explain tides.**\n### 2. **Name a river.**\n### 3. **Sort these: b, a.**",
        '- 1: "Explain tides."\n- 2: "Name a river."\n- 3: "Sort these: b, a."',
        "1. Explain tides.\n1. Name a river.\n1. Sort these: b, a.",
        "(1) Explain tides.\n(2) Name a river.\n(4) Sort these: b, a.",
        "Instruction 1. Explain tides.\nInstruction 2. Name a river.\nInstruction 3. Sort these: b, a.",
        "1. Instruction: Explain tides.\n2. Instruction: Name a river.\n3. Instruction: Sort these: b, a.",
    ],
)
def test_lists_are_read_however_they_are_dressed(answer: str) -> None:
    assert parse_tasks(answer) == ["Explain tides.", "Name a river.", "Sort these: b, a."]


def test_lists_within_tasks_and_chinese_and_what_was_cut_off() -> None:
    nested = "4. Sort these:\n   1. pear\n   2. fig\n5. Round 3.75 to a whole number.\n6. What is"
    assert parse_tasks(nested, cut_off=True) == [
        "Sort these:\n   1. pear\n   2. fig",
        "Round 3.75 to a whole number.",
    ]
    assert parse_tasks("1、解释潮汐。\n2、写一首诗。") == ["解释潮汐。", "写一首诗。"]
    assert parse_tasks("任务1：解释潮汐。\n任务2：写一首诗。") == ["解释潮汐。", "写一首诗。"]
    assert parse_tasks("I have no idea.") == []
    assert parse_tasks("") == []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.from_regex(r"[a-z]{2,8}( [a-z]{2,8}){1,6}\?", fullmatch=True), min_size=1, max_size=8),
    st.integers(1, 90),
    st.sampled_from(["{}. {}", "{}) {}", "Task {}: {}", "**{}.** {}"]),
)
def test_what_is_written_as_a_list_is_read_again(tasks: list[str], first: int, form: str) -> None:
    assert parse_tasks("\n".join(form.format(i, task) for i, task in enumerate(tasks, first))) == tasks


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300))
def test_no_text_is_too_odd(text: str) -> None:
    assert all(task.strip() for task in parse_tasks(text))


def test_parsing_takes_no_longer_for_hostile_marks() -> None:
    assert parse_tasks("-" * 50_000 + "\n" + "*# " * 20_000) == []


def test_what_cannot_be_asked_of_a_language_model_is_left_out() -> None:
    assert unfit("Explain tides to a child.") is None
    assert unfit("Summarise the plot of Hamlet, and draw a conclusion.") is None
    assert unfit("解释潮汐的成因。") is None
    assert unfit("Sort this") == "short"
    assert unfit("word " * 151) == "long"
    assert unfit("Describe what you see in the attached image.") == "needs_more_than_text"
    assert unfit("I'm sorry, but I can't invent tasks.") == "refusal"


def test_seeds_are_read_in_the_forms_people_have(tmp_path: Path) -> None:
    path = tmp_path / "seeds.jsonl"
    path.write_text(
        '{"instruction": "Sort.", "instances": [{"input": "b a", "output": "a b"}]}\n'
        '{"instruction": "Rhyme.", "input": "house"}\n{"prompt": "Why?"}\n'
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'
    )
    assert read_seeds(path, ErrorPolicy("stop")) == ["Sort.\n\nb a", "Rhyme.\n\nhouse", "Why?", "Hi"]
    path.write_text('{"prompt": "Why?"}\n{"answer": 3}\n')
    with pytest.raises(DanluError, match=r"seeds.jsonl:2: has no prompt"):
        read_seeds(path, ErrorPolicy("stop"))
    skipping = ErrorPolicy("skip")
    assert read_seeds(path, skipping) == ["Why?"]
    assert skipping.count == 1
