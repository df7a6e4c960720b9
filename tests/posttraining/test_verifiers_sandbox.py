"""Code that does its worst, run for real. Every attack is bounded: where a protection fails the test does, not the
machine."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from danlu.errors import DanluError
from danlu.posttraining.verifiers import sandbox as sandboxes
from danlu.posttraining.verifiers.sandbox import Outcome, Protection, Sandbox, protections

SECONDS = 1.0
RIGHT = "def f(x):\n    return x + 1\n"
TESTS = "assert f(1) == 2\nassert f(2) == 3\nassert f(-1) == 0"


def kernel_has_landlock() -> bool:
    """Whether the kernel grants it at all: a container may be denied it."""
    create_ruleset, version = 444, 1
    return int(ctypes.CDLL(None).syscall(create_ruleset, None, ctypes.c_size_t(0), version)) >= 1


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    made = None
    try:
        made = Sandbox(seconds=SECONDS, memory_mib=256, processes=2)
        yield made
    except DanluError as error:
        if made is not None or (os.environ.get("CI") == "true" and kernel_has_landlock()):
            raise
        pytest.skip(str(error))
    finally:
        if made is not None:
            made.close()


def run(sandbox: Sandbox, answer: str, tests: str = TESTS, entry_point: str | None = None) -> Outcome:
    (outcome,) = sandbox.run([(answer, tests, entry_point)])
    assert isinstance(outcome, Outcome)
    return outcome


def test_right_and_wrong_answers(sandbox: Sandbox) -> None:
    assert run(sandbox, RIGHT) == Outcome(3, 3, "", "")
    half = run(sandbox, "def f(x): return 2")
    assert (half.passed, half.total) == (1, 3)
    assert half.reason == "assert f(2) == 3: AssertionError"
    assert run(sandbox, "def f(x): return x +").reason.startswith("the answer fails: SyntaxError")
    assert "the answer fails: ZeroDivisionError" in run(sandbox, "1/0").reason
    assert run(sandbox, "import math, numpy").reason.startswith("the answer fails: ModuleNotFoundError")


@pytest.mark.parametrize(
    ("answer", "reason"),
    {
        "infinite loop": ("while True: pass", "took longer than "),
        "sleep": ("import time; time.sleep(100)", "took longer than 3 s"),
        "catches everything": (
            "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\ndef f(x):\n  while True:\n"
            "    try:\n      while True: pass\n    except BaseException: pass",
            "took longer than ",
        ),
        "threads that stay": (
            "import threading\ndef g():\n  while True: pass\nfor _ in '123': threading.Thread(target=g).start()\ng()",
            "took longer than ",
        ),
        "10 GB": ("x = bytearray(10 * 2**30)", "MemoryError"),
        "10 GB, bit by bit": ("x = []\nfor _ in range(1000): x.append(bytearray(2**24))", "MemoryError"),
        "recursion": ("def f(x): return f(x + 1)", "RecursionError"),
        "recursion without limit": (
            "import sys\nsys.setrecursionlimit(10**9)\ndef g(n): return [*map(g, [n])]\ng(1)",
            "was killed by SIGSEGV",
        ),
        "number": ("x = 9**9**9", "took longer than "),
        "exit": ("import os; os._exit(0)", "exit status 0"),
        "exit when called": ("import os\ndef f(x): os._exit(0)", "exit status 0"),
        "polite exit": ("import sys; sys.exit(0)", "the answer fails: SystemExit: 0"),
        "polite exit when called": ("def f(x): raise SystemExit(0)", "SystemExit: 0"),
        "abort": ("import os; os.abort()", "was killed by SIG"),
        "no builtins": ("import builtins\nfor n in list(vars(builtins)): delattr(builtins, n)", "f"),
        "builtins without errors": (
            "import builtins\nbuiltins.BaseException = builtins.Exception = int\nimport os\n1/0",
            "ZeroDivisionError",
        ),
        "assertions that are none": (
            "import builtins\nclass A(Exception):\n  pass\nbuiltins.AssertionError = A\ndef f(x): return 9",
            "AssertionError",
        ),
        "kept quiet": ("import sys\nsys.stdout = sys.stderr = None\ndef f(x): return 9", "AssertionError"),
        "closed": ("import os\nos.closerange(0, 64)\ndef f(x): return x + 1", ""),
        "asks": ("x = input()", "EOFError"),
    }.values(),
)
def test_answers_that_do_not_get_through(sandbox: Sandbox, answer: str, reason: str) -> None:
    start = time.monotonic()
    outcome = run(sandbox, answer)
    assert outcome.passed == 0
    assert outcome.total > 0
    assert reason in outcome.reason
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "attempt",
    [
        "import os\nfor _ in range(3): os.fork() or os._exit(0)",
        "import os\nif os.fork() == 0:\n  os.setsid()\n  os.fork()\n  os._exit(0)",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import os; os.execv('/bin/true', ['true'])",
        "import multiprocessing; multiprocessing.get_context('fork').Process(target=print).start()",
        "import os; os.kill(os.getppid(), 0)",
        "import os; os.kill(os.getpid(), 15)",
        "import fcntl, os; fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
        "import socket; socket.socket()",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)",
        "import socket\na, b = socket.socketpair(type=socket.SOCK_DGRAM)\na.sendto(b'', '/dev/log')",
        "import os; os.setpriority(os.PRIO_PROCESS, 0, 5)",
        "open('/etc/passwd').read()",
        "open('/proc/self/mem', 'rb')",
        "open('/proc/self/environ', 'rb')",
        "import os; os.listdir('/')",
        "import os; os.listdir('/etc')",
        "open('/dev/tty')",
        "open('/var/tmp/danlu_was_here', 'w')",
        "import sys; open(sys.modules['os'].__file__, 'r+')",
        "import os; os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)",
        "import os; os.unlink(os.__file__)",
        "import os; os.chmod(os.__file__, 0o777)",
        "import os; os.utime(os.__file__)",
        "import os; os.symlink('/etc/passwd', 'link'); open('link').read()",
    ],
)
def test_what_the_kernel_refuses(sandbox: Sandbox, attempt: str) -> None:
    """The attempt fails with an error of rights, and the rest goes on."""
    refused = "try:\n  exec(CODE)\nexcept PermissionError:\n  held = True\n"
    outcome = run(sandbox, f"CODE = {attempt!r}\nheld = False\n{refused}{RIGHT}", "assert held\n" + TESTS)
    assert outcome == Outcome(4, 4, "", "")


def test_the_users_files_are_neither_read_nor_written(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    home = Path("~").expanduser()
    for path in (secret, tmp_path / "new", home / ".danlu_was_here"):
        for mode in ("r", "w", "a"):
            outcome = run(sandbox, f"open({str(path)!r}, {mode!r})")
            assert outcome.passed == 0
            assert "PermissionError" in outcome.reason or "FileNotFoundError" in outcome.reason
    assert secret.read_text() == "secret"
    assert not (tmp_path / "new").exists()
    assert not (home / ".danlu_was_here").exists()


def test_the_environment_is_empty(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with_secret = Sandbox(seconds=SECONDS, processes=1)
    try:
        outcome = run(with_secret, "import os", "assert 'HF_TOKEN' not in os.environ\nassert len(os.environ) < 10")
    finally:
        with_secret.close()
    assert outcome.passed == 2


def test_scratch_is_empty_bounded_and_forgotten(sandbox: Sandbox) -> None:
    if not {p.name: p for p in sandbox.protections()}["scratch"].in_force:
        pytest.skip("no folder in memory can be mounted here")
    tests = "assert os.listdir() == []\nopen('a', 'w').write('b')\nassert open('a').read() == 'b'\nassert fill()"
    fill = (
        "import os, tempfile\ndef fill():\n  tempfile.TemporaryFile()\n  n = 0\n  try:\n    for i in range(100):\n"
        "      with open(str(i), 'wb') as file: n += file.write(bytes(2**20))\n"
        "  except OSError:\n    return n <= 2**24\n"
    )
    for _ in range(4):
        assert run(sandbox, fill, tests) == Outcome(4, 4, "", "")


def test_output_is_cut_off(sandbox: Sandbox) -> None:
    outcome = run(sandbox, RIGHT + "for _ in range(50): print('x' * 10**6)\n")
    assert outcome.passed == 3
    assert set(outcome.output) == {"x"}
    assert len(outcome.output) == 4000


@pytest.mark.parametrize(
    "trick",
    [
        # Write what a report may look like wherever something can be written.
        "import os\nfor fd in range(64):\n  try: os.write(fd, b'3 3 ')\n  except OSError: pass\nos._exit(0)",
        # Look for the secret in the frames that are below.
        "import sys\nframe = sys._getframe()\nwhile frame: frame = frame.f_back",
        "import sys\nsys._current_frames()",
        "try: 1/0\nexcept Exception as e: e.__traceback__.tb_frame.f_back",
        "def g():\n  yield\nh = g()\nh.gi_frame",
        "import sys; sys.settrace(lambda *a: None)",
        "import sys; sys.addaudithook(print)\nimport sys; sys._getframe()",
        "import gc; gc.get_objects()",
        "import gc; gc.get_referrers(gc)",
        "import ctypes; ctypes.string_at(0)",
        "import types\n(lambda: 0).__code__.replace(co_code=b'')",
        "for c in object.__subclasses__():\n  if c.__name__ == 'Step':\n    g = c.__init__.__globals__\n"
        "    g.update(dict.fromkeys(g, frozenset()))\nimport gc; gc.get_objects()",
        # Ours are not where an import finds them, and what is left tells nothing.
        "import __main__; __main__.harness",
        "import harness",
        "import jail",
    ],
)
def test_the_answer_cannot_report_in_our_name(sandbox: Sandbox, trick: str) -> None:
    outcome = run(sandbox, f"{trick}\ndef f(x): return 0")
    assert outcome.passed == 0
    assert "assert" not in outcome.reason  # it did not come as far as the tests: the trick failed


def test_tests_keep_their_builtins_and_what_they_mean(sandbox: Sandbox) -> None:
    shadows = "def abs(x): return 0\ndef all(x): return True\ndef len(x): return 7\n__builtins__ = {}\n"
    patches = "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.isinstance = lambda *a: True\n"
    tests = "assert abs(f(1) - 2) < 0.1\nassert all([f(1) == 2])\nassert isinstance(f(1), int)"
    for cheat in (shadows + patches, patches):
        assert (
            run(sandbox, cheat + "def f(x): return 'no'", tests.replace("abs(f(1) - 2) < 0.1", "abs(-1)")).passed == 1
        )
        assert run(sandbox, cheat + RIGHT, tests).passed == 3
    assert run(sandbox, "def sum(x): return 42", "assert sum([1]) == 42", "sum").passed == 1
    for name in ("print", "repr", "str"):
        tricked = f"import builtins\nbuiltins.{name} = lambda *a, **k: 'x'\n" + RIGHT
        assert run(sandbox, tricked, ">>> f(1)\n2\n>>> f(2)\n4\n").passed == 1


def test_ordinary_code_runs(sandbox: Sandbox) -> None:
    answer = """
from __future__ import annotations
import asyncio, collections, contextlib, dataclasses, enum, functools, logging, threading, typing, unittest.mock
from concurrent.futures import ThreadPoolExecutor

Point = collections.namedtuple("Point", "x y")
Color = enum.Enum("Color", "RED BLUE")
T = typing.TypeVar("T")

@dataclasses.dataclass
class Pair(typing.Generic[T]):
    left: T
    right: T | None = None

class Row(typing.NamedTuple):
    a: int = 0

def f(x):
    logging.warning("f %s", x)
    with contextlib.suppress(KeyError):
        raise KeyError(x)
    async def g():
        await asyncio.sleep(0.001)
        return x + 1
    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(abs, range(9))) == 36
    return asyncio.run(g())

if __name__ == "__main__":
    raise SystemExit("only when it is the program")
"""
    tests = f"{TESTS}\nassert Pair(1) == Pair(1, None)\nassert Point(1, 2).y == 2\nassert Row().a == 0\n"
    tests += "from solution import f as g\nassert g(1) == 2"
    outcome = run(sandbox, answer, tests)
    assert (outcome.passed, outcome.total, outcome.reason) == (7, 7, "")


def test_forms_of_tests(sandbox: Sandbox) -> None:
    cases = [
        ("def test_a():\n  assert f(1) == 2\ndef test_b():\n  assert f(1) == 3\n", None, 1, 2),
        ("for i in range(3):\n  assert f(i) == i + 1", None, 1, 1),
        ("def check(candidate):\n  assert candidate(1) == 2\n", "f", 1, 1),
        ("def check(candidate):\n  assert candidate(1) == 2\ncheck(f)\n", "f", 1, 1),
        ("x = f(1)\nassert x == 2", None, 1, 1),
        ("x = undefined\nassert f(1) == 2\nassert f(2) == 3", None, 0, 2),  # nothing counts behind a broken set-up
        (">>> f(1)\n2\n>>> f(1)\n3\n", None, 1, 2),
        (">>> y = 5\n>>> f(y)\n6\n>>> print('a', f(1))\na 2\n", None, 2, 2),
        (
            ">>> f('a')\nTraceback (most recent call last):\n  ...\n"
            'TypeError: can only concatenate str (not "int") to str\n',
            None,
            1,
            1,
        ),
        (">>> [f(i) for i in range(9)]  # doctest: +ELLIPSIS\n[1, 2, ..., 9]\n", None, 1, 1),
        (">>> [1,\n...  2]  # doctest: +NORMALIZE_WHITESPACE\n[1,\n      2]\n", None, 1, 1),
        ("x = 1", None, 0, 0),
        ("assert f(1) ==", None, 0, 0),
    ]
    outcomes = sandbox.run([(RIGHT, tests, name) for tests, name, _, _ in cases])
    got = [(o.passed, o.total) for o in outcomes if isinstance(o, Outcome)]
    assert got == [(passed, total) for _, _, passed, total in cases]


def test_nothing_is_left_running_and_the_sandbox_goes_on(sandbox: Sandbox) -> None:
    """A process of the sandbox that is killed is replaced; its answer is lost, not the others'."""
    alone = Sandbox(seconds=SECONDS, processes=1)
    try:
        (worker,) = [w for w in alone._workers._idle.queue if w is not None]
        os.kill(worker._process.pid, signal.SIGKILL)
        first, second = alone.run([(RIGHT, TESTS, None)] * 2)
        assert "ended" in str(first)
        assert second == Outcome(3, 3, "", "")
    finally:
        alone.close()
    mine = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True).stdout
    assert mine.count("zygote.py") <= 2  # those of the fixture


def test_every_answer_gets_its_own_verdict(sandbox: Sandbox) -> None:
    jobs = [(f"def f(): return {i}", f"assert f() == {i // 2 * 2}", None) for i in range(64)]
    passed = [outcome.passed for outcome in sandbox.run(jobs) if isinstance(outcome, Outcome)]
    assert passed == [1, 0] * 32


def test_hashes_are_the_same_every_time(sandbox: Sandbox) -> None:
    answer, tests = "def f(): print(list({'a', 'b', 'c', 'd'}))", "f()"
    assert len({o.output for o in sandbox.run([(answer, tests, None)] * 6) if isinstance(o, Outcome)}) == 1


def test_a_weak_sandbox_is_refused(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {p.name for p in protections() if p.essential and p.in_force} >= {"reading", "writing", "network"}

    def weak(self: Sandbox) -> list[Protection]:
        return [Protection("network", "code cannot open connections (seccomp)", False, True)]

    monkeypatch.setattr(sandboxes.Sandbox, "protections", weak)
    with pytest.raises(DanluError, match=r"cannot warrant that code cannot open connections.*--allow-weak-sandbox"):
        Sandbox(processes=1)
    allowed = Sandbox(processes=1, allow_weak=True)
    try:
        assert run(allowed, RIGHT).passed == 3
    finally:
        allowed.close()


def test_memory_has_a_least_amount_that_suffices(sandbox: Sandbox) -> None:
    with pytest.raises(DanluError, match=r"memory_mib=127: is too little"):
        Sandbox(processes=1, memory_mib=sandboxes.MIN_MEMORY_MIB - 1)
    least = Sandbox(processes=1, memory_mib=sandboxes.MIN_MEMORY_MIB)
    try:
        assert run(least, RIGHT) == Outcome(3, 3, "", "")
    finally:
        least.close()


def test_the_jail_asks_for_nothing_beyond_the_standard_library() -> None:
    folder = Path(sandboxes.__file__).parent
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); import jail, harness, zygote; print('danlu' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-S", "-s", "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
