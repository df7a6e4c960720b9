"""Chunks put together are the document, and they are cut where its structure allows it."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.data.chunking import Structure, chunks

text = st.text(st.sampled_from("ab \n#@.。！d") | st.characters(exclude_categories=["Cs"]), max_size=300)


@given(text, st.integers(1, 60), st.sampled_from(["python", "markdown", "plain"]))
def test_chunks_put_together_are_the_text(content: str, max_chars: int, structure: Structure) -> None:
    pieces = chunks(content, max_chars, structure)
    assert "".join(pieces) == content
    assert all(0 < len(piece) <= max_chars for piece in pieces) or content == ""


def test_python_is_cut_between_definitions() -> None:
    functions = [f"# About {i}.\n@decorated\ndef f{i}(x):\n    y = x\n\n    return y + {i}\n\n\n" for i in range(40)]
    source = "import os\n\n\n" + "".join(functions)
    pieces = chunks(source, 400, "python")
    assert len(pieces) > 3
    for piece in pieces:
        ast.parse(piece)
        assert piece.startswith(("import os", "# About"))


def test_unparsable_python_is_cut_all_the_same() -> None:
    source = "".join(f"def f{i}(x):\n    print x\n\n" for i in range(30))
    assert all(piece.startswith("def f") for piece in chunks(source, 100, "python"))


def test_markdown_is_cut_before_headings() -> None:
    sections = [f"## Section {i}\n\n" + "Some words about it. " * 5 + "\n\nMore.\n\n" for i in range(20)]
    assert all(piece.startswith("## Section") for piece in chunks("".join(sections), 300, "markdown"))


@pytest.mark.parametrize(
    ("unit", "ends"),
    [
        ("A paragraph of a few words\nin two lines.\n\n", "\n\n"),
        ("one line of words\n", "\n"),
        ("炉火必须燃烧九天九夜。", "。"),
        ("他说：“丹成了！”", "！”"),
        ("A sentence stands here. ", ". "),
        ("word ", " "),
    ],
)
def test_plain_text_is_cut_at_the_coarsest_place(unit: str, ends: str) -> None:
    pieces = chunks(unit * 60, 10 * len(unit) - 3)
    assert len(pieces) > 5
    assert all(piece.endswith(ends) for piece in pieces)


def test_half_a_chunk_is_the_least() -> None:
    pieces = chunks("short.\n\n" + "word " * 100, 100)
    assert all(len(piece) >= 50 for piece in pieces[:-1])


def test_what_fits_is_not_cut() -> None:
    assert chunks("a\n\nb", 4) == ["a\n\nb"]
