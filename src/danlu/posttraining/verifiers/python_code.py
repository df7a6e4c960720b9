"""Whether Python code parses, and whether it does what tests say.

Fields of a row, all but ``tests`` optional:

- ``stub``: code that the answer goes on with, such as a signature and a docstring; a string prompt counts as one when
  it ends in the head of a function. The answer is then the body, or the whole function once more.
- ``entry_point``: name of the function that is asked for (by default the last one of the stub).
- ``tests``: assertions or doctests (text, or a list of texts), see ``sandbox/harness.py: read_tests``.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from danlu.data.mining import parse
from danlu.posttraining.verifiers.base import (
    FieldError,
    OneByOne,
    Sample,
    Verdict,
    fenced_blocks,
    optional_text,
    without_thoughts,
)
from danlu.posttraining.verifiers.sandbox import Sandbox
from danlu.posttraining.verifiers.workers import WorkerError

MAX_ANSWER, MAX_TESTS = 20_000, 100_000
"""Characters; longer source is not handed to the parser, which recurses on it."""
TOO_LONG = f"has more than {MAX_ANSWER} characters"

HEAD = re.compile(r"^[ \t]*(?:async[ \t]+)?def[ \t]+(\w+)", re.MULTILINE)


class PythonParses(OneByOne):
    """1 where the answer's code parses (as the function that is asked for, where one is), else 0. It is never run."""

    def one(self, sample: Sample) -> Verdict:
        from danlu.evaluation.code import verdict

        task, answer = task_of(sample)
        if len(answer) > MAX_ANSWER:
            return Verdict(0.0, TOO_LONG)
        if task.stub is None or task.name is None:
            return _parses(code_in(answer, task.name), task.name)
        function = task.function(answer)
        parses, _ = verdict(function, task.name)
        return Verdict(float(parses), "" if parses else f"{task.name} has no body, or does not parse")


class PythonTests:
    """Runs the row's tests on the answer in a sandbox.

    Args:
        sandbox: where; it is closed with this.
        fraction: give the share of tests that hold; else 1 where all do and 0 otherwise. An answer that hangs or ends
            its process has none.
    """

    def __init__(self, sandbox: Sandbox, fraction: bool) -> None:
        self._sandbox, self._fraction = sandbox, fraction

    def judge(self, samples: Sequence[Sample]) -> list[Verdict]:
        verdicts: dict[int, Verdict] = {}
        jobs: dict[int, tuple[str, str, str | None]] = {}
        for i, sample in enumerate(samples):
            try:
                tests = tests_of(sample.row)
                task, answer = task_of(sample)
            except FieldError as error:
                verdicts[i] = Verdict(None, str(error))
                continue
            if not answer.strip() or len(answer) > MAX_ANSWER:
                verdicts[i] = Verdict(0.0, TOO_LONG if answer.strip() else "holds no code")
            else:
                jobs[i] = (task.program(answer), tests, task.name)
        for i, outcome in zip(jobs, self._sandbox.run(list(jobs.values())), strict=True):
            if isinstance(outcome, WorkerError):
                verdicts[i] = Verdict(None, f"the sandbox {outcome}")
            elif not outcome.total:
                verdicts[i] = Verdict(None, outcome.reason)
            else:
                share = outcome.passed / outcome.total
                verdicts[i] = Verdict(share if self._fraction else float(share == 1), outcome.reason)
        return [verdicts[i] for i in range(len(samples))]

    def close(self) -> None:
        self._sandbox.close()


def tests_of(row: Mapping[str, object]) -> str:
    """The tests of a row.

    Raises:
        FieldError: there are none.
    """
    tests = row.get("tests")
    if isinstance(tests, list) and all(isinstance(test, str) for test in tests):
        tests = "\n".join(tests)
    if not isinstance(tests, str) or not tests.strip():
        raise FieldError("the row's field 'tests' is missing; it holds assertions or doctests")
    if len(tests) > MAX_TESTS:
        raise FieldError(f"the row's tests have more than {MAX_TESTS} characters")
    return tests


@dataclass(frozen=True)
class CodeTask:
    """What code is asked for.

    Attributes:
        stub: what the answer goes on with; None: the answer stands alone.
        name: of the function, where it is known.
    """

    stub: str | None
    name: str | None

    def function(self, answer: str) -> str:
        """The function alone, as an answer writes or completes it; judged as `danlu evaluate` judges functions."""
        from danlu.evaluation.code import function_in

        assert self.name is not None
        found = function_in(answer, self.name)
        return self._completed(answer)[self._start() :] if found is None else "".join(found)

    def program(self, answer: str) -> str:
        """All code: what the stub brings, what the answer adds."""
        code = code_in(answer, self.name)
        if self.stub is None:
            return code
        if self.name in HEAD.findall(code):
            return self.stub[: self._start()] + textwrap.dedent(code)
        return self._completed((fenced_blocks(answer) or [answer])[-1])

    def _start(self) -> int:
        """Where the function begins in the stub."""
        assert self.stub is not None
        return next((head.start() for head in HEAD.finditer(self.stub) if head[1] == self.name), 0)

    def _completed(self, body: str) -> str:
        """The stub with a body, whichever way it is indented; it ends where a line leaves it."""
        from danlu.evaluation.code import inside

        assert self.stub is not None
        header = self.stub.rstrip()
        body = self.stub[len(header) :].rpartition("\n")[2] + body  # the stub may have begun its first line
        if body.lstrip("\n")[:1].isspace():
            body = inside(body)
        in_place = textwrap.indent(textwrap.dedent(body), body_indentation(self.stub))
        return f"{header}\n{inside(in_place)}"


def task_of(sample: Sample) -> tuple[CodeTask, str]:
    """What a row asks for, and the answer without thoughts.

    Raises:
        FieldError: a field of the row is no text.
    """
    stub, name = optional_text(sample.row, "stub"), optional_text(sample.row, "entry_point")
    if stub is None and isinstance(sample.prompt, str) and _is_open(sample.prompt):
        stub = sample.prompt
    heads = HEAD.findall(stub or "")
    return CodeTask(stub, name or (heads[-1] if heads else None)), without_thoughts(sample.answer)


def _parses(source: str, name: str | None) -> Verdict:
    """Of code that stands alone."""
    tree = parse(source)
    if tree is None or not tree.body:
        return Verdict(0.0, "does not parse" if tree is None else "holds no code")
    functions = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    found = [node for node in functions if name in (None, node.name)]
    if name is not None and not any(len(node.body) > (ast.get_docstring(node) is not None) for node in found):
        return Verdict(0.0, f"does not define {name}, or without a body")
    return Verdict(1.0)


def code_in(answer: str, name: str | None) -> str:
    """The code of an answer: the last fenced block (that defines the function), or all of it where none is fenced."""
    blocks = fenced_blocks(answer)
    defining = [block for block in blocks if name is not None and name in HEAD.findall(block)]
    return (defining or blocks or [answer])[-1]


def body_indentation(stub: str) -> str:
    """Of the last function of a stub: that of its docstring, or four spaces more than its head."""
    heads = list(HEAD.finditer(stub))
    behind = stub[heads[-1].end() :] if heads else stub
    docstring = re.search(r"^([ \t]+)[rRuU]?(?:\"\"\"|'''|\"|')", behind, re.MULTILINE)
    if docstring is not None:
        return docstring[1]
    head = heads[-1][0] if heads else ""
    return head[: len(head) - len(head.lstrip())] + "    "


def _is_open(prompt: str) -> bool:
    """Whether a text is code that ends in the head of a function."""
    if HEAD.search(prompt) is None or len(prompt) > MAX_ANSWER:
        return False
    return parse(f"{prompt.rstrip()}\n{body_indentation(prompt)}pass\n") is not None
