"""Runs an answer and the tests on it, in a process that was confined for it.

The answer shares this process with the tests, so it is kept from finding them and from speaking in their name: it runs
in a thread of its own, the secret that makes a report count lies in the frames of another, and the ways that Python has
from one to the other (frames, the garbage collector, ctypes, tracing) are refused by an audit hook. Tests see the
answer's names but their own builtins, so that an ``abs`` that it defines does not judge it.

What this cannot prevent: an answer's objects may claim to be equal to anything (``__eq__``), modules that the tests
import may have been changed by it, and who makes bytecode by hand or digs ctypes out of the interpreter's classes can
write what he likes into the memory of this process, and so a report. That forges a verdict, no more: the kernel holds
the process whatever it does. Tests that matter compare plain values, check types, and are not shown to the model.
"""

from __future__ import annotations

import _thread
import ast
import builtins
import doctest
import io
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_FAILURE = 300
"""Characters that are told of the first test that failed."""


class RefusedError(ValueError, RuntimeError):
    """Both, for callers in the standard library are ready for one or the other and go on without."""


@dataclass(frozen=True)
class Step:
    """A piece of the tests. ``wanted`` is what an example of a doctest prints; None: it only has to come through."""

    code: types.CodeType
    source: str
    is_test: bool
    wanted: doctest.Example | None = None


def run(answer: str, tests: str, entry_point: str | None, token: bytes, result: int) -> None:
    """Run ``tests`` on ``answer`` and write ``token``, then ``passed total failure``, to the descriptor ``result``.

    Never returns. Without a report the answer did not get through: it ended or hung the process, or broke Python.

    Args:
        tests: Python source or doctests, see :func:`read_tests`.
        entry_point: name of the function that is asked for, where it is known.
    """
    outcome: list[bytes] = []
    ended = _thread.allocate_lock()
    ended.acquire()
    # What is used after the answer ran is fetched before: it may leave other things under these names.
    write, leave, wait, release = os.write, os._exit, ended.acquire, ended.release

    def work() -> None:
        try:
            outcome.append(judge(answer, tests, entry_point))
        finally:
            release()

    sys.addaudithook(_refusals())
    _thread.start_new_thread(work, ())
    wait()
    if outcome:
        write(result, token + outcome[0])
    leave(0)


def judge(answer: str, tests: str, entry_point: str | None) -> bytes:
    """``passed total failure``; a total of 0 says that there is something wrong with the tests."""
    try:
        steps = read_tests(tests, entry_point)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return b"0 0 the tests cannot be read (%s)" % _told(error)
    total = sum(step.is_test for step in steps)
    if not total:
        return b"0 0 the tests assert nothing"
    # Everything that is used below is fetched before the answer runs.
    execute, anything, told, names = exec, BaseException, _told, vars(builtins).copy()
    output, shown, setattr_ = io.StringIO, sys.__displayhook__, setattr
    system, matches_, passed, failure = sys, matches, 0, b""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    space = module.__dict__
    try:
        execute(compile(answer, "<answer>", "exec", dont_inherit=True), space)
    except anything as error:
        return b"0 %d the answer fails: %s" % (total, told(error))
    own = {name: value for name, value in space.items() if name not in names or name == entry_point}
    own = own | {"__name__": "tests", "__builtins__": names}
    for step in steps:
        printed = output()
        if step.wanted is not None:
            setattr_(system, "stdout", printed)
            setattr_(system, "displayhook", shown)
        raised = None
        try:
            execute(step.code, own)
        except anything as error:
            raised = error
        if step.wanted is None:
            good = raised is None
        else:
            good = matches_(step.wanted, printed.getvalue(), raised)
        if good:
            passed += step.is_test
            continue
        if not failure:
            failure = b"%s: %s" % (
                step.source.encode("utf-8", "replace")[:200],
                told(raised) if raised is not None else b"other output",
            )
        if not step.is_test:
            break
    return b"%d %d %s" % (passed, total, failure)


def read_tests(tests: str, entry_point: str | None) -> list[Step]:
    """The steps of tests, in order.

    Python source counts each ``assert`` at its top level, each loop or other block with one, each call that stands
    alone, and each function without arguments whose name begins with ``test``; all else prepares them. ``check(f)`` is
    called as HumanEval does where it is defined and ``entry_point`` names f. Doctests count each example that says what
    it prints.
    """
    if any(line.lstrip().startswith(">>>") for line in tests.splitlines()) and not _parses(tests):
        return [
            Step(
                compile(example.source, "<tests>", "single", dont_inherit=True),
                example.source.strip(),
                bool(example.want),
                example,
            )
            for example in doctest.DocTestParser().get_examples(tests)
        ]
    body = ast.parse(tests).body
    defined = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    callable_bare = [node.name for node in body if isinstance(node, ast.FunctionDef) and not node.args.args]
    called = {node.value.func.id for node in body if _is_call(node) and isinstance(node.value.func, ast.Name)}  # type: ignore[attr-defined]
    calls = [f"{name}()" for name in callable_bare if name.startswith("test") and name not in called]
    if "check" in defined and "check" not in called and entry_point is not None and entry_point.isidentifier():
        calls.append(f"check({entry_point})")
    body += [node for call in calls for node in ast.parse(call).body]
    return [
        Step(compile(ast.Module([node], []), "<tests>", "exec", dont_inherit=True), ast.unparse(node), _asserts(node))
        for node in body
    ]


def matches(example: doctest.Example, printed: str, raised: BaseException | None) -> bool:
    """Whether a doctest's example did what it says, spaces at the ends of lines aside; ``ELLIPSIS`` and
    ``NORMALIZE_WHITESPACE`` are the options that count. Of an error its type's name and its message are compared."""
    if example.exc_msg is not None:
        if raised is None:
            return False
        wanted, got = example.exc_msg, f"{type(raised).__name__}: {raised}"
        if ":" not in wanted:
            got = type(raised).__name__
        first, colon, message = wanted.partition(":")
        wanted = first.rpartition(".")[2] + colon + message
    elif raised is not None:
        return False
    else:
        wanted, got = example.want, printed
    flags = example.options
    if flags.get(doctest.NORMALIZE_WHITESPACE):
        wanted, got = " ".join(wanted.split()), " ".join(got.split())
    else:
        wanted, got = ("\n".join(line.rstrip() for line in text.splitlines()) for text in (wanted, got))
    wanted, got = wanted.rstrip(), got.rstrip()
    if not flags.get(doctest.ELLIPSIS) or "..." not in wanted:
        return wanted == got
    first, *middle, last = wanted.split("...")
    if not got.startswith(first) or not got.endswith(last) or len(got) < len(first) + len(last):
        return False
    place, end = len(first), len(got) - len(last)
    for piece in middle:
        place = got.find(piece, place, end)
        if place < 0:
            return False
        place += len(piece)
    return True


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def _is_call(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)


def _asserts(node: ast.stmt) -> bool:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return False
    return _is_call(node) or any(isinstance(part, ast.Assert) for part in ast.walk(node))


def _told(error: BaseException) -> bytes:
    """Type and message of an error, which may be the answer's own."""
    kind = type(error).__name__
    try:
        text = f"{kind}: {error}" if str(error) else kind
    except Exception:
        text = kind
    return text.encode("utf-8", "replace")[:MAX_FAILURE]


def _refusals() -> Callable[[str, tuple[Any, ...]], None]:
    """The audit hook. What it goes by is in its closure: a global name could be found, and changed."""
    refused = frozenset(
        {"sys._getframe", "sys._current_frames", "sys._current_exceptions", "sys.settrace", "sys.setprofile"}
        | {"sys.addaudithook", "gc.get_objects", "gc.get_referrers", "gc.get_referents", "code.__new__"}
    )
    frames = frozenset({"tb_frame", "gi_frame", "cr_frame", "ag_frame"})
    modules = frozenset({"ctypes", "_ctypes", "_testcapi", "_testinternalcapi", "_xxsubinterpreters", "_interpreters"})
    error = RefusedError

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        looks = event == "object.__getattr__" and arguments[1] in frames
        imports = event == "import" and arguments[0] in modules
        if event in refused or looks or imports or event.startswith("ctypes."):
            raise error(f"{event}: is not available here")

    return refuse
