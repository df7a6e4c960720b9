"""Can the model write code? It gets signatures and docstrings of held-out functions and writes the bodies.

Nothing that a model wrote is ever run. A function counts as parsed if Python's parser takes it and it has a body
besides a docstring, and as compiled if the compiler takes it too (which refuses `break` outside of loops, say). Both
are easy to please with the same trivial body again and again, so the share of distinct bodies and their length are
measured beside them.
"""

from __future__ import annotations

import ast
import contextlib
import random
import re
import string
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from danlu.data.mining import (
    MineConfig,
    MinedFunction,
    functions_with_docstrings,
    make_filters,
    prompt_for,
    python_modules,
)
from danlu.engine.config import SamplingParams
from danlu.engine.generate import Completion, Prompt, generate_text
from danlu.models.causal_lm import CausalLM

if TYPE_CHECKING:
    from danlu.data.folder import DataFolder
    from danlu.tokenizer.tokenizer import Tokenizer

MAX_SOURCE = 20_000
"""Characters; longer source is not handed to the parser, which recurses on it."""

INSTRUCTION_TOKENS = 64
"""What an instruction and the chat template add to signature and docstring, at most."""

OUTSIDE = tuple("\n" + c for c in string.ascii_letters + string.digits + string.punctuation if c not in ")]}")
"""The start of a line that leaves a function's body: not indented, and not the end of a bracket."""


@dataclass(frozen=True)
class Task:
    """A held-out function: the model is given its signature and docstring."""

    path: str
    function: MinedFunction

    @property
    def stub(self) -> str:
        """Signature and docstring as they stand in the file."""
        return self.function.source.removesuffix(self.function.body).rstrip() + "\n"

    @property
    def indentation(self) -> str:
        """Of the docstring, and so of the body."""
        behind_signature = self.function.source.removeprefix(self.function.signature).lstrip("\n")
        return behind_signature[: len(behind_signature) - len(behind_signature.lstrip(" \t"))]


@dataclass(frozen=True)
class Sample:
    """What the model made of a function. ``prompt`` is signature and docstring; the others are bodies."""

    path: str
    name: str
    prompt: str
    completion: str
    reference: str
    parses: bool
    compiles: bool


def write_functions(
    model: CausalLM,
    tokenizer: Tokenizer,
    data: DataFolder,
    *,
    functions: int,
    prompt_format: Literal["plain", "chat"],
    params: SamplingParams,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[Sample]:
    """Let the model write the bodies of held-out functions.

    Args:
        data: its held-out Python modules are taken.
        functions: how many are drawn, with ``params.seed``; fewer where there are fewer. The choice does not depend on
            the prompt format, so that stages of one model are asked for the same.
        prompt_format: ``plain`` lets the model continue source code; ``chat`` asks as mined instructions ask.
        params: of the sampling; function ``i`` is sampled with seed ``params.seed + i``.
    """
    seed = params.seed or 0
    max_prompt = model.config.context - params.max_new_tokens - INSTRUCTION_TOKENS
    tasks: list[Task] = []
    for task in draw_tasks(data, seed):
        if len(tasks) == functions:
            break
        if len(tokenizer.encode(task.stub)) <= max_prompt:
            tasks.append(task)
    prompts: list[Prompt]
    if prompt_format == "chat":
        prompts = [tokenizer.encode_chat(prompt_for(task.function), add_generation_prompt=True) for task in tasks]
    else:
        # The indentation belongs to the prompt: newline and indentation are one token, and the model has only ever
        # seen them so.
        prompts = [task.stub + task.indentation for task in tasks]
        params = replace(params, stop=OUTSIDE)
    completions = generate_text(
        model,
        tokenizer,
        prompts,
        [replace(params, seed=seed + i) for i in range(len(prompts))],
        batch_size=batch_size,
        progress=progress,
    )
    return [judge(task, completion, prompt_format) for task, completion in zip(tasks, completions, strict=True)]


def draw_tasks(data: DataFolder, seed: int) -> list[Task]:
    """All held-out functions that could have been mined for instructions, in random order."""
    config, filters = MineConfig(data=Path(), out=Path()), make_filters()
    tasks: dict[tuple[str, str], Task] = {}
    for _, path, _, text in python_modules(data, "heldout"):
        for function in functions_with_docstrings(text):
            if all(reason.check(function, path, config) for reason in filters):
                tasks.setdefault((path, function.qualname), Task(path, function))
    order = list(tasks.values())
    random.Random(seed).shuffle(order)
    return order


def judge(task: Task, completion: Completion, prompt_format: Literal["plain", "chat"]) -> Sample:
    """Cut the function out of what the model wrote and hand it to parser and compiler."""
    text = completion.text
    if completion.finish_reason == "length":  # the last line was cut off by the limit, not by the model
        text = text[: text.rfind("\n") + 1]
    header, body = task.stub, inside(task.indentation + text)
    if prompt_format == "chat":
        in_place = textwrap.indent(textwrap.dedent(text), task.indentation)
        header, body = function_in(text, task.function.name) or (task.stub, inside(in_place))
    function = task.function
    return Sample(task.path, function.qualname, task.stub, body, function.body, *verdict(header + body, function.name))


def function_in(answer: str, name: str) -> tuple[str, str] | None:
    """Signature and body of a function within an answer, fenced or not; None where it is not defined."""
    fenced = re.search(r"^```[^\n]*\n(.*?)(?:^```|\Z)", answer, re.DOTALL | re.MULTILINE)
    code = fenced[1] if fenced else answer
    header = rf"^[ \t]*(?:async[ \t]+)?def[ \t]+{re.escape(name)}\b.*?:[ \t]*(?:#[^\n]*)?(?:\n|\Z)"
    found = re.search(header, code, re.DOTALL | re.MULTILINE)
    if found is None:
        return None
    code = textwrap.dedent(code[found.start() :])
    found = re.match(header, code, re.DOTALL)
    assert found is not None  # dedenting moves it, no more
    return found[0], inside(code[found.end() :])


def inside(text: str) -> str:
    """The lines up to the first that leaves a function's body, without blank ones at the end."""
    ends = [end for outside in OUTSIDE if (end := f"\n{text}".find(outside)) >= 0]
    return text[: min(ends)].rstrip() + "\n" if ends else text.rstrip() + "\n"


def verdict(source: str, name: str) -> tuple[bool, bool]:
    """Whether source parses as one function of that name with more in it than a docstring, and whether it compiles too.

    The code object is thrown away, never run.
    """
    parses = compiles = False
    refusals = (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError)
    with contextlib.suppress(*refusals), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parses = len(source) <= MAX_SOURCE and _is_function(ast.parse(source), name)
        if parses:
            compile(source, "<generated>", "exec", dont_inherit=True)
            compiles = True
    return parses, compiles


def _is_function(tree: ast.Module, name: str) -> bool:
    match tree.body:
        case [ast.FunctionDef() | ast.AsyncFunctionDef() as function]:
            return function.name == name and len(function.body) > (ast.get_docstring(function) is not None)
    return False


def code_metrics(samples: list[Sample]) -> dict[str, float]:
    """Shares of all functions asked for; ``distinct_rate`` is the share of different bodies among them."""
    n = len(samples)
    bodies = [sample.completion.strip() for sample in samples]
    return {
        "functions": n,
        "parse_rate": sum(sample.parses for sample in samples) / n,
        "compile_rate": sum(sample.compiles for sample in samples) / n,
        "distinct_rate": len(set(bodies)) / n,
        "mean_body_lines": sum(len(body.splitlines()) for body in bodies) / n,
    }
