"""Every kind of file is read as what it holds, and every broken one is told with its name, place and mend."""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reportlab.lib.pdfencrypt import StandardEncryption
from reportlab.pdfgen.canvas import Canvas

from danlu.data import decoding, readers
from danlu.data.corpus import ErrorPolicy, find_sources
from danlu.data.readers import ReaderOptions, Record, read_records
from danlu.errors import DanluError


def read(path: Path, on_error: str = "stop", **options: Any) -> list[Record]:
    policy = ErrorPolicy(on_error)  # type: ignore[arg-type]
    (source,) = find_sources([str(path)], (), (), policy)
    return [r for file in source.files for r in read_records(file, ReaderOptions(**options), policy)]


def texts(path: Path, **options: Any) -> list[str]:
    return [record.text for record in read(path, **options)]


def write(path: Path, content: str | bytes) -> Path:
    raw = content.encode() if isinstance(content, str) else content
    if path.suffix == ".gz":
        raw = gzip.compress(raw)
    if path.suffix == ".zst":
        raw = pa.Codec("zstd").compress(raw, asbytes=True)
    path.write_bytes(raw)
    return path


ROWS = [{"text": "one\r\ntwo"}, {"text": "三、 🐉 \u2028 x", "url": "http://a.b"}]


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
class TestEveryFormatPlainAndPacked:
    def test_text(self, tmp_path: Path, packed: str) -> None:
        for suffix in (".txt", ".md", ".rst"):
            (record,) = read(write(tmp_path / f"a{suffix}{packed}", "# Titel\n\nGrüße 你好\n"))
            assert (record.text, record.type, record.row) == ("# Titel\n\nGrüße 你好\n", "prose", None)

    def test_code(self, tmp_path: Path, packed: str) -> None:
        for suffix in (".py", ".c", ".rs"):
            (record,) = read(write(tmp_path / f"a{suffix}{packed}", "x = 1\r\n"))
            assert (record.text, record.type) == ("x = 1\r\n", "code")

    def test_jsonl(self, tmp_path: Path, packed: str) -> None:
        lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
        records = read(write(tmp_path / f"a.jsonl{packed}", lines))
        assert [r.text for r in records] == [row["text"] for row in ROWS]
        assert [r.row for r in records] == [1, 3]
        assert records[1].meta == {"url": "http://a.b"}

    def test_json(self, tmp_path: Path, packed: str) -> None:
        assert texts(write(tmp_path / f"a.json{packed}", json.dumps(ROWS, indent=1))) == [row["text"] for row in ROWS]
        assert texts(write(tmp_path / f"b.json{packed}", json.dumps(ROWS[1]))) == [ROWS[1]["text"]]
        assert texts(write(tmp_path / f"c.json{packed}", '["a", "b"]')) == ["a", "b"]
        assert texts(write(tmp_path / f"d.json{packed}", " [ ] ")) == []

    def test_csv_and_tsv(self, tmp_path: Path, packed: str) -> None:
        for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
            content = delimiter.join(("id", "text")) + f'\n1{delimiter}"two\nlines, ""quoted"""\n2{delimiter}三\n'
            assert texts(write(tmp_path / f"a{suffix}{packed}", content)) == ['two\nlines, "quoted"', "三"]

    def test_html(self, tmp_path: Path, packed: str) -> None:
        sentence = "The alchemist feeds the furnace with dragon bones and waits for nine days and nights. "
        page = (
            "<html><head><title>t</title></head><body><nav><a href=/>Home</a></nav><article><h1>Elixir</h1>"
            f"<p>{sentence * 3}</p><p>{sentence * 2}</p></article><script>bad()</script></body></html>"
        )
        (text,) = texts(write(tmp_path / f"a.html{packed}", page))
        assert sentence.strip() in text
        assert "bad()" not in text
        assert "<p>" not in text

    def test_pdf(self, tmp_path: Path, packed: str) -> None:
        canvas = Canvas(str(tmp_path / "plain.pdf"))
        for page in ("Page one speaks.", "Page two answers."):
            canvas.drawString(72, 700, page)
            canvas.showPage()
        canvas.save()
        (record,) = read(write(tmp_path / f"a.pdf{packed}", (tmp_path / "plain.pdf").read_bytes()))
        assert record.text == "Page one speaks.\n\nPage two answers."
        assert record.meta == {"pages": "2"}


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS * 300), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == [row["text"] for row in ROWS * 300]


def test_chats_are_kept_as_chats(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "你好"}]
    rows = [
        {"messages": messages},
        {"conversations": [{"from": "human", "value": "Hi <|im_end|>"}, {"from": "gpt", "value": "你好"}]},
        {"instruction": "Hi <|im_end|>", "input": "", "output": "你好"},
        {"text": "no chat"},
    ]
    records = read(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert [r.type for r in records] == ["chat", "chat", "chat", "prose"]
    assert [json.loads(r.text) for r in records[:3]] == [{"messages": messages}] * 3
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "a.parquet")
    assert [json.loads(t) for t in texts(tmp_path / "a.parquet")] == [{"messages": messages}]


def test_an_unknown_role_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "x"}\n{"messages": [{"role": "wizard", "content": "x"}]}\n')
    with pytest.raises(DanluError, match=r"a\.jsonl:2: .*wizard"):
        read(path)


def test_text_field(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"body": "x", "messages": []}')
    assert texts(path, text_field="body") == ["x"]
    with pytest.raises(DanluError, match=r"a\.jsonl:1: has no column 'nope'.*body, messages.*--text-field"):
        texts(path, text_field="nope")
    with pytest.raises(DanluError, match="column 'messages' holds list, not text"):
        texts(path, text_field="messages")


def test_text_type(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "x = 1"}')
    assert read(path)[0].type == "prose"
    assert read(path, text_type="code")[0].type == "code"


def test_separator_cuts_a_text_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one<|endoftext|>\ntwo<|endoftext|>\n")
    records = read(path, separator="<|endoftext|>")
    assert [r.text for r in records] == ["one", "\ntwo"]
    assert [r.row for r in records] == [1, 2]


def test_a_huge_text_becomes_several_documents_cut_at_blank_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "TEXT_LIMIT", 1000)
    monkeypatch.setattr(decoding, "BLOCK", 64)
    content = "\n\n".join(f"Paragraph {i} " + "x" * 90 for i in range(60))
    records = read(write(tmp_path / "a.txt", content))
    assert "".join(r.text for r in records) == content
    assert len(records) > 5
    assert all(len(r.text) <= 1064 and (r.text.endswith("\n\n") or r is records[-1]) for r in records)


class TestEncodings:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
    def test_by_byte_order_mark(self, tmp_path: Path, encoding: str) -> None:
        assert texts(write(tmp_path / "a.txt", "Grüße 你好 🐉\n".encode(encoding))) == ["Grüße 你好 🐉\n"]

    def test_wrong_encoding_names_file_line_byte_and_mend(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.txt", b"first\nsecond \xe9\n")
        with pytest.raises(DanluError, match=r"a\.txt:2: is not utf-8 text \(byte 13 is 0xe9\).*--encoding"):
            read(path)
        assert texts(path, encoding="latin-1") == ["first\nsecond é\n"]
        assert texts(write(tmp_path / "b.txt", "你好".encode("gb18030")), encoding="gb18030") == ["你好"]

    @settings(max_examples=60, deadline=None)
    @given(before=st.integers(0, 300), block=st.integers(1, 80))
    def test_the_place_is_right_across_blocks(
        self, tmp_path_factory: pytest.TempPathFactory, before: int, block: int
    ) -> None:
        good = ("ab\n你é🐉" * 40).encode()[:before].decode(errors="ignore").encode()
        path = write(tmp_path_factory.mktemp("x") / "a.txt", good + b"\xff rest \n")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoding, "BLOCK", block)
            with pytest.raises(DanluError, match=rf":{good.count(10) + 1}: .*byte {len(good)} is 0xff"):
                read(path)

    def test_truncated_utf8_at_the_end(self, tmp_path: Path) -> None:
        with pytest.raises(DanluError, match=r"a\.txt:1: .*byte 1 is 0xe4"):
            read(write(tmp_path / "a.txt", b"a\xe4\xbd"))

    def test_python_cookie(self, tmp_path: Path) -> None:
        source = "# -*- coding: latin-1 -*-\nname = 'é'\n"
        assert texts(write(tmp_path / "a.py", source.encode("latin-1"))) == [source]
        with pytest.raises(DanluError, match=r"a\.py:1: .*unknown encoding"):
            read(write(tmp_path / "a.py", "# coding: klingon\n"))
        with pytest.raises(DanluError, match=r"a\.py:1: is not utf-8"):
            read(write(tmp_path / "a.py", b"x = '\xe9'\n"))

    @pytest.mark.parametrize("content", [b"text\n\0\1\2", b"\x89PNG\r\n", b"PK\x03\x04zip", b"\x7fELF"])
    def test_binary_named_txt(self, tmp_path: Path, content: bytes) -> None:
        with pytest.raises(DanluError, match=r"a\.txt.*: is (a binary file|not text but).*--exclude"):
            read(write(tmp_path / "a.txt", content))


class TestBrokenFiles:
    @pytest.mark.parametrize("suffix", [".txt.gz", ".txt.zst", ".jsonl.gz", ".jsonl.zst"])
    def test_packed_files_that_are_none_or_cut_short(self, tmp_path: Path, suffix: str) -> None:
        noise = random.Random(0).choices("abcdef \n", k=200_000)
        whole = write(tmp_path / f"a{suffix}", '{"text": "' + "".join(noise).replace("\n", " ") + '"}').read_bytes()
        for content in (b"no such thing at all", whole[: len(whole) // 2]):
            (tmp_path / f"a{suffix}").write_bytes(content)
            with pytest.raises(DanluError, match=r"is not a whole (gzip|Zstandard) file"):
                read(tmp_path / f"a{suffix}")

    def test_jsonl_line(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": \n[1]\n{"text": "\\ud800"}\n{"text": "b"}\n')
        with pytest.raises(DanluError, match=r"a\.jsonl:2: is not valid JSON .*--on-error skip"):
            read(path)
        policy = ErrorPolicy("skip")
        (source,) = find_sources([str(path)], (), (), policy)
        assert [r.text for r in read_records(source.files[0], ReaderOptions(), policy)] == ["a", "b"]
        assert policy.count == 3
        assert [message.partition(": ")[0][-1] for message in policy.messages] == ["2", "3", "4"]

    def test_nesting_bombs(self, tmp_path: Path) -> None:
        with pytest.raises(DanluError, match=r"a\.jsonl:1: .*nested too deeply"):
            read(write(tmp_path / "a.jsonl", "[" * 200_000))
        with pytest.raises(DanluError, match=r"a\.json:1: .*(nested too deeply|not valid JSON)"):
            read(write(tmp_path / "a.json", "[" * 200_000))
        assert len(read(write(tmp_path / "a.html", "<div>" * 50_000 + "x"))) == 1

    @pytest.mark.parametrize(
        ("content", "place"),
        [
            ('[{"text": "a"},\n {"text": }]', ":2"),
            ('[{"text": "a"}\n {"text": "b"}]', ":2"),
            ('[{"text": "a"},\n', ":2"),
            ('{"text": "a"}\n{"text": "b"}', ":2: .*JSON Lines must be named .jsonl"),
            ('[{"text": "a"}, ]', ":1"),
            ("[1]", ":1: is a int, not an object"),
            ("", ":1"),
        ],
    )
    def test_json(self, tmp_path: Path, content: str, place: str) -> None:
        with pytest.raises(DanluError, match=rf"a\.json{place}"):
            read(write(tmp_path / "a.json", content))

    def test_csv(self, tmp_path: Path) -> None:
        with pytest.raises(DanluError, match=r"a\.csv:3: has 3 fields, the header 2"):
            read(write(tmp_path / "a.csv", "id,text\n1,a\n2,b,c\n"))
        assert len(read(tmp_path / "a.csv", on_error="skip")) == 1
        with pytest.raises(DanluError, match=r"a\.csv:2: is not valid CSV"):
            read(write(tmp_path / "a.csv", 'id,text\n1,"a'))
        with pytest.raises(DanluError, match="no column 'text' or 'content'"):
            read(write(tmp_path / "a.csv", "id,body\n1,a\n"))

    def test_parquet(self, tmp_path: Path) -> None:
        with pytest.raises(DanluError, match=r"a\.parquet: is not a Parquet file"):
            read(write(tmp_path / "a.parquet", b"PAR1 or not"))
        with pytest.raises(DanluError, match="unpack it"):
            read(write(tmp_path / "a.parquet.gz", b"x"))

    def test_pdf(self, tmp_path: Path) -> None:
        with pytest.raises(DanluError, match=r"a\.pdf: is not a PDF that can be read"):
            read(write(tmp_path / "a.pdf", b"%PDF-1.4 broken"))
        canvas = Canvas(str(tmp_path / "b.pdf"), encrypt=StandardEncryption("secret"))
        canvas.drawString(72, 700, "hidden")
        canvas.save()
        with pytest.raises(DanluError, match=r"b\.pdf: is encrypted; save it without a password"):
            read(tmp_path / "b.pdf")

    def test_empty_text_is_an_empty_document(self, tmp_path: Path) -> None:
        assert texts(write(tmp_path / "a.txt", "")) == [""]

    def test_what_is_too_large_to_be_one_document(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decoding, "WHOLE_FILE_LIMIT", 100)
        with pytest.raises(DanluError, match="too large for one document"):
            read(write(tmp_path / "a.html.gz", "<p>" + "x" * 1000))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(values, max_size=5), indent=st.sampled_from([None, 0, 2]), block=st.integers(1, 40))
def test_json_arrays_in_pieces_are_what_json_says(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], indent: int | None, block: int
) -> None:
    content = json.dumps(rows, indent=indent, ensure_ascii=False)
    pieces = (content[i : i + block] for i in range(0, len(content), block))
    (source,) = find_sources(
        [str(write(tmp_path_factory.mktemp("j") / "a.json", content))], (), (), ErrorPolicy("stop")
    )
    found = list(readers._json_values(source.files[0], pieces))
    assert [value for value, _ in found] == rows
    assert [line for _, line in found] == sorted(line for _, line in found)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1, max_size=5))
def test_csv_round_trip(tmp_path_factory: pytest.TempPathFactory, cells: list[str]) -> None:
    path = tmp_path_factory.mktemp("c") / "a.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerows([["id", "text"], *[[str(i), cell] for i, cell in enumerate(cells)]])
    assert texts(path) == cells
