"""Prompts in every form that data sets have them in, and the order they are asked in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from danlu.data.prompts import PromptOrder, prompt_of, read_prompts
from danlu.errors import DanluError
from danlu.tokenizer.tokenizer import Tokenizer

ASKED = [{"role": "user", "content": "2 + 2?"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?"},
        {"prompt": ASKED},
        {"question": "2 + 2?", "answer": "4"},
        {"messages": ASKED},
        {"messages": [*ASKED, {"role": "assistant", "content": "4"}]},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
    ],
)
def test_forms(row: dict[str, Any]) -> None:
    found = prompt_of(row, "x:1")
    assert found.messages == ASKED
    assert found.row.get("answer", "4") == "4"


def test_more_forms() -> None:
    assert prompt_of({"instruction": "Add.", "input": "2 2"}, "").messages[0]["content"] == "Add.\n\n2 2"
    assert [m["role"] for m in prompt_of({"problem": "x", "system": "Be brief."}, "").messages] == ["system", "user"]
    assert prompt_of({"text": "def f("}, "").text == "def f("
    kept = {"messages": [*ASKED, {"role": "assistant", "content": "4"}], "answer": "four"}
    assert prompt_of(kept, "").row["answer"] == "four"


@pytest.mark.parametrize(
    ("row", "message"),
    [({}, "has no prompt"), ({"prompt": ""}, "empty"), ({"prompt": 3}, "no text"), ({"text": ""}, "no prompt"),
     ({"prompt": [{"role": "user"}, {"role": "user", "content": "x"}]}, "a:7")],
)  # fmt: skip
def test_what_is_no_prompt(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DanluError, match=message):
        prompt_of(row, "a:7")


def test_reading(tmp_path: Path, model_folder: Path) -> None:
    rows = [{"prompt": f"what is {i}?"} for i in range(50)] + [{"prompt": "long " * 400}, {"no": "prompt"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = Tokenizer.load(model_folder)
    with pytest.raises(DanluError, match=r"prompts\.jsonl:52"):
        read_prompts(path, tokenizer, longest=200)
    train, held_out = read_prompts(path, tokenizer, longest=200, on_error="skip")
    assert len(train) + len(held_out) == 50
    assert 0 < len(held_out) < 20
    for prompt in train:
        assert prompt.ids == tokenizer.encode_chat(prompt.messages, add_generation_prompt=True)
    again, _ = read_prompts(path, tokenizer, longest=200, on_error="skip")
    assert again == train
    with pytest.raises(DanluError, match="no prompt is left"):
        read_prompts(path, tokenizer, longest=2, on_error="skip")


def test_order() -> None:
    order = PromptOrder(7, seed=3)
    first = [order.take(3) for _ in range(7)]
    flat = [i for part in first for i in part]
    assert [sorted(flat[k : k + 7]) for k in (0, 7, 14)] == [list(range(7))] * 3
    assert flat[:7] != flat[7:14]
    other = PromptOrder(7, seed=3)
    other.restore({"epoch": 1, "row": 2})
    assert other.take(3) == first[3]


def test_a_curriculum_begins_with_what_is_easy() -> None:
    difficulties = [float(i) for i in range(100)]
    order = PromptOrder(100, 0, difficulties)
    tenths = [sorted(order.take(10)) for _ in range(10)]
    assert tenths == [list(range(10 * k, 10 * k + 10)) for k in range(10)]
    assert sorted(order.take(10)) != list(range(10))  # from the second pass on, all mixed
