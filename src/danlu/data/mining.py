"""`danlu data mine`: instruction pairs out of Python source.

Whoever documents a function writes an instruction and its answer: the docstring says what is wanted, the signature how
it is called, and the body does it. Each documented function or method becomes one chat: the user gives signature and
docstring in the words of one of a few templates, the assistant answers with the function, without the docstring. The
answer is plain source, so that whether it parses can be checked. Pairs that teach nothing are filtered out, and every
filter tells what it took.
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import itertools
import json
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danlu import config as configs
from danlu.config import REQUIRED, option
from danlu.errors import DanluError

if TYPE_CHECKING:
    from danlu.data.folder import DataFolder, Document, Split

SAMPLES = 5  # examples that a filter keeps of what it removed


@dataclass(frozen=True)
class MineConfig:
    """Options of :func:`mine_instructions`."""

    data: Path = option(REQUIRED, "Data folder of Python source, made by `danlu data build`.", positional=True)
    out: Path = option(REQUIRED, "Data folder to make; its documents are chats.", affects_result=False)
    min_docstring_chars: int = option(20, "Shorter docstrings say too little.", unit="characters", ge=1)
    min_body_chars: int = option(30, "Shorter bodies teach too little.", unit="characters", ge=0)
    max_chars: int = option(
        1500,
        "Longest pair, prompt and answer; 1500 fit into 512 tokens of a 4096-token vocabulary.",
        unit="characters",
        ge=100,
    )
    overwrite: bool = option(False, "Replace the folder when it holds another result.", affects_result=False)


@dataclass(frozen=True)
class MinedFunction:
    """A documented function or method; all texts are dedented to the level of a module.

    Attributes:
        signature: decorators and the ``def`` up to its colon.
        docstring: cleaned as :func:`inspect.cleandoc` does, and stripped.
        body: what follows the docstring, indented; empty when nothing does.
        source: the whole of it as it stands in the file.
        lineno: line of the ``def``, counted from 1.
    """

    name: str
    qualname: str
    signature: str
    docstring: str
    body: str
    source: str
    lineno: int

    @property
    def answer(self) -> str:
        """The function without its docstring: what a model is asked to write."""
        return f"{self.signature}\n{self.body}"

    @functools.cached_property
    def syntax(self) -> ast.Module | None:
        """The answer's syntax tree; None where there is no body, or nothing but comments."""
        return parse(self.answer)


def functions_with_docstrings(source: str) -> list[MinedFunction]:
    """The documented functions and methods of a module, in order; none where the source does not parse.

    Functions inside functions are left out, for they lean on their surroundings, and so are those whose text cannot be
    taken out of the file (a docstring on the line of the ``def``, a string that dedenting would change).
    """
    tree = parse(source)
    return [] if tree is None else _documented(tree, source)


def parse(source: str) -> ast.Module | None:
    """The syntax tree of Python source, or None where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's code is not ours to mend
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _documented(tree: ast.Module, source: str) -> list[MinedFunction]:
    lines = re.split("\r\n|\r|\n", source)  # as Python counts them; str.splitlines cuts at more
    found = (_taken_out(node, prefix, lines) for node, prefix in _functions(tree, ""))
    return [function for function in found if function is not None]


def stub_of(function: MinedFunction) -> str:
    """Signature and docstring: what the body goes on with."""
    return f"{function.signature}\n{textwrap.indent(f'{QUOTES}{function.docstring}{QUOTES}', '    ')}"


def prompt_for(function: MinedFunction) -> list[dict[str, str]]:
    """The chat up to the answer: one user message. The wording depends on the function alone."""
    kind = "function"
    if "." in function.qualname:
        kind = f"method of the class {function.qualname.rpartition('.')[0]}"
    stub = stub_of(function)
    choice = hashlib.sha256(f"{function.qualname}\n{function.signature}".encode()).digest()[0]
    content = PROMPTS[choice % len(PROMPTS)].format(
        kind=kind, stub=stub, name=function.name, signature=function.signature, docstring=function.docstring
    )
    return [{"role": "user", "content": content}]


QUOTES = '"' * 3
PROMPTS = (
    "Complete this Python {kind}:\n\n{stub}",
    "Fill in this {kind}.\n\n{stub}",
    "Implement `{name}` in Python.\n\n{docstring}\n\nIt is a {kind} and starts with:\n{signature}",
    "Write a Python {kind} with this signature:\n\n{signature}\n\nWhat it does: {docstring}",
    "{docstring}\n\nWrite this as a Python {kind}:\n\n{signature}",
)


@dataclass
class Filter:
    """One reason to leave a pair out, and what it took."""

    name: str
    help: str
    rejects: Callable[[MinedFunction, MineConfig], bool]
    removed: int = 0
    bytes: int = 0
    samples: list[dict[str, str]] = field(default_factory=list)

    def check(self, function: MinedFunction, path: str, config: MineConfig) -> bool:
        """Whether the pair may stay; counted if not."""
        if not self.rejects(function, config):
            return True
        self.removed += 1
        self.bytes += len(function.source.encode())
        if len(self.samples) < SAMPLES:
            self.samples.append({"path": f"{path}:{function.lineno}", "before": function.source[:400], "after": ""})
        return False

    def report(self) -> dict[str, Any]:
        """What the data card holds of a filter."""
        return {
            "name": self.name,
            "help": self.help,
            "documents_removed": self.removed,
            "documents_changed": 0,
            "bytes_removed": self.bytes,
            "samples": self.samples,
        }


def make_filters() -> list[Filter]:
    """The filters, in the order they are applied; the last remembers what it has seen."""
    seen: set[bytes] = set()

    def is_duplicate(function: MinedFunction, config: MineConfig) -> bool:
        assert function.syntax is not None  # those without are gone as stubs
        code = ast.dump(function.syntax).replace(f"name={function.name!r}", "", 1)
        digest = hashlib.sha256(code.encode()).digest()
        is_known = digest in seen
        seen.add(digest)
        return is_known

    return [
        Filter(
            "dunder",
            "Names that begin with two underscores: hooks of Python and hidden helpers.",
            lambda f, c: f.name.startswith("__"),
        ),
        Filter("deprecated", "Functions that nobody should call or imitate any more.", lambda f, c: _is_deprecated(f)),
        Filter(
            "short_docstring",
            "Docstrings too short to say what is wanted.",
            lambda f, c: len(f.docstring) < c.min_docstring_chars or len(f.docstring.split()) < 3,
        ),
        Filter("stub", "Bodies that do nothing: pass, ..., NotImplementedError, a constant.", lambda f, c: _is_stub(f)),
        Filter("short_body", "Bodies too short to learn from.", lambda f, c: len(f.body.strip()) < c.min_body_chars),
        Filter(
            "long",
            "Pairs longer than max_chars.",
            lambda f, c: len(prompt_for(f)[0]["content"]) + len(f.answer) > c.max_chars,
        ),
        Filter(
            "non_ascii",
            "Pairs that are mostly not ASCII.",
            lambda f, c: len(f.source.encode("ascii", "ignore")) < len(f.source) / 2,
        ),
        Filter("duplicate", "The same code as an earlier pair, but for its name and layout.", is_duplicate),
    ]


def mine_instructions(config: MineConfig) -> DataFolder:
    """Mine a data folder of Python source for instruction pairs; return the data folder of chats.

    The split of the source is kept: pairs of held-out modules are held out, and none of them has the code of a
    training pair.

    Raises:
        DanluError: the folder holds no Python source or no usable pair, or ``out`` cannot be used.
    """
    from danlu.console import note
    from danlu.data.folder import DataFolder, ShardWriter
    from danlu.formats.card import Stage

    config = configs.validate(config)
    data = DataFolder(config.data)
    stage = Stage.open(
        config.out,
        kind="data",
        verb="data mine",
        config=config,
        inputs={"data": config.data},
        overwrite=config.overwrite,
    )
    if stage.finished:
        note(f"{config.out}: already made, nothing to do")
        return DataFolder(config.out)

    filters = make_filters()
    metrics = dict.fromkeys(("modules_read", "modules_that_do_not_parse"), 0)
    metrics |= dict.fromkeys(("documents_read", "documents_kept", "bytes_read", "bytes_kept"), 0)
    try:
        for split in data.splits():  # train first: of two equal functions the training pair stays
            with ShardWriter(stage.out, split) as writer:
                for document in _pairs(data, split, filters, config, metrics):
                    writer.write(document)
            metrics |= {f"{split}_documents": writer.n_documents, f"{split}_bytes": writer.n_bytes}
            metrics["documents_kept"] += writer.n_documents
            metrics["bytes_kept"] += writer.n_bytes
        if not metrics.get("train_documents"):
            reasons = ", ".join(f"{f.name} {f.removed}" for f in filters if f.removed)
            raise DanluError(
                f"{config.data}: gives no instruction pair: {metrics['modules_read']} Python modules read, "
                f"{metrics['documents_read']} documented functions found, left out: {reasons or 'none'}; "
                "mine a data folder of documented Python source"
            )
    except DanluError:
        for shard in stage.out.glob("*.parquet"):
            shard.unlink()
        stage.abandon()
        raise
    stage.finish(metrics, {"filters": [f.report() for f in filters]})
    note(
        f"{config.out}: {metrics['documents_kept']:,} pairs of {metrics['documents_read']:,} documented functions "
        f"({metrics['train_documents']:,} for training, {metrics.get('heldout_documents', 0):,} held out)"
    )
    return DataFolder(config.out)


def _pairs(
    data: DataFolder, split: Split, filters: list[Filter], config: MineConfig, metrics: dict[str, int]
) -> Iterator[Document]:
    from danlu.data.folder import Document

    for module_id, path, source_name, text in python_modules(data, split):
        metrics["modules_read"] += 1
        tree = parse(text)
        if tree is None:
            metrics["modules_that_do_not_parse"] += 1
            continue
        for function in _documented(tree, text):
            metrics["documents_read"] += 1
            metrics["bytes_read"] += len(function.source.encode())
            if all(f.check(function, path, config) for f in filters):
                messages = [*prompt_for(function), {"role": "assistant", "content": function.answer}]
                yield Document(
                    id=f"{module_id}:{function.lineno}",
                    text=json.dumps({"messages": messages}, ensure_ascii=False),
                    source=source_name,
                    path=path,
                    kind="chat",
                    meta={
                        "path": path,
                        "name": function.qualname,
                        "lineno": str(function.lineno),
                        "stub": stub_of(function),
                        "entry_point": function.name,  # for whoever judges an answer
                    },
                )


def python_modules(data: DataFolder, split: Split) -> Iterator[tuple[str, str, str, str]]:
    """Id, path, source name and text of each Python module; neighbouring chunks of a long one are joined."""
    documents = (d for d in data.documents(split) if d.kind == "text" and re.search(r"\.pyi?(\.|$)", d.path))
    for _, group in itertools.groupby(documents, key=lambda d: (d.source, re.sub(r"#\d+(?=$|@)", "", d.id))):
        chunks = list(group)
        yield chunks[0].id, chunks[0].path, chunks[0].source, "".join(d.text for d in chunks)


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Functions of a module and of its classes, each with the dotted path in front of its name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child, prefix
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, (ast.stmt, ast.ExceptHandler)):  # if, try, with
            yield from _functions(child, prefix)


def _taken_out(node: ast.FunctionDef | ast.AsyncFunctionDef, prefix: str, lines: list[str]) -> MinedFunction | None:
    """The function as a text of its own; None where it has no docstring or cannot be taken out."""
    docstring = (ast.get_docstring(node) or "").strip()
    if not docstring:
        return None
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    quoted = node.body[0]
    first, last, end = quoted.lineno - 1, quoted.end_lineno or 0, node.end_lineno or 0
    indentation = lines[start][: node.col_offset]
    starts_after_docstring = len(node.body) == 1 or node.body[1].lineno > last
    if indentation.strip() or lines[first][: quoted.col_offset].strip() or not starts_after_docstring:
        return None

    def dedented(some: list[str]) -> str:
        return "\n".join(line.removeprefix(indentation).rstrip() for line in some).strip("\n")

    function = MinedFunction(
        name=node.name,
        qualname=prefix + node.name,
        signature=dedented(lines[start:first]),
        docstring=docstring,
        body=dedented(lines[last:end]),
        source=dedented(lines[start:end]),
        lineno=node.lineno,
    )
    return function if _means_the_same(function, node) else None


def _means_the_same(function: MinedFunction, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether dedenting left the code as it was; it cuts into strings that go over several lines."""
    if len(node.body) == 1 or not any(mark in function.answer for mark in (QUOTES, "'''", "\\\n")):
        return True
    expected = copy.copy(node)
    expected.body = node.body[1:]
    return function.syntax is not None and ast.dump(function.syntax) == ast.dump(ast.Module([expected], []))


def _is_deprecated(function: MinedFunction) -> bool:
    return "deprecated" in function.docstring.lower() or "DeprecationWarning" in function.body


def _is_stub(function: MinedFunction) -> bool:
    """Whether no statement of the body does anything."""
    if function.syntax is None:
        return True
    (definition,) = function.syntax.body
    assert isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef))
    return all(_does_nothing(statement) for statement in definition.body)


def _does_nothing(statement: ast.stmt) -> bool:
    match statement:
        case ast.Pass() | ast.Expr(ast.Constant()) | ast.Return(None | ast.Constant()):
            return True
        case ast.Raise(ast.Name("NotImplementedError") | ast.Call(ast.Name("NotImplementedError"))):
            return True
    return False
