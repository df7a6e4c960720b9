"""Which files belong to a corpus."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from danlu.data.corpus import ErrorPolicy, Source, find_sources, fingerprint, split_weight
from danlu.errors import DanluError

STOP = ErrorPolicy("stop")


def find(*corpus: object, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> list[Source]:
    return find_sources([str(entry) for entry in corpus], include, exclude, STOP)


def names(source: Source) -> list[str]:
    return [file.name for file in source.files]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.md", "sub/c.py", "sub/d.jsonl.gz", "sub/e.bin", ".git/x.txt", "node_modules/y.js"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return tmp_path / "tree"


def test_a_folder_is_walked_in_order_and_unknown_kinds_are_counted(tree: Path) -> None:
    (source,) = find(tree)
    assert names(source) == ["a.md", "b.txt", "sub/c.py", "sub/d.jsonl.gz"]
    assert source.ignored == {".bin": 1}
    assert [(f.format, f.compression) for f in source.files][2:] == [("code", None), ("jsonl", "gzip")]


def test_include_and_exclude(tree: Path) -> None:
    assert names(find(tree, exclude=("sub",))[0]) == ["a.md", "b.txt"]
    assert names(find(tree, include=("*.md", "sub/*.bin"))[0]) == ["a.md", "sub/e.bin"]
    with pytest.raises(DanluError, match="holds no file to read"):
        find(tree, include=("*.zip",))


def test_globs_and_single_files(tree: Path) -> None:
    assert names(find(tree / "**" / "*.py")[0]) == ["sub/c.py"]
    assert names(find(tree / "sub" / "e.bin")[0]) == ["e.bin"]  # named by the user: read as text
    with pytest.raises(DanluError, match="matches no file"):
        find(tree / "*.rs")


def test_two_sources_of_one_name_are_told_apart(tree: Path) -> None:
    assert [source.name for source in find(tree, f"{tree}::2", tree / "b.txt")] == ["tree", "tree-2", "b.txt"]


def test_weights() -> None:
    assert split_weight("a/b::2.5") == ("a/b", 2.5)
    assert split_weight("a/b") == ("a/b", 1.0)
    for bad in ("a::x", "a::0", "a::-1", "a::nan", "a::1000"):
        with pytest.raises(ValueError, match="weight"):
            split_weight(bad)


def test_what_danlu_made_inside_the_corpus_is_passed_over(tree: Path) -> None:
    (tree / "out").mkdir()
    (tree / "out" / "train.txt").write_text("x")
    (tree / "out" / "danlu.json").write_text("{}")
    assert "out/train.txt" not in names(find(tree)[0])


def test_links(tree: Path) -> None:
    (tree / "link.txt").symlink_to(tree / "b.txt")
    assert "link.txt" in names(find(tree)[0])
    (tree / "sub" / "up").symlink_to(tree)
    with pytest.raises(DanluError, match=r"sub/up: is a link to a folder that holds it, a circle; .*--exclude"):
        find(tree)
    skip = ErrorPolicy("skip")
    find_sources([str(tree)], (), (), skip)
    assert skip.count == 1
    assert find(tree, exclude=("up",))


def test_broken_and_self_referring_links(tree: Path) -> None:
    (tree / "gone.txt").symlink_to(tree / "nowhere")
    with pytest.raises(DanluError, match=r"gone\.txt: is a link that leads nowhere"):
        find(tree)
    (tree / "gone.txt").unlink()
    (tree / "self.txt").symlink_to(tree / "self.txt")
    with pytest.raises(DanluError, match=r"self\.txt: is a link that leads nowhere"):
        find(tree)
    with pytest.raises(DanluError, match="broken or circular symbolic link"):
        find(tree / "self.txt")


def test_pipes_do_not_hang(tree: Path) -> None:
    os.mkfifo(tree / "pipe.txt")
    assert "pipe.txt" not in names(find(tree)[0])
    with pytest.raises(DanluError, match="neither a file nor a folder"):
        find(tree / "pipe.txt")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="does not exist"):
        find(tmp_path / "nothing")
    with pytest.raises(DanluError, match="holds no file to read"):
        find(tmp_path)


def test_stdlib_is_the_source_without_tests() -> None:
    (source,) = find("stdlib")
    found = names(source)
    assert {"ast.py", "json/decoder.py", "asyncio/tasks.py"} <= set(found)
    assert not [name for name in found if {"test", "tests", "idlelib", "site-packages"} & set(name.split("/"))]
    assert sum(file.path.stat().st_size for file in source.files) > 8 << 20


def test_the_fingerprint_follows_contents_names_and_weights(tree: Path) -> None:
    def current(*corpus: object) -> str:
        return fingerprint(find(*corpus)[0])

    before = current(tree)
    assert current(f"{tree}::2") != before
    os.utime(tree / "b.txt", (0, 0))
    assert current(tree) == before
    (tree / "b.txt").write_text("y")
    assert current(tree) != before
