"""Filters: what they must take, and, more important, what they must leave alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from danlu.config import load
from danlu.data.prompts import prompt_of
from danlu.posttraining.synth.candidates import Candidate, Question
from danlu.posttraining.synth.config import SynthConfig
from danlu.posttraining.synth.filters import (
    apply_filters,
    check_answers,
    choose,
    drop_duplicates,
    filters_of,
    report,
)
from danlu.posttraining.synth.jobs import Answer, Job
from danlu.posttraining.synth.refusals import is_refusal
from danlu.posttraining.synth.rows import held_out, order_by_difficulty
from danlu.posttraining.verifiers import Verifiers


def config(**changes: Any) -> SynthConfig:
    return load(SynthConfig, values={"teacher": "t", "out": "out", "data": "data", **changes})


def candidate(number: int, asked: str, text: str, sample: int = 0, finish: str = "stop", **row: Any) -> Candidate:
    fields: Mapping[str, Any] = {"prompt": asked, **row}
    prompt = prompt_of(fields, f"p.jsonl:{number + 1}")
    job = Job(prompt.messages, sample, prompt.where)
    return Candidate(Question(number, prompt, prompt.messages, "none", None), sample, job, Answer(text, finish))


def dropped(candidates: list[Candidate]) -> list[str | None]:
    return [None if c.dropped is None else c.dropped[0] for c in candidates]


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but I cannot assist with that request.",
        "Sorry, I am unable to provide medical advice.",
        "I apologize, but I can't do that.",
        "My apologies, but as a helpful assistant I won't write this.",
        "Unfortunately, I cannot fulfill this request.",
        "I can't assist with that.",
        "I am not able to browse or access the internet.",
        "As an AI language model, I do not have personal opinions.",
        "<think>They want a bomb.</think>\nI cannot help with this.",
        "抱歉，我无法回答这个问题。",
        "很抱歉，作为一个人工智能，我不能提供医疗建议。",
        "对不起，这个问题我不能回答。",
        "我无法提供这方面的信息。",
        "作为一个AI语言模型，我没有个人观点。",
    ],
)
def test_refusals_are_seen(text: str) -> None:
    assert is_refusal(text) is not None


@pytest.mark.parametrize(
    "text",
    [
        "Dear Ann, I'm sorry for your loss. Please call me if you need anything.",
        "A penguin can't fly, but it swims very well.",
        "The function cannot help here, since it is pure.",
        "I can help with that! First, open the file.",
        "In the play, Juliet says: 'I cannot be Capulet'.",
        "<think>I can't help but notice that 17 + 25 is 42.</think>\nIt is 42.",
        "AI stands for artificial intelligence. As an AI term, 'model' means a function with parameters.",
        "Sorry is a word that people say when they regret something.",
        "我们无法看到空气，但是可以感受到风。",
        "他说：“对不起”，然后离开了。",
        "人工智能是计算机科学的一个分支。",
    ],
)
def test_answers_are_not_taken_for_refusals(text: str) -> None:
    assert is_refusal(text) is None


def test_each_filter_takes_its_own_and_tells_how_many() -> None:
    settings = config(min_words=2, max_words=400)
    loop = "the sky is blue because the sky is blue and " * 20
    code = "It prints:\n```\n" + "print(1)\n" * 200 + "```\nand that is all there is to say about it."
    candidates = [
        candidate(0, "a", "Two words."),
        candidate(1, "b", "It goes on and", finish="length"),
        candidate(2, "c", " \n"),
        candidate(3, "d", "One."),
        candidate(4, "e", " ".join(str(i) for i in range(401))),
        candidate(5, "f", "I'm sorry, but I can't do that."),
        candidate(6, "g", "It is", finish="content_filter"),
        candidate(7, "h", loop),
        candidate(8, "i", code.replace("\n" * 2, "\n")),
        candidate(9, "j", "天空是蓝色的"),
    ]
    apply_filters(candidates, filters_of(settings))
    expected = [None, "cut_off", "empty", "short", "long", "refusal", "refusal", "repetition", "long", None]
    assert dropped(candidates)[:8] == expected[:8]
    assert dropped(candidates)[9] is None
    counts = {f["name"]: f["documents_removed"] for f in report(candidates, settings)}
    assert counts["refusal"] == 2
    assert sum(counts.values()) == sum(c.dropped is not None for c in candidates)
    assert "wrong" not in counts


def test_code_may_repeat_itself() -> None:
    text = "Here is a table:\n```python\n" + "x.append(1)\nx.append(2)\n" * 30 + "```\nThe list has sixty entries then."
    (one,) = candidates = [candidate(0, "a", text)]
    apply_filters(candidates, filters_of(config()))
    assert one.dropped is None


def test_a_filter_that_is_left_out_takes_nothing() -> None:
    candidates = [candidate(0, "a", "I can't help with that."), candidate(1, "a!", "I can't help with that.")]
    settings = config(without=["refusal", "duplicate", "near_duplicate"])
    apply_filters(candidates, filters_of(settings))
    drop_duplicates(candidates, settings)
    assert dropped(candidates) == [None, None]


def test_answers_are_checked_against_the_fields_of_their_row_and_what_cannot_be_judged_is_not_kept() -> None:
    candidates = [
        candidate(0, "17+25", "The answer is 42.", answer="42"),
        candidate(1, "17+26", "The answer is 42.", answer="43"),
        candidate(2, "17+27", "The answer is 44."),
    ]
    with Verifiers.open(["math-equal"]) as verifiers:
        check_answers(candidates, verifiers, None)
    assert dropped(candidates) == [None, "wrong", "unjudged"]
    assert candidates[1].dropped is not None
    assert "not '43'" in candidates[1].dropped[1]


def test_first_best_and_all() -> None:
    def scored() -> list[Candidate]:
        found = [candidate(0, "a", f"answer {i}", i) for i in range(4)]
        for one, score in zip(found, (9.0, 0.5, 2.0, 2.0), strict=True):
            one.score = score
        found[0].dropped = "refusal", "says no"
        return found

    for keep, expected in (("first", [1]), ("best", [2]), ("all", [1, 2, 3])):
        candidates = scored()
        choose(candidates, keep)
        assert [c.sample for c in candidates if c.dropped is None] == expected
        assert candidates[0].dropped == ("refusal", "says no")


def test_duplicates_are_of_prompt_and_answer_together() -> None:
    long = "Light of short waves is scattered far more by the molecules of the air than light of long waves is, which "
    candidates = [
        candidate(0, "What is 6 times 7?", "42"),
        candidate(1, "What is 40 plus 2?", "42"),
        candidate(2, "Why is the sky blue?", long * 1 + "is why it is blue."),
        candidate(3, "why is the sky blue?", long * 1 + "is why it is so blue."),
        candidate(4, "What is 6 times 7?", " 42"),
    ]
    found = drop_duplicates(candidates, config())
    assert dropped(candidates) == [None, None, None, "near_duplicate", "duplicate"]
    assert found.copy_of.tolist() == [0, 1, 2, 2, 0]


def test_what_is_held_out_is_related_to_nothing_that_is_trained_on() -> None:
    text = "The {} of the river bank grows in wet earth and flowers early in the year when the days get longer again."
    candidates = [candidate(i // 2, f"about {i // 2}", text.format(f"plant {i}"), i % 2) for i in range(4)]
    candidates += [
        candidate(2 + i, f"number {i * 977}", f"{i * 31} is what {i * 7919} minus it makes") for i in range(40)
    ]
    settings = config(heldout=0.1)
    found = drop_duplicates(candidates, settings)
    held = held_out(candidates, found, settings)
    kept = [c for c in candidates if c.dropped is None]
    assert 1 <= len({c.question.number for c in kept} & held) <= 6
    assert len({0 in held, 1 in held}) == 1  # alike, so on one side
    assert held == held_out(candidates, found, settings)


def test_a_question_is_held_out_with_all_that_any_of_its_answers_is_like() -> None:
    text = "The iris of the river bank grows in wet earth and flowers early in the year when the days get longer {}."
    candidates = [candidate(0, "a", "An iris is something else.", 0), candidate(0, "a", text.format("again"), 1)]
    candidates += [candidate(1, "b", text.format("and the nights are still cold"))]
    candidates += [
        candidate(i, f"number {i * 977}", f"{i * 31} is what {i * 7919} minus it makes") for i in range(2, 12)
    ]
    found = drop_duplicates(candidates, config())
    held = [held_out(candidates, found, config(heldout=0.3, seed=seed)) for seed in range(12)]
    assert {0 in one for one in held} == {True, False}
    assert all((0 in one) == (1 in one) for one in held)


def test_a_single_row_is_for_training() -> None:
    candidates = [candidate(0, "a", "b")]
    assert held_out(candidates, drop_duplicates(candidates, config()), config()) == set()


def test_curriculum_goes_from_easy_to_hard_in_stages_of_one_size() -> None:
    candidates = [candidate(i, "q", "word " * n) for i, n in enumerate((9, 1, 5, 7, 3, 2))]
    order_by_difficulty(candidates, [], config(curriculum="length", stages=3))
    assert [c.difficulty for c in candidates] == [2, 3, 4, 6, 8, 10]
    assert [c.stage for c in candidates] == [1, 1, 2, 2, 3, 3]

    asked = [candidate(i // 4, "q", "word", i % 4) for i in range(12)]
    for i in (0, 1, 2, 4):
        asked[i].dropped = "wrong", "no"
    asked[3].dropped = "spare", "another was kept"
    kept = [asked[3], asked[5], asked[8]]
    order_by_difficulty(kept, asked, config(curriculum="pass-rate", n=4, keep="all"))
    assert [(c.question.number, c.difficulty) for c in kept] == [(2, 0.0), (1, 0.25), (0, 0.75)]
