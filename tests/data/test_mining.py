"""Instruction pairs out of Python source."""

import ast
import inspect
import json
import sysconfig
import textwrap
from pathlib import Path

import pytest

from danlu.data.folder import Document, ShardWriter
from danlu.data.mining import MineConfig, functions_with_docstrings, mine_instructions, prompt_for
from danlu.errors import DanluError
from danlu.formats.card import Stage

MODULE = '''
import os


def area(width, height=1, *, unit: str = "m"):
    """Area of a rectangle in square units."""
    # a comment stays
    total = width * height

    return f"{total} {unit}"


if True:
    class Outer:
        class Inner:
            @property
            @staticmethod
            async def value(
                self,
            ) -> int:
                """
                The value, waited for.

                  Indented more.
                """
                text = f(1)
                return await text

    def conditional(x):
        \'\'\'Found inside an if.\'\'\'
        return x * 2


def without(x):
    return x


def one_liner(x): "A docstring on the same line."; return x


def same_line(x):
    "Doc and code on one line."; return x


class Strings:
    def moved(self):
        """A string over several lines would change when dedented."""
        return """
    four
        eight"""

    def kept(self):
        """Strings on one line do no harm."""
        return """one line""" + "x"


def outer():
    """The inner one leans on this one."""
    def inner():
        """Not taken."""
        return 1
    return inner


def only_doc():
    """Nothing follows."""
'''


def test_what_is_taken_and_how() -> None:
    found = {function.qualname: function for function in functions_with_docstrings(MODULE)}
    assert list(found) == ["area", "Outer.Inner.value", "conditional", "Strings.kept", "outer", "only_doc"]
    area = found["area"]
    assert (area.name, area.lineno) == ("area", 5)
    assert area.signature == 'def area(width, height=1, *, unit: str = "m"):'
    assert area.docstring == "Area of a rectangle in square units."
    assert area.body == '    # a comment stays\n    total = width * height\n\n    return f"{total} {unit}"'
    assert area.answer == f"{area.signature}\n{area.body}"
    value = found["Outer.Inner.value"]
    assert value.signature == "@property\n@staticmethod\nasync def value(\n    self,\n) -> int:"
    assert value.docstring == "The value, waited for.\n\n  Indented more."
    assert value.body == "    text = f(1)\n    return await text"
    assert value.source.startswith(value.signature)
    assert found["only_doc"].body == ""


@pytest.mark.parametrize(
    "source", ["def f(:", "\0", "(" * 10_000, "x = '\\ud800'", "def f():\r\n    'A doc string.'\r\n    return 1\r\n"]
)
def test_any_source_is_taken_without_complaint(source: str) -> None:
    functions_with_docstrings(source)


@pytest.mark.filterwarnings("error")
def test_warnings_of_the_source_are_not_ours() -> None:
    assert len(functions_with_docstrings('def f():\n    """A doc."""\n    return "\\d"\n')) == 1


def test_line_numbers_are_those_of_python() -> None:
    """Form feeds and separators that str.splitlines cuts at are no line ends in source."""
    source = 'x = "\u2028\x1c"\n\x0c\ndef f(a):\n    """Doc string here."""\r\n    return a\r\n'
    (function,) = functions_with_docstrings(source)
    assert function.body == "    return a"
    assert function.answer == "def f(a):\n    return a"


def without_docstring(node: ast.AST) -> str:
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    node.body = node.body[1:]
    return ast.dump(node)


def test_answers_mean_what_the_source_means() -> None:
    """On forty modules of the standard library: each answer is the function of the file, less its docstring."""
    root = Path(sysconfig.get_paths()["stdlib"])
    checked = 0
    for path in sorted(root.glob("*.py"))[:40]:
        source = path.read_text(encoding="utf-8")
        by_line = {
            n.lineno: n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
        }
        for function in functions_with_docstrings(source):
            node = by_line[function.lineno]
            assert (ast.get_docstring(node) or "").strip() == function.docstring
            if function.body:
                assert ast.dump(ast.parse(function.answer).body[0]) == without_docstring(node)
                checked += 1
    assert checked > 200


def test_prompts_hold_signature_and_docstring_and_do_not_change() -> None:
    wordings = set()
    for function in functions_with_docstrings(inspect.getsource(textwrap)) + functions_with_docstrings(
        inspect.getsource(inspect)
    ):
        (message,) = prompt_for(function)
        assert message["role"] == "user"
        assert function.signature in message["content"]
        assert all(line.strip() in message["content"] for line in function.docstring.splitlines())
        assert prompt_for(function) == [message]
        wordings.add(message["content"][:8])
    assert len(wordings) >= 4


# ---- the verb

BODY = "    total = x + 1\n    for i in range(total):\n        total += i\n    return total\n"


def function(name: str = "f", doc: str = "Add numbers up in an odd way.", body: str = BODY) -> str:
    return f'def {name}(x):\n    """{doc}"""\n{body}\n\n'


REJECTED = {
    "dunder": function("__len__"),
    "deprecated": function(doc="Deprecated: use the other function instead."),
    "short_docstring": function(doc="Adds."),
    "stub": "".join(
        function(f"stub{i}", body=f"    {body}\n")
        for i, body in enumerate(
            [
                "pass",
                "...",
                "raise NotImplementedError",
                "raise NotImplementedError('x' * 40)",
                "return None",
                "return",
                "# nothing",
            ]
        )
    ),
    "short_body": function(body="    return x\n"),
    "long": function(body="    x = [" + "1, " * 600 + "]\n    return x\n"),
    "non_ascii": function(body="    return x + '" + "字" * 300 + "'\n"),
    "duplicate": function("other_name", doc="The same code in other layout.", body=BODY.replace("x + 1", "(x  +  1)")),
}


def make_data(path: Path, train: dict[str, str], heldout: dict[str, str]) -> Path:
    stage = Stage.open(path, kind="data", verb="data build", config=MineConfig(path, path))
    for split, modules in (("train", train), ("heldout", heldout)):
        with ShardWriter(path, split) as writer:
            for name, text in modules.items():
                half = len(text) // 2 if name == "chunked.py" else 0
                pieces = [text[:half], text[half:]] if half else [text]
                for i, piece in enumerate(pieces, start=1):
                    writer.write(Document(f"s/{name}" + (f"#{i}" if half else ""), piece, source="s", path=name))
    stage.finish()
    return path


def test_filters_count_and_show_what_they_take(tmp_path: Path) -> None:
    train = {"good.py": function(), **{f"{name}.py": text for name, text in REJECTED.items()}, "broken.py": "def f(:"}
    data = make_data(
        tmp_path / "data",
        {**train, "notes.md": function("markdown")},
        {"held.py": function("copy_of_train") + function("new", body=BODY * 2)},
    )
    made = mine_instructions(MineConfig(data, tmp_path / "out"))
    filters = {f["name"]: f for f in made.card.details["filters"]}
    assert {name: f["documents_removed"] for name, f in filters.items()} == {
        **dict.fromkeys(REJECTED, 1),
        "stub": 7,
        "duplicate": 2,  # the held-out copy of a training pair is one
    }
    for name, report in filters.items():
        assert report["samples"][0]["path"] == f"{name}.py:1"
        assert report["samples"][0]["before"].startswith("def ")
        assert report["bytes_removed"] > 0
        assert report["help"]
    metrics = made.card.metrics
    assert (metrics["modules_read"], metrics["modules_that_do_not_parse"]) == (len(train) + 1, 1)
    assert metrics["documents_kept"] == metrics["train_documents"] + metrics["heldout_documents"] == 2
    assert metrics["documents_read"] == 2 + sum(f["documents_removed"] for f in filters.values())
    (pair,) = made.documents("train")
    assert pair.kind == "chat"
    stub = pair.meta.pop("stub")
    assert pair.meta == {"path": "good.py", "name": "f", "lineno": "1", "entry_point": "f"}
    assert [f.signature for f in functions_with_docstrings(f"{stub}\n    pass")] == ["def f(x):"]
    user, assistant = json.loads(pair.text)["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    assert assistant["content"] == "def f(x):\n" + BODY.rstrip()
    assert [d.path for d in made.documents("heldout")] == ["held.py"]


def test_chunks_of_a_module_are_joined(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", {"chunked.py": function("first") + function("second", body=BODY * 2)}, {})
    made = mine_instructions(MineConfig(data, tmp_path / "out"))
    assert [d.meta["name"] for d in made.documents("train")] == ["first", "second"]


def test_the_same_again_and_another_run(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", {"a.py": function()}, {})
    out = mine_instructions(MineConfig(data, tmp_path / "a")).path
    content = (out / "train-00000.parquet").read_bytes()
    again = mine_instructions(MineConfig(data, tmp_path / "b")).path
    assert (again / "train-00000.parquet").read_bytes() == content
    before = (out / "danlu.json").stat().st_mtime_ns
    mine_instructions(MineConfig(data, out))
    assert (out / "danlu.json").stat().st_mtime_ns == before
    with pytest.raises(DanluError, match="holds another run"):
        mine_instructions(MineConfig(data, out, max_chars=200))


def test_nothing_to_mine(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", {"a.py": function(doc="Adds."), "b.md": "text"}, {})
    with pytest.raises(
        DanluError, match="1 Python modules read, 1 documented functions found, left out: short_docstring 1"
    ):
        mine_instructions(MineConfig(data, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
