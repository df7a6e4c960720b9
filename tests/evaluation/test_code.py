"""What counts as code: cutting answers, judging them, and drawing the functions that are asked for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from danlu.data.folder import DataFolder, Document, ShardWriter
from danlu.data.mining import functions_with_docstrings
from danlu.engine.generate import Completion, FinishReason
from danlu.evaluation.code import (
    MAX_SOURCE,
    Sample,
    Task,
    code_metrics,
    draw_tasks,
    function_in,
    inside,
    judge,
    verdict,
)
from danlu.formats.card import Card

SOURCE = '''
class Stack:
    """A stack."""

    def push(
        self,
        item,
    ):
        """Put an item on top of it.

        It may be anything.
        """
        # on top
        self.items.append(item)
        return self
'''
STUB = '''def push(
    self,
    item,
):
    """Put an item on top of it.

    It may be anything.
    """
'''


@pytest.fixture
def task() -> Task:
    (function,) = functions_with_docstrings(SOURCE)
    return Task("stack.py", function)


def plain(task: Task, text: str, reason: FinishReason = "stop") -> Sample:
    return judge(task, Completion(text, [], reason), "plain")


def chat(task: Task, text: str, reason: FinishReason = "stop") -> Sample:
    return judge(task, Completion(text, [], reason), "chat")


def test_the_prompt_is_the_source_up_to_the_body(task: Task) -> None:
    assert task.stub == STUB
    assert task.indentation == "    "
    assert task.stub + task.function.body == task.function.source
    sample = plain(task, task.function.body.lstrip())
    assert (sample.path, sample.name, sample.prompt) == ("stack.py", "Stack.push", STUB)
    assert sample.completion.rstrip() == sample.reference.rstrip()
    assert sample.parses
    assert sample.compiles


@pytest.mark.parametrize(
    ("text", "parses", "compiles"),
    [
        ("self.items.append(item)\n", True, True),
        ("if item:\n        return 1\n    return 2\n", True, True),
        ("if item:\n    return 1\n", False, False),  # the indentation of the first line was given
        ("return [\n        1,\n]\n", True, True),  # a bracket may close at the margin
        ("break\n", True, False),
        ("await item\n", True, False),
        ("self.items.append(item\n", False, False),
        ("", False, False),
        ("# nothing\n", False, False),
        ('"""Another text."""\n', True, True),
        ("x = '\0'\n", False, False),
    ],
)
def test_bodies_are_judged_by_parser_and_compiler(task: Task, text: str, parses: bool, compiles: bool) -> None:
    sample = plain(task, text)
    assert (sample.parses, sample.compiles) == (parses, compiles)


def test_the_body_ends_where_the_function_ends(task: Task) -> None:
    sample = plain(task, "return 1\n\n    # still inside\n    pass\n\n\ndef pop(self:\n    broken\n")
    assert sample.completion == "    return 1\n\n    # still inside\n    pass\n"
    assert sample.parses
    assert inside("x = 1\n") == "\n"
    assert inside("    f(\n)\n@decorator\n") == "    f(\n)\n"


def test_a_line_that_the_limit_cut_is_dropped(task: Task) -> None:
    assert plain(task, "x = 1\n    return [x", "length").completion == "    x = 1\n"
    assert plain(task, "x = 1\n    return [x", "length").parses
    assert not plain(task, "x = 1\n    return [x", "stop").parses
    assert not plain(task, "return 1", "length").parses  # nothing is left


ANSWER = "def push(\n    self,\n    item,\n):\n    self.items.append(item)\n"


@pytest.mark.parametrize(
    "text",
    [
        ANSWER,
        f"Sure, here it is:\n\n```python\n{ANSWER}```\nIt appends. def push(x): no\n",
        f"```\n{ANSWER}",
        f"import this\n\n{ANSWER}\n\nprint(push)\n",
        "class Stack:\n    " + ANSWER.replace("\n    ", "\n        ").replace("\n)", "\n    )"),
        "self.items.append(item)\n",  # the body alone
        "    self.items.append(item)\n",
    ],
)
def test_functions_are_found_in_answers_of_a_chat(task: Task, text: str) -> None:
    sample = chat(task, text)
    assert sample.completion == "    self.items.append(item)\n"
    assert sample.parses
    assert sample.compiles


def test_an_answer_without_the_function_is_none(task: Task) -> None:
    assert not chat(task, "I cannot write code.").parses
    assert not chat(task, "def push(self, item):\n").parses
    assert not chat(task, "def push(self, item)\n    return 1\n").parses
    assert function_in("def push_all(self):\n    pass\n", "push") is None


def test_hostile_source_is_refused_and_never_run(task: Task, recwarn: pytest.WarningsRecorder, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    assert verdict(f"def f(x=open({str(trap)!r}, 'w')):\n    return 1\n", "f") == (True, True)
    assert not trap.exists()
    for body in ("-" * 15000 + "1", "(" * 9000, "x" + ".a" * 9000, "not " * 4500 + "x", "\ud800", "9" * 9000, "\0"):
        assert verdict(f"def f(x):\n    return {body}\n", "f") == (False, False)
    assert verdict("def f(x):\n    return 1\n" + " " * MAX_SOURCE, "f") == (False, False)
    assert verdict("def f(x):\n    return x is 1 or '\\d'\n", "f") == (True, True)
    assert not recwarn.list


def test_trivial_answers_are_seen() -> None:
    sample = Sample("a.py", "f", "", "    pass\n", "", True, True)
    other = Sample("a.py", "g", "", "    x = 1\n    y = \n", "", False, False)
    metrics = code_metrics([sample, sample, sample, other])
    assert metrics == {
        "functions": 4, "parse_rate": 0.75, "compile_rate": 0.75, "distinct_rate": 0.5, "mean_body_lines": 1.25,
    }  # fmt: skip


def test_functions_are_drawn_by_seed_from_held_out_modules_alone(tmp_path: Path) -> None:
    def module(split: str, number: int) -> Document:
        text = "\n\n".join(
            f'def {split}_{number}_{i}(x):\n    """Add {number} and {i} to the argument."""\n    y = x + {number}\n'
            f"    return y + {i} * {len(split)}"
            for i in range(5)
        )
        return Document(id=f"{split}{number}", text=text, path=f"{split}{number}.py")

    for split in ("train", "heldout"):
        with ShardWriter(tmp_path, split) as writer:
            for number in range(3):
                writer.write(module(split, number))
        with ShardWriter(tmp_path, split) as writer:
            pass
    names = [p.name for p in tmp_path.iterdir()]
    Card("data", "data build", "0", {}, files={n: {"bytes": (tmp_path / n).stat().st_size} for n in names}).save(
        tmp_path
    )
    data = DataFolder(tmp_path)
    drawn = [task.function.name for task in draw_tasks(data, 0)]
    assert sorted(drawn) == sorted(f"heldout_{n}_{i}" for n in range(3) for i in range(5))
    assert drawn == [task.function.name for task in draw_tasks(data, 0)]
    assert drawn != [task.function.name for task in draw_tasks(data, 1)]
    for task in draw_tasks(data, 0):
        ast.parse(task.stub + task.function.body)
