"""What an answer is worth, found by checking it: rewards that need no second model.

Verifiers are named by specs, each with a weight where one is wanted::

    with Verifiers.open(["0.8*python-tests", "0.2*think-format"]) as verifiers:
        judgements = verifiers.judge([Sample(prompt, answer, row), ...])

| spec | the answer's score | fields of the row |
|---|---|---|
| python-parses | 1 where its code parses | stub, entry_point (optional) |
| python-tests, python-tests=fraction | 1 where the tests hold, or the share that does | tests; stub, entry_point |
| math-equal, math-equal=FIELD | 1 where its result is the expected one | answer, or FIELD |
| json-schema | 1 where it is JSON that the schema admits | schema |
| rouge-l, rouge-l=FIELD | 0 to 1, how much it has in common with the expected one (ROUGE-L F1) | answer, or FIELD |
| regex=PATTERN | 1 where the expression is found in it | |
| think-format, think-format=opened | 0, 1/4, ... 1 for thoughts and answer apart | |
| package.module:function | what a function of yours gives | any |
| model=FOLDER | what a reward model gives | |
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from danlu.errors import DanluError, MissingExtra, Problems
from danlu.posttraining.verifiers.base import Judgement, Sample, Verdict, Verifier, no_argument
from danlu.posttraining.verifiers.config import SandboxOptions

__all__ = ["Judgement", "Sample", "Verdict", "Verifiers", "model_folders"]

WEIGHT = re.compile(r"(-?(?:\d+(?:\.\d*)?|\.\d+))\s*\*\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Limits:
    """Of judging one answer, see :meth:`Verifiers.open`."""

    seconds: float
    memory_mib: int
    processes: int
    allow_weak_sandbox: bool


class Verifiers:
    """Several verifiers and their weights; made by :meth:`open`, and closed, for they hold processes."""

    def __init__(self, verifiers: dict[str, tuple[float, Verifier]]) -> None:
        self._verifiers = verifiers

    @classmethod
    def open(
        cls,
        specs: Sequence[str],
        *,
        seconds: float = 5.0,
        memory_mib: int = 512,
        processes: int | None = None,
        allow_weak_sandbox: bool = False,
    ) -> Self:
        """Start what the specs name.

        Args:
            specs: see the table above; ``0.5*SPEC`` counts half.
            seconds: for an answer, of each verifier that runs something: of processor time in the sandbox, by the clock
                for functions, expressions and schemas.
            memory_mib: the same, memory.
            processes: how many answers such a verifier judges at a time; default: one a processor.
            allow_weak_sandbox: run python-tests even where the sandbox cannot keep its promises.

        Raises:
            DanluError: a spec that is not known, or what it names cannot be used.
        """
        if not specs:
            raise DanluError(
                f"verifiers: none is named; known are {', '.join(sorted(MAKERS))}, package.module:function"
            )
        limits = Limits(seconds, memory_mib, processes or len(os.sched_getaffinity(0)), allow_weak_sandbox)
        verifiers: dict[str, tuple[float, Verifier]] = {}
        problems: list[str] = []
        for given in specs:
            weight, spec = _weight_and_spec(given)
            try:
                if spec in verifiers:
                    raise DanluError(f"verifier {spec!r}: is named twice; give it one weight")
                if weight == 0:
                    raise DanluError(f"verifier {given!r}: counts nothing; leave it out")
                verifiers[spec] = weight, make(spec, limits)
            except DanluError as error:
                problems.append(str(error))
        opened = cls(verifiers)
        if problems:
            opened.close()
            raise DanluError(problems[0]) if len(problems) == 1 else Problems("verifiers:", problems)
        return opened

    @classmethod
    def within(cls, options: SandboxOptions, specs: Sequence[str]) -> Self:
        """:meth:`open`, with the limits of a config."""
        return cls.open(
            specs,
            seconds=options.sandbox_seconds,
            memory_mib=options.sandbox_memory,
            allow_weak_sandbox=options.allow_weak_sandbox,
        )

    def judge(self, samples: Sequence[Sample]) -> list[Judgement]:
        """A judgement for each answer, whatever it holds."""
        verdicts = {spec: verifier.judge(samples) for spec, (_, verifier) in self._verifiers.items()}
        return [self._sum({spec: found[i] for spec, found in verdicts.items()}) for i in range(len(samples))]

    def _sum(self, verdicts: dict[str, Verdict]) -> Judgement:
        score: float | None = 0.0
        for spec, verdict in verdicts.items():
            if score is not None:
                score = None if verdict.score is None else score + self._verifiers[spec][0] * verdict.score
        missing = [f"{spec}: {verdict.reason}" for spec, verdict in verdicts.items() if verdict.score is None]
        return Judgement(
            score,
            {spec: verdict.score for spec, verdict in verdicts.items()},
            "; ".join(missing) or None,
            {spec: v.reason for spec, v in verdicts.items() if v.reason and v.score is not None},
        )

    def close(self) -> None:
        """End all processes."""
        for _, verifier in self._verifiers.values():
            verifier.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _weight_and_spec(given: str) -> tuple[float, str]:
    weighted = WEIGHT.fullmatch(given.strip())
    return (float(weighted[1]), weighted[2]) if weighted else (1.0, given.strip())


def model_folders(specs: Sequence[str]) -> list[Path]:
    """The reward models that specs name, as far as there are such folders."""
    named = [_weight_and_spec(given)[1].partition("=") for given in specs]
    return [path for name, _, folder in named if name == "model" and (path := Path(folder).expanduser()).is_dir()]


def make(spec: str, limits: Limits) -> Verifier:
    """The verifier that a spec (without a weight) names.

    Raises:
        DanluError: none, or what it names cannot be used.
    """
    from danlu.posttraining.verifiers.entry_point import NAME

    name, has_argument, argument = spec.partition("=")
    if name in MAKERS:
        return MAKERS[name](spec, argument if has_argument else None, limits)
    if NAME.fullmatch(spec):
        return _entry_point(spec, limits)
    near = difflib.get_close_matches(name, MAKERS, n=1)
    raise DanluError(
        f"verifier {spec!r}: is not known; "
        + (f"did you mean {near[0]}?" if near else f"choose {', '.join(sorted(MAKERS))} or package.module:function")
    )


def _entry_point(name: str, limits: Limits, **fixed: str) -> Verifier:
    from danlu.posttraining.verifiers.entry_point import EntryPoint

    return EntryPoint(
        name, seconds=limits.seconds, memory_mib=limits.memory_mib, processes=limits.processes, fixed=fixed
    )


def _python_parses(spec: str, argument: str | None, limits: Limits) -> Verifier:
    from danlu.posttraining.verifiers.python_code import PythonParses

    no_argument(spec, argument)
    return PythonParses()


def _python_tests(spec: str, argument: str | None, limits: Limits) -> Verifier:
    from danlu.posttraining.verifiers.python_code import PythonTests
    from danlu.posttraining.verifiers.sandbox import Sandbox

    if argument not in (None, "all", "fraction"):
        raise DanluError(f"verifier {spec!r}: expected python-tests (all must hold) or python-tests=fraction")
    sandbox = Sandbox(
        seconds=limits.seconds,
        memory_mib=limits.memory_mib,
        processes=limits.processes,
        allow_weak=limits.allow_weak_sandbox,
    )
    return PythonTests(sandbox, argument == "fraction")


def _math_equal(spec: str, argument: str | None, limits: Limits) -> Verifier:
    from danlu.posttraining.verifiers.math_equal import MathEqual

    return MathEqual(argument or "answer")


def _rouge_l(spec: str, argument: str | None, limits: Limits) -> Verifier:
    from danlu.posttraining.verifiers.text import RougeL

    return RougeL(argument or "answer")


def _json_schema(spec: str, argument: str | None, limits: Limits) -> Verifier:
    from importlib.util import find_spec

    no_argument(spec, argument)
    if find_spec("jsonschema") is None:
        raise MissingExtra("jsonschema", "verifiers", "the verifier json-schema")
    return _entry_point("danlu.posttraining.verifiers.json_schema:json_schema", limits)


def _regex(spec: str, argument: str | None, limits: Limits) -> Verifier:
    if not argument:
        raise DanluError("verifier regex: has no expression; write regex=PATTERN")
    try:
        re.compile(argument)
    except (re.error, RecursionError, OverflowError) as error:
        raise DanluError(f"verifier {spec!r}: is no regular expression ({error})") from None
    return _entry_point("danlu.posttraining.verifiers.text:regex", limits, pattern=argument)


def _think_format(spec: str, argument: str | None, limits: Limits) -> Verifier:
    from danlu.posttraining.verifiers.text import ThinkFormat

    if argument not in (None, "opened"):
        raise DanluError(f"verifier {spec!r}: expected think-format, or think-format=opened where the prompt opens it")
    return ThinkFormat(argument == "opened")


def _model(spec: str, argument: str | None, limits: Limits) -> Verifier:
    from danlu.posttraining.verifiers.reward_model import ModelScore

    if not argument:
        raise DanluError("verifier model: has no folder; write model=FOLDER")
    return ModelScore(Path(argument).expanduser())


MAKERS: dict[str, Callable[[str, str | None, Limits], Verifier]] = {
    "python-parses": _python_parses,
    "python-tests": _python_tests,
    "math-equal": _math_equal,
    "rouge-l": _rouge_l,
    "json-schema": _json_schema,
    "regex": _regex,
    "think-format": _think_format,
    "model": _model,
}
